"""Asks a ConvLLaVA about an image.

    python sample.py data/nano/examples/receipt.png "What is the total?"      # the small model of this repo
    python sample.py photo.jpg "What is this?" --checkpoint ConvLLaVA-sft-1536 --device cuda --dtype bf16
    python sample.py photo.jpg                                                # a chat about the image
"""
import argparse
import sys
import warnings
from pathlib import Path

import torch
from PIL import ImageDraw

from convllava import ConvLLaVA
from data.conversation import BOX, encode_conversation
from data.images import any_aspect, read_image, square

NANO = Path(__file__).resolve().parent / "data" / "nano" / "convllava-nano"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def arguments():
    parser = argparse.ArgumentParser(description="Ask a ConvLLaVA about an image.")
    parser.add_argument("image")
    parser.add_argument("question", nargs="?", help="leave it out to chat: /image PATH takes another image")
    parser.add_argument("--checkpoint", default=NANO, help="folder in the released layout (default: the small model)")
    parser.add_argument("--vision-tower", help="ConvNeXt folder, for a checkpoint that comes without")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 for the small model, else as in the files")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--resolution", type=int, help="side in pixels; default: the one that the model was trained on")
    parser.add_argument("--any-aspect", action="store_true", help="keep the ratio, the short side at the resolution")
    parser.add_argument("--draw", metavar="OUT.png", help="write the image with the answer's boxes drawn")
    args = parser.parse_args()
    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("resolution", 1)):
        if (value := getattr(args, name)) is not None and not value >= least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it should be at least {least}")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p is {args.top_p}: it should be above 0 and at most 1")
    if args.question is not None and not args.question.strip():
        raise ValueError("the question is empty: write one, or leave it out to chat")
    args.small = Path(args.checkpoint).resolve() == NANO
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):  # torch's sentence is long
        raise ValueError(f"--device {args.device} cannot be used by this torch: try cpu or cuda") from None
    return args


def visual_tokens(path, model, args):
    """Reads, transforms and encodes an image: its visual tokens (N, hidden)."""
    resolution, side = args.resolution or model.resolution, model.vision.compression
    if resolution < side:
        raise ValueError(f"--resolution is {resolution}: it should be at least {side}, one visual token")
    most = model.llama.config.max_position_embeddings
    if (resolution // side) ** 2 >= most:  # before pixels are made of it
        raise ValueError(f"--resolution {resolution} makes more visual tokens than the {most} tokens "
                         "that the model reads")
    pixels = (any_aspect if args.any_aspect else square)(read_image(path), resolution)
    if (pixels.shape[1] // side) * (pixels.shape[2] // side) >= most:
        raise ValueError(f"{path} makes more visual tokens than the {most} tokens that the model reads: use a smaller "
                         "--resolution, or leave --any-aspect out")
    with torch.inference_mode():
        return model.encode_images([pixels])[0]


def answer(model, visual, turns, args):
    """Streams the answer to the last turn to stdout, and returns it."""
    prompt, _ = encode_conversation(model.tokenizer, turns)
    tokens, written = [], ""
    for (token,) in model.generate([prompt], [visual], args.max_new_tokens, args.temperature, args.top_p):
        if token != model.tokenizer.eos:
            tokens.append(token)
        text = model.tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # half of a character that takes several tokens
            print(text[len(written):], end="", flush=True)
            written = text
    print(flush=True)
    return written


def draw_boxes(image, text, any_aspect):
    """The image with every box [x1, y1, x2, y2] of the text; coordinates are shares of the padded square.

    With any_aspect they are shares of the image itself.
    """
    image = image.copy()
    draw, side = ImageDraw.Draw(image), max(image.size)
    width, height = image.size if any_aspect else (side, side)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    boxes = [tuple(map(float, match.groups())) for match in BOX.finditer(text)]
    boxes = [(x1, y1, x2, y2) for x1, y1, x2, y2 in boxes if x1 <= x2 and y1 <= y2]
    for x1, y1, x2, y2 in boxes:
        draw.rectangle((left + x1 * width, top + y1 * height, left + x2 * width, top + y2 * height),
                       outline=(230, 30, 30), width=max(2, side // 200))
    return image, len(boxes)


def finish(path, text, args):
    """Writes --draw's picture where the answer holds boxes."""
    if not args.draw:
        return
    image, count = draw_boxes(read_image(path), text, args.any_aspect)
    if count:
        try:
            image.save(args.draw)
        except KeyError:
            raise ValueError(f"--draw {args.draw}: Pillow cannot write such files, take .png") from None
    print(f"{count} boxes drawn in {args.draw}" if count else f"the answer holds no box, {args.draw} is not written",
          file=sys.stderr)


def chat(model, path, visual, args):
    """Questions from stdin about one image, the history kept, until the input ends."""
    print(f"Ask about {path}; /image PATH takes another image, Ctrl-D leaves.", file=sys.stderr)
    turns = []
    sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 is for the encoder to refuse
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        question = line.strip()
        try:
            if question.split(" ")[0] == "/image":
                new = question.removeprefix("/image").strip()
                path, visual, turns = new, visual_tokens(new, model, args), []
                print(f"Ask about {path}.", file=sys.stderr)
            elif question:
                asked = turns + [(0 if turns else 1, question, None)]
                text = answer(model, visual, asked, args)
                turns = asked[:-1] + [(*asked[-1][:2], text)]
                finish(path, text, args)
        except (ValueError, OSError) as error:  # the chat goes on as it was
            print(f"sample.py: {error}" + "; /image PATH starts anew" * (len(turns) > 0), file=sys.stderr)


def main():
    try:
        warnings.formatwarning = lambda message, *_: f"sample.py: warning: {message}\n"
        args = arguments()
        read_image(args.image)  # a wrong path is known before the model is loaded
        dtype = DTYPES[args.dtype] if args.dtype else torch.float32 if args.small else None
        model = ConvLLaVA.from_pretrained(args.checkpoint, args.device, dtype, args.vision_tower)
        visual = visual_tokens(args.image, model, args)
        if args.question is None:
            return chat(model, args.image, visual, args)
        finish(args.image, answer(model, visual, [(1, args.question, None)], args), args)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"sample.py: {(str(error) or 'out of memory').splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
