"""Walks a mixture before a training run: counts, what cannot be read, and lengths in tokens.

    python -m data.check data/table15/phase1.json --llm vicuna-7b-v1.5 --resolution 1536
"""
import argparse
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from torch.utils.data import DataLoader
from tqdm import tqdm

from data.errors import check_ranges, print_error, printable, tell
from data.conversation import IGNORE, IMAGE_TOKEN, Tokenizer
from data.dataset import MAX_NAMED, TIMEOUT, LlavaDataset, read_mixture, shape_only
from data.images import check_resolution

BIN = 256  # tokens, of the histogram of lengths


class CheckedDataset(LlavaDataset):
    """Items: (number of images, tokens, tokens before the first answer, None), or (0, 0, 0, what is wrong)."""

    def __getitem__(self, index):
        name = f"sample {index}"
        try:
            entry, folder, name = self.entry(index)
            item = self.read(entry, folder)
        except ValueError as error:
            return 0, 0, 0, f"{name}: {error}"
        # an image takes the place of one token in the ids
        added = [self.num_visual_tokens(image) - 1 for image in item["images"]]
        first = int((item["labels"] != IGNORE).nonzero()[0])
        images_before = int((item["input_ids"][:first] == IMAGE_TOKEN).sum())
        return len(added), len(item["labels"]) + sum(added), first + sum(added[:images_before]), None


def kind_of(problem):
    if ": there is no image at" in problem:
        return "missing images"
    if any(words in problem for words in ("is not a whole image", "is damaged, or no image", "too many pixels")):
        return "unreadable images"
    return "malformed samples"


def check(args):
    """Prints the report; returns the share of samples that training could not read."""
    compression = 2 ** (args.stages + 1)
    check_resolution(args.resolution, compression, args.max_length)
    dataset = CheckedDataset(read_mixture(args.mixture), Tokenizer(Path(args.llm) / "tokenizer.model"), compression,
                             max_length=10 ** 9, transform=partial(shape_only, resolution=args.resolution))
    loader = DataLoader(dataset, batch_size=64, num_workers=args.workers, collate_fn=list,
                        timeout=TIMEOUT if args.workers else 0)

    counts, problems, lengths = Counter(), Counter(), []
    with tqdm(total=len(dataset), unit="sample") as bar:
        for index, row in enumerate(row for batch in loader for row in batch):
            num_images, tokens, first, problem = row
            bar.update()
            if problem is None and first >= args.max_length:
                name = dataset.entry(index)[2]
                problem = f"{name}: its answer starts after {first} tokens, {args.max_length} are kept"
            if problem is None:
                counts["samples with images"] += num_images > 0
                counts["text only"] += num_images == 0
                counts["images"] += num_images
                lengths.append(tokens)
                continue
            problems[kind_of(problem)] += 1
            if problems.total() <= MAX_NAMED:
                tell(problem)

    for number, (file, _) in enumerate(dataset.sources):
        print(f"{(dataset.source == number).sum():10,}  samples in {printable(str(file))}")
    for name, count in (*counts.items(), *problems.items()):
        print(f"{count:10,}  {name}")
    if lengths:
        print_lengths(lengths, args.max_length)
    return problems.total() / len(dataset)


def print_lengths(lengths, max_length):
    """Prints a histogram of the samples' lengths in tokens."""
    num_cut = sum(length > max_length for length in lengths)
    print(f"\ntokens with the visual ones: {sum(lengths) / len(lengths):.0f} on average, {max(lengths)} at most, "
          f"{num_cut:,} samples cut at {max_length}")
    bins = Counter(length // BIN for length in lengths)
    for i in range(max(bins) + 1):
        bar = "#" * round(60 * bins[i] / len(lengths))
        print(f"{i * BIN:6d} to {i * BIN + BIN - 1:<6d}{bins[i]:10,}  {bar}")


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
        check_ranges(args, max_length=(1, None), workers=(0, 999))
        share_lost = check(args)
    except Exception as error:
        print_error("data.check", error, out_of_memory="use fewer --workers")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if share_lost > 0.01:
        print(f"{share_lost:.1%} of the samples cannot be read: training stops at 1%", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
