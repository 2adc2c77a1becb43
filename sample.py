"""Asks a ConvLLaVA about an image.

    python sample.py data/nano/examples/receipt.png "What is the total?"      # the small model of this repo
    python sample.py photo.jpg "What is this?" --checkpoint ConvLLaVA-sft-1536 --device cuda --dtype bf16
    python sample.py photo.jpg                                                # a chat about the image
    python sample.py --questions TextVQA_VAL.tsv --answers answers.jsonl      # a benchmark, for data.score to score
"""
import argparse
import sys
import uuid
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import ImageDraw

from convllava import ConvLLaVA
from data.answers import check_answers_path, write_answers
from data.benchmarks import SHORT_SENTENCES, encode_once, read_benchmark
from data.conversation import BOX, encode_conversation
from data.errors import check_ranges, print_error, tell, tell_warnings
from data.images import any_aspect, light_up, read_image, square
from data.validation import greedy_answers
from llama import recorded_attention

NANO = Path(__file__).resolve().parent / "data" / "nano" / "convllava-nano"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def arguments():
    parser = argparse.ArgumentParser(description="Ask a ConvLLaVA about an image.")
    parser.add_argument("image", nargs="?")
    parser.add_argument("question", nargs="?", help="leave it out for a chat; in it, /image PATH changes the image")

    model = parser.add_argument_group("the model")
    model.add_argument("--checkpoint", default=NANO, help="folder in the released layout (default: the small model)")
    model.add_argument("--vision-tower", help="ConvNeXt folder, for a checkpoint that comes without")
    model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    model.add_argument("--dtype", choices=DTYPES, help="of the weights; int8: the language model's matrices, all else bf16 "
                       "(default: fp32 for the small model, else as in the files)")

    answer = parser.add_argument_group("the answer")
    answer.add_argument("--max-new-tokens", type=int, default=512)
    answer.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    answer.add_argument("--top-p", type=float, default=1.0)

    image = parser.add_argument_group("the image")
    image.add_argument("--resolution", type=int, help="side in pixels; default: the one that the model was trained on")
    image.add_argument("--any-aspect", action="store_true", help="keep the ratio, the short side at the resolution")
    image.add_argument("--draw", metavar="OUT.png", help="write the image with the answer's boxes drawn")
    image.add_argument("--look", metavar="OUT.png", help="write the image, lit where the answer looked")
    image.add_argument("--layer", type=int, help="of --look, from 0; default: the one that looks at the image most")

    many = parser.add_argument_group("a benchmark in place of one image, answered greedily")
    many.add_argument("--questions", metavar="FILE", help="VLMEvalKit's .tsv, or LLaVA's or RefCOCO's .jsonl")
    many.add_argument("--answers", metavar="FILE", help="LLaVA's answer lines; goes on where it was interrupted")
    many.add_argument("--batch", type=int, default=8, help="questions at a time (default: 8)")
    many.add_argument("--images", metavar="DIR", help="folder of the images that a .jsonl names")
    many.add_argument("--short-sentence", choices=SHORT_SENTENCES, default="training",
                      help="behind TextVQA's and DocVQA's questions: that of training, or of VLMEvalKit in May 2024")
    args = parser.parse_args()

    check_ranges(args, max_new_tokens=(1, None), temperature=(0, None), resolution=(1, None), batch=(1, None))
    if args.questions and (not args.answers or args.image is not None or args.draw or args.temperature):
        raise ValueError("--questions FILE needs --answers FILE, and takes no image, --draw or --temperature")
    if not args.questions and (args.image is None or args.answers or args.images):
        raise ValueError("give an image to ask about, or for a benchmark --questions FILE --answers FILE [--images DIR]")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p is {args.top_p}: it should be above 0 and at most 1")
    if args.question is not None and not args.question.strip():
        raise ValueError("the question is empty: write one, or leave it out to chat")
    if args.look and args.question is None:
        raise ValueError(f"--look {args.look} shows where one answer looked: write a question")
    return args


