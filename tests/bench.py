"""Measures what the README claims.

    python tests/make_checkpoint.py /tmp/random-7b
    python tests/bench.py load /tmp/random-7b --device cpu     # loading, memory and speed of a checkpoint
    python tests/bench.py data --samples 3000000               # memory of a rank and its data processes
    python tests/bench.py flops                                # the paper's figure 2
"""
import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from convllava import ConvLLaVA  # noqa: E402
from convnext import CONVNEXT_L, CONVNEXT_L_DAGGER, ConvNeXt  # noqa: E402
from data.conversation import encode_conversation  # noqa: E402
from data.images import read_image, square  # noqa: E402
from data.plan import flops  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402

DATA = Path(__file__).parents[1] / "data"
EXAMPLE = DATA / "nano" / "examples" / "receipt.png"


def peak_bytes(device):
    """The most memory held so far: of the process, or of the GPU's allocator."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def load(args):
    """Loads a checkpoint and answers one question with it."""
    before, started = peak_bytes(args.device), time.perf_counter()
    model = ConvLLaVA.from_pretrained(args.checkpoint, device=args.device, dtype=torch.bfloat16)
    loaded, peak = time.perf_counter() - started, peak_bytes(args.device) - before
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"load: {loaded:.1f} s, peak {peak / 1e9:.2f} GB for {weights / 1e9:.2f} GB of weights: "
          f"{peak / weights:.3f}x")
    prompt, _ = encode_conversation(model.tokenizer, [(1, "What is the total?", None)])
    times = [time.perf_counter()]
    for _ in model.generate([prompt], [square(read_image(EXAMPLE), model.resolution)], max_new_tokens=args.tokens):
        times.append(time.perf_counter())
    if len(times) < 3:
        raise SystemExit("the answer ended at once: nothing to time")
    each = (times[-1] - times[1]) / (len(times) - 2)
    peak = peak_bytes(args.device) - before
    print(f"answer at {model.resolution} px: first token after {times[1] - times[0]:.1f} s, "
          f"then {1 / each:.2f} tokens/s; peak {peak / 1e9:.2f} GB: {peak / weights:.3f}x the weights")


def own_bytes(pids):
    """Memory of processes, what they share counted once (Linux's proportional set sizes)."""
    return sum(int(line.split()[1]) * 1024 for pid in pids
               for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))


def data(args):
    """A rank with data processes that all have read samples: memory against the same on a hundred samples."""
    from torch.utils.data import DataLoader

    from data.dataset import GroupedSampler, LlavaDataset, collate
    from llama import Tokenizer

    class Model:  # what the dataset asks of one
        tokenizer, vision, max_length = Tokenizer(DATA / "nano/backbones/vicuna-nano/tokenizer.model"), ConvNeXt(
            (1,) * 5, (1,) * 5), 2048
    said, found = "a description of what is seen, " * 15, []
    with tempfile.TemporaryDirectory() as folder:
        for samples in (100 * args.workers, args.samples):
            file = Path(folder) / f"{samples}.json"
            with open(file, "w") as out:
                for i in range(samples):
                    out.write(("[" if not i else ",\n") + json.dumps({"id": i, "conversations": [
                        {"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": said}]}))
                out.write("]")
            started = time.perf_counter()
            dataset = LlavaDataset([(file, folder)], Model, None)
            sampler = GroupedSampler(dataset, 16)
            loader = iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=args.workers))
            took = time.perf_counter() - started
            for _ in range(5 * args.workers):
                next(loader)
            children = [worker.pid for worker in loader._workers]
            found.append(own_bytes([os.getpid(), *children]))
            size = file.stat().st_size
            del loader
    print(f"{args.samples:,} samples, {size / 1e9:.2f} GB of JSON, found in {took:.0f} s; a rank with {args.workers} "
          f"data processes: {(found[1] - found[0]) / 1e9:.2f} GB more than with a hundred samples each, "
          f"{(found[1] - found[0]) / size:.2f}x the JSON")


def figure2(args):
    """Forward TFLOPs of an image at Vicuna-7B, its visual tokens alone: ViT-L/14, ConvNeXt-L and ConvNeXt-L†."""
    with torch.device("meta"):
        llama = Llama(LlamaConfig())
        models = [ConvLLaVA(ConvNeXt(**sizes), llama) for sizes in (CONVNEXT_L, CONVNEXT_L_DAGGER)]
    config, width, depth = llama.config, 1024, 24  # of ViT-L
    print("| pixels | ViT-L/14 | ConvNeXt-L | ConvNeXt-L† | ViT / ConvNeXt | ConvNeXt / † |\n|" + " --- |" * 6)
    for side in (336, 512, 768, 1024, 1536):
        tokens = (side // 14) ** 2
        vit = 2 * tokens * (3 * 14 ** 2 * width + depth * 12 * width ** 2) + depth * 4 * tokens ** 2 * width
        matrices = sum(p.numel() for p in llama.layers.parameters() if p.dim() > 1)
        vit += 2 * tokens * (width + config.hidden_size) * config.hidden_size  # the projector
        vit += 2 * tokens * matrices + 4 * tokens ** 2 * config.hidden_size * config.num_hidden_layers
        four, five = (sum(forward for forward, _ in flops(model, side).values()) for model in models)
        visual = (vit, tokens), (four, (side // 32) ** 2), (five, (side // 64) ** 2)
        print(f"| {side} | " + " | ".join(f"{count / 1e12:.1f} ({n} tokens)" for count, n in visual)
              + f" | {vit / four:.1f}× | {four / five:.1f}× |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("load", help=load.__doc__)
    command.set_defaults(run=load)
    command.add_argument("checkpoint")
    command.add_argument("--device", default="cpu")
    command.add_argument("--tokens", type=int, default=16)
    command = commands.add_parser("data", help=data.__doc__)
    command.set_defaults(run=data)
    command.add_argument("--samples", type=int, default=3_000_000)
    command.add_argument("--workers", type=int, default=8)
    commands.add_parser("flops", help=figure2.__doc__).set_defaults(run=figure2)
    args = parser.parse_args()
    args.run(args)
