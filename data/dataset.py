"""LLaVA-format data: the dataset, the collator and the sampler."""
import itertools
import os
import random
from pathlib import Path

import torch
from torch.utils.data import Dataset, Sampler

from data.conversation import IGNORE, IMAGE_TOKEN, encode_conversation, parse_turns
from data.images import read_image
from data.weights import read_json


class LlavaDataset(Dataset):
    """One or several (annotation file, image folder) pairs as one dataset of tokenised conversations.

    Items: input_ids and labels (T,), images [(3, H, W)], unreadable [sentences]. A sample that cannot be read is
    replaced by the next one that can, and named in `unreadable`. model: the ConvLLaVA that it is for, whose
    max_length cuts the samples, visual tokens counted.
    """

    def __init__(self, sources, model, transform):
        self.tokenizer, self.transform = model.tokenizer, transform
        self.compression, self.max_length = model.vision.compression, model.max_length
        self.entries = []
        for file, folder in sources:
            if not Path(folder).is_dir():
                raise ValueError(f"there is no image folder at {folder}")
            entries = read_json(file, list)
            self.entries += [(entry, Path(folder), f"{file}, sample {i}") for i, entry in enumerate(entries)]

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, index):
        unreadable = []
        for step in range(min(len(self), 100)):
            entry, folder, name = self.entries[(index + step) % len(self)]
            try:
                return self.read(entry, folder) | {"unreadable": unreadable}
            except ValueError as error:
                unreadable = unreadable or [f"{name}: {error}"]  # the replacement is named in its own turn
        raise ValueError(f"no sample can be read from here on: {unreadable[0]}")

    def read(self, entry, folder):
        turns, paths = parse_turns(entry)
        images = [self.transform(read_image(inside(folder, path))) for path in paths]
        ids, labels = encode_conversation(self.tokenizer, turns)
        visual = iter([(image.shape[1] // self.compression) * (image.shape[2] // self.compression) for image in images])
        lengths = itertools.accumulate(next(visual) if token == IMAGE_TOKEN else 1 for token in ids)
        kept = sum(length <= self.max_length for length in lengths)
        ids, labels = torch.tensor(ids[:kept]), torch.tensor(labels[:kept])
        if (labels == IGNORE).all():
            raise ValueError(f"its first {self.max_length} tokens hold no answer")
        return {"input_ids": ids, "labels": labels, "images": images[:int((ids == IMAGE_TOKEN).sum())]}

    def sizes(self):
        """(has an image, characters said) of every sample, without reading images; (False, 0) where malformed."""
        found = []
        for entry, _, _ in self.entries:
            try:
                turns, paths = parse_turns(entry)
                found.append((bool(paths), sum(len(question) + len(answer) for _, question, answer in turns)))
            except ValueError:
                found.append((False, 0))
        return found


def inside(folder, path):
    """The path below its folder; one that leaves the folder is refused, by its words: the folder may hold links."""
    if Path(path).is_absolute() or os.path.normpath(path).startswith(".."):
        raise ValueError(f"the image path {path!r} leaves its folder {folder}")
    return folder / path


def collate(items):
    """A batch of ragged lists, in sample order: the model pads when it has spliced the visual tokens in."""
    return {key: [item[key] for item in items] for key in ("input_ids", "labels")} | {
        key: [value for item in items for value in item[key]] for key in ("images", "unreadable")}


class GroupedSampler(Sampler):
    """Global batches of one modality and similar lengths, and of each this rank's micro-batches, as index lists.

    sizes: LlavaDataset.sizes(). The global batch is world * accumulation * micro samples; the order of the epoch
    depends on the seed and not on how a global batch is cut. Incomplete global batches are dropped.
    """

    def __init__(self, sizes, micro, accumulation=1, rank=0, world=1, seed=0, grouped=32):
        self.sizes, self.micro, self.rank, self.world, self.seed = sizes, micro, rank, world, seed
        self.batch = micro * accumulation * world
        self.grouped = grouped  # global batches that are sorted by length together
        self.epoch = self.skip = 0  # skip: global batches of the first epoch already done

    def batches(self):
        rng = random.Random(f"{self.seed}/{self.epoch}")
        batches = []
        for modality in (True, False):
            indices = [i for i, (has_image, _) in enumerate(self.sizes) if has_image == modality]
            rng.shuffle(indices)
            for start in range(0, len(indices), self.batch * self.grouped):
                pool = sorted(indices[start:start + self.batch * self.grouped], key=lambda i: self.sizes[i][1])
                batches += [pool[i:i + self.batch] for i in range(0, len(pool) - self.batch + 1, self.batch)]
        rng.shuffle(batches)
        return batches

    def __len__(self):
        counts = [sum(has_image == modality for has_image, _ in self.sizes) for modality in (True, False)]
        return sum(count // self.batch for count in counts) * (self.batch // self.micro // self.world)

    def __iter__(self):
        for batch in self.batches()[self.skip:]:
            mine = batch[self.rank::self.world]  # every rank has short and long ones
            for start in range(0, len(mine), self.micro):
                yield mine[start:start + self.micro]
