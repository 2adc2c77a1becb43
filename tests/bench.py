"""Measures what the README claims of a checkpoint: loading, memory and speed.

    python tests/make_checkpoint.py /tmp/random-7b
    python tests/bench.py /tmp/random-7b --device cpu --tokens 16
"""
import argparse
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from convllava import ConvLLaVA  # noqa: E402
from data.conversation import encode_conversation  # noqa: E402
from data.images import read_image, square  # noqa: E402

EXAMPLE = Path(__file__).parents[1] / "data" / "nano" / "examples" / "receipt.png"


def peak_bytes(device):
    """The most memory held so far: of the process, or of the GPU's allocator."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def load_and_answer(args):
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    load_and_answer(args)