def load_model(args):
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):  # by device
        raise ValueError(f"--device {args.device} cannot be used by this torch: try cpu or cuda") from None
    is_nano = Path(args.checkpoint).resolve() == NANO
    dtype = DTYPES.get(args.dtype)  # None: as in the files
    if is_nano and dtype is None:
        dtype = torch.float32
    model = ConvLLaVA.from_pretrained(args.checkpoint, args.device, dtype, args.vision_tower)
    if not is_nano:
        tell(f"on {args.device}, in {type_of(model)}")
    return model


def type_of(model):
    """The name of the type of the language model's matrices."""
    return str(model.llama.layers[0].self_attn.q_proj.weight.dtype).removeprefix("torch.")


def ask(model, visual_tokens, question, history, args):
    """Prints the answer to stdout as it is generated, and returns it."""
    answer = model.answer(visual_tokens, question, history, args.max_new_tokens, args.temperature, args.top_p,
                          on_text=lambda text: print(text, end="", flush=True))
    print(flush=True)
    return answer


def draw_boxes(image, text, any_aspect):
    """The image with every box [x1, y1, x2, y2] of the text, and their number.

    Coordinates are shares of the padded square, which training saw; with any_aspect, of the image itself.
    """
    image = image.copy()
    draw, side = ImageDraw.Draw(image), max(image.size)
    width, height = image.size if any_aspect else (side, side)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    count = 0
    for match in BOX.finditer(text):
        x1, y1, x2, y2 = map(float, match.groups())
        if x1 <= x2 and y1 <= y2:
            corners = (left + x1 * width, top + y1 * height, left + x2 * width, top + y2 * height)
            draw.rectangle(corners, outline=(230, 30, 30), width=max(2, side // 200))
            count += 1
    return image, count


def write_drawing(path, answer, args):
    """Writes --draw's picture where the answer holds boxes."""
    image, count = draw_boxes(read_image(path), answer, args.any_aspect)
    if not count:
        tell(f"the answer holds no box, {args.draw} is not written")
        return
    save_picture(image, path, args.draw, "--draw")
    tell(f"{count} boxes drawn in {args.draw}")


def write_look(model, layers, args):
    """Writes --look's picture, and prints how much of the answer's attention is on the image in each layer."""
    image, transform = read_image(args.image), any_aspect if args.any_aspect else square
    pixels = transform(image, args.resolution or model.resolution)  # (3, H, W)
    prompt, _ = encode_conversation(model.tokenizer, [(1, args.question, None)])
    (visual, rows, columns), = model.spans(prompt, [pixels]).images
    # of each layer: the attention on each visual token, averaged over the answer's tokens and the heads
    means = [torch.cat([weights[0, :, visual] for weights in tokens]).mean(0) for tokens in layers]  # [(N,)]
    shares = [mean.sum().item() for mean in means]
    for i, share in enumerate(shares):
        print(f"layer {i:2} {share:4.0%} {'█' * round(40 * share)}", file=sys.stderr)
    light = means[shares.index(max(shares)) if args.layer is None else args.layer].view(rows, columns)
    num_across = pixels.shape[2] / model.vision.compression
    save_picture(light_up(image, light / light.max(), num_across, args.any_aspect), args.image, args.look, "--look")


def save_picture(image, source, path, option):
    """Writes the picture, of the image at `source`, that an option asks for."""
    target = Path(path).resolve()  # behind a link
    if target == Path(source).resolve():
        raise ValueError(f"{option} {path} would replace the image itself: take another name")
    new = target.with_name(f".{uuid.uuid4().hex[:8]}-{target.name}")  # an older picture stays until this is complete
    try:
        image.save(new)
        new.replace(target)
    except Exception as error:  # Pillow's encoders raise many kinds
        new.unlink(missing_ok=True)
        raise ValueError(f"{option} {path} cannot be written, take a .png where there is room: {error}") from None


def chat(model, path, visual_tokens, args):
    """Answers questions from stdin about one image, each with those before it, until the input ends."""
    tell(f"Ask about {path}; /image PATH takes another image, Ctrl-D leaves.")
    history = []
    sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 arrives, for the encoder to refuse
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        question = line.strip()
        try:
            if question.split(" ")[0] == "/image":
                new_path = question.removeprefix("/image").strip()
                visual_tokens = model.encode_image(new_path, args.resolution, args.any_aspect)
                path, history = new_path, []
                tell(f"Ask about {path}.")
            elif question:
                answer = ask(model, visual_tokens, question, history, args)
                history = [*history, (question, answer)]
                if args.draw:
                    write_drawing(path, answer, args)
        except Exception as error:  # the chat goes on as it was
            print_error("sample.py", error, out_of_memory="ask a shorter question")
            if history:
                print("/image PATH starts anew", file=sys.stderr)


def answer_window(model, questions, args):
    """Yields (place, answer, None or what was wrong) of each question. An image of several is encoded once."""
    # what each question is asked with, by its place in the window; encoded: by an image's digest
    limit = model.llama.config.max_position_embeddings
    see = lambda image: model.encode_image(image, args.resolution, args.any_aspect)
    encoded, visual_tokens, prompts, lengths = {}, {}, {}, {}
    for place, question in enumerate(questions):
        try:
            visual = encode_once(question.images, encoded, see)
            prompt, _ = encode_conversation(model.tokenizer, [(len(visual), question.pieces, None)])
            length = len(prompt) + sum(len(tokens) - 1 for tokens in visual)
            if length >= limit:
                raise ValueError(f"it has {length} tokens with the image's, and the model reads {limit}")
            visual_tokens[place], prompts[place], lengths[place] = visual, prompt, length
        except (ValueError, OSError) as error:
            tell(f"question {question.id}: {error}")
            yield place, "", str(error)

    # those of like length together, which has the least padding
    order = sorted(prompts, key=lengths.get)
    for start in range(0, len(order), args.batch):
        batch = order[start:start + args.batch]
        images = [tokens for place in batch for tokens in visual_tokens[place]]
        answers = greedy_answers(model, [prompts[place] for place in batch], images, args.max_new_tokens)
        yield from zip(batch, answers, [None] * len(batch))


def answer_benchmark(args):
    """Writes the answers to a file's questions. Exits with 1 where some could not be asked."""
    check_answers_path(args.answers, args.questions)
    benchmark = read_benchmark(args.questions, args.images or "", args.short_sentence)
    model = load_model(args)
    model.check_resolution(args.resolution)
    options = dict(resolution=args.resolution or model.resolution, any_aspect=args.any_aspect,
                   vision_tower=args.vision_tower, max_new_tokens=args.max_new_tokens,
                   short_sentence=args.short_sentence, dtype=type_of(model))
    num_failed = write_answers(args.answers, benchmark, Path(args.checkpoint).resolve().name, options,
                               model.projector[2].weight, lambda questions: answer_window(model, questions, args))
    if num_failed:
        sys.exit(1)


def main():
    try:
        tell_warnings("sample.py")
        args = arguments()
        if args.questions:
            return answer_benchmark(args)
        read_image(args.image)  # a wrong path is known before the model is loaded
        model = load_model(args)
        visual_tokens = model.encode_image(args.image, args.resolution, args.any_aspect)
        if args.question is None:
            return chat(model, args.image, visual_tokens, args)
        check_ranges(args, layer=(0, len(model.llama.layers) - 1))
        recording = recorded_attention(model.llama) if args.look else nullcontext()
        with recording as layers:
            answer = ask(model, visual_tokens, args.question, [], args)
        if args.draw:
            write_drawing(args.image, answer, args)
        if args.look:
            write_look(model, layers, args)
    except Exception as error:
        print_error("sample.py", error, out_of_memory="try --dtype bf16 or int8, or a smaller --resolution or --batch")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
