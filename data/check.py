"""Walks a mixture before a training run: counts, what cannot be read, and lengths in tokens.

    python -m data.check data/table15/phase1.json --llm vicuna-7b-v1.5 --resolution 1536
"""
import argparse
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.conversation import IGNORE, IMAGE_TOKEN
from data.dataset import LlavaDataset, read_mixture
from llama import Tokenizer
from train import check_resolution

SHOWN = 20  # unreadable samples that are named
BIN = 256  # tokens


class Walk(LlavaDataset):
    """(number of images, tokens, tokens before the first answer, None), or (0, 0, 0, what is wrong)."""

    def __getitem__(self, index):
        name = f"sample {index}"
        try:
            entry, folder, name = self.entry(index)
            item = self.read(entry, folder)
        except ValueError as error:
            return 0, 0, 0, f"{name}: {error}"
        visual = [self.num_visual_tokens(image) - 1 for image in item["images"]]
        first = int((item["labels"] != IGNORE).nonzero()[0])
        before = sum(visual[:int((item["input_ids"][:first] == IMAGE_TOKEN).sum())])
        return len(visual), len(item["labels"]) + sum(visual), first + before, None


def shape_only(image, resolution):
    return torch.empty(3, resolution, resolution, device="meta")


def kind_of(problem):
    if ": there is no image at" in problem:
        return "missing images"
    return "unreadable images" if "Pillow" in problem or "too many pixels" in problem else "malformed samples"


def check(args):
    """Prints the report; returns the share of samples that training could not read."""
    model = SimpleNamespace(tokenizer=Tokenizer.of(args.llm), max_length=10 ** 9, resolution=args.resolution,
                            vision=SimpleNamespace(compression=2 ** (args.stages + 1)))
    check_resolution(model)
    dataset = Walk(read_mixture(args.mixture), model, partial(shape_only, resolution=args.resolution))
    loader = DataLoader(dataset, batch_size=64, num_workers=args.workers, collate_fn=list)
    counts, problems, lengths = Counter(), Counter(), []
    with tqdm(total=len(dataset), unit="sample") as bar:
        for i, (images, tokens, first, problem) in enumerate(row for batch in loader for row in batch):
            bar.update()
            if problem is None and first >= args.max_length:
                problem = f"{dataset.entry(i)[2]}: its answer starts after {first} tokens, {args.max_length} are kept"
            if problem is None:
                counts.update({"samples with images": images > 0, "text only": images == 0, "images": images})
                lengths.append(tokens)
                continue
            problems[kind_of(problem)] += 1
            if problems.total() <= SHOWN:
                bar.write(problem, file=sys.stderr)
    for number, (file, _) in enumerate(dataset.sources):
        print(f"{(dataset.source == number).sum():10,}  samples in {file}")
    for what, count in (*counts.items(), *problems.items()):
        print(f"{count:10,}  {what}")
    if lengths:
        print(f"\ntokens with the visual ones: {sum(lengths) / len(lengths):.0f} on average, {max(lengths)} at most, "
              f"{sum(n > args.max_length for n in lengths):,} samples cut at {args.max_length}")
        bins = Counter(n // BIN for n in lengths)
        for low in range(max(bins) + 1):
            share = bins[low] / len(lengths)
            print(f"{low * BIN:6d} to {low * BIN + BIN - 1:<6d}{bins[low]:10,}  {'#' * round(60 * share)}")
    return problems.total() / len(dataset)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mixture", help="a file like data/table15/phase1.json")
    parser.add_argument("--llm", default=Path(__file__).parent / "nano" / "backbones" / "vicuna-nano",
                        help="Llama folder whose tokenizer counts (default: the small model's)")
    parser.add_argument("--resolution", type=int, default=1536)
    parser.add_argument("--stages", type=int, choices=(4, 5), default=5, help="of the ConvNeXt (default: 5)")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens that training keeps (default: 2048)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    try:
        if args.max_length < 1:
            raise ValueError(f"--max-length is {args.max_length}: it should be at least 1")
        if not 0 <= args.workers <= 999:
            raise ValueError(f"--workers is {args.workers}: take 0 to 999")
        lost = check(args)
    except (ValueError, OSError) as error:
        print(f"data.check: {str(error).strip().splitlines()[-1].removeprefix('ValueError: ')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if lost > 0.01:
        print(f"{lost:.1%} of the samples cannot be read: training stops at 1%", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
