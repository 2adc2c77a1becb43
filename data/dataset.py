"""LLaVA-format data: mixtures of files, the dataset, the collator and the sampler."""
import itertools
import json
import os
import re
import zlib
from array import array
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from data.conversation import IGNORE, IMAGE_TOKEN, encode_conversation, parse_turns
from data.images import read_image
from data.weights import read_json

SPACE = r"[ \t\r\n]*"  # JSON's


def read_mixture(file):
    """The (annotation file, image folder) pairs that a mixture names, relative to its own folder."""
    pairs = []
    for i, part in enumerate(read_json(file, list)):
        if not isinstance(part, dict) or not all(isinstance(part.get(key), str) for key in ("annotations", "images")):
            raise ValueError(f'{file}, part {i}: expected {{"annotations": file, "images": folder}}; to train on a '
                             "LLaVA-format file itself, give its folder with --images")
        pairs.append(tuple(Path(file).parent / part[key] for key in ("annotations", "images")))
    return pairs


class LlavaDataset(Dataset):
    """One or several (annotation file, image folder) pairs as one dataset of tokenised conversations.

    Items: input_ids and labels (T,), images [(3, H, W)], unreadable [sentences]. A sample that cannot be read is
    replaced by one behind it that can, and named in `unreadable`. model: the ConvLLaVA that it is for, whose
    max_length cuts the samples, visual tokens counted. Kept in memory is where each sample lies in its file, 40 bytes.
    """

    def __init__(self, sources, model, transform):
        self.tokenizer, self.transform = model.tokenizer, transform
        self.compression, self.max_length = model.vision.compression, model.max_length
        self.sources = [(Path(file), Path(folder)) for file, folder in sources]
        found, self.digest = [array("q") for _ in range(5)], 0
        for number, (file, folder) in enumerate(self.sources):
            if not folder.is_dir():
                raise ValueError(f"there is no image folder at {folder}")
            for start, end, entry in scan(file):
                for column, value in zip(found, (number, start, end, *size_of(entry))):
                    column.append(value)
            self.digest = zlib.crc32(file.read_bytes(), self.digest)  # a changed file is another run
        # of each sample: its file, the bytes there that are its JSON, whether it has an image, and characters said
        self.source, self.start, self.end, self.has_image, self.said = (np.frombuffer(c, np.int64) for c in found)

    def __len__(self):
        return len(self.source)

    def entry(self, index):
        """A sample's JSON object, its image folder, and how to call it."""
        file, folder = self.sources[self.source[index]]
        number = index - int(np.searchsorted(self.source, self.source[index]))
        with open(file, "rb") as opened:
            opened.seek(self.start[index])
            text = opened.read(self.end[index] - self.start[index])
        try:
            return json.loads(text), folder, f"{file}, sample {number}"
        except ValueError:
            raise ValueError(f"{file} has been changed since it was opened: begin anew") from None

    def __getitem__(self, index):
        unreadable = []
        for step in range(100):  # further on each time: those of a missing folder lie together
            entry, folder, name = self.entry((index + step ** 3) % len(self))
            try:
                return self.read(entry, folder) | {"unreadable": unreadable}
            except ValueError as error:
                unreadable = unreadable or [f"{name}: {error}"]  # the replacement is named in its own turn
        raise ValueError(f"no sample can be read from here on: {unreadable[0]}")

    def num_visual_tokens(self, image):
        """How many a (3, H, W) image becomes: the encoder leaves out what its sides have beyond whole tokens."""
        return (image.shape[1] // self.compression) * (image.shape[2] // self.compression)

    def read(self, entry, folder):
        turns, paths = parse_turns(entry)
        images = [self.transform(read_image(inside(folder, path))) for path in paths]
        ids, labels = encode_conversation(self.tokenizer, turns)
        visual = map(self.num_visual_tokens, images)
        lengths = itertools.accumulate(next(visual) if token == IMAGE_TOKEN else 1 for token in ids)
        kept = sum(length <= self.max_length for length in lengths)
        ids, labels = torch.tensor(ids[:kept]), torch.tensor(labels[:kept])
        if (labels == IGNORE).all():
            raise ValueError(f"its first {self.max_length} tokens hold no answer")
        return {"input_ids": ids, "labels": labels, "images": images[:int((ids == IMAGE_TOKEN).sum())]}


def scan(file):
    """Yields (first byte, last byte + 1, sample) for every element of a JSON array, one at a time in memory."""
    try:
        text = Path(file).read_bytes().decode("utf-8")
        separator, decode, ascii = re.compile(rf"{SPACE}([,\]]){SPACE}"), json.JSONDecoder().raw_decode, text.isascii()
        if not (found := re.match(rf"{SPACE}\[{SPACE}", text)):
            raise ValueError(f"it begins with {text[:20]!r} and not with [")
        at, byte, last = found.end(), found.end(), ","
        while last == ",":
            entry, end = decode(text, at)
            size = end - at if ascii else len(text[at:end].encode())
            yield byte, byte + size, entry
            if not (found := separator.match(text, end)):
                raise ValueError(f"neither , nor ] follows the sample that ends at character {end}")
            last, byte, at = found[1], byte + size + found.end() - end, found.end()
        if at != len(text):
            raise ValueError(f"more follows its end at character {at}")
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{file} is not a JSON array of samples: {error}") from None


def size_of(entry):
    """(has an image, characters said) of a sample; (False, 0) where malformed."""
    try:
        turns, paths = parse_turns(entry)
        return bool(paths), sum(len(question) + len(answer) for _, question, answer in turns)
    except ValueError:
        return False, 0


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

    The global batch is world * accumulation * micro samples of the LlavaDataset; the order of the epoch depends on
    the seed and not on how a global batch is cut. What fills no global batch is left out, other samples each epoch.
    """

    def __init__(self, dataset, micro, accumulation=1, rank=0, world=1, seed=0, grouped=32):
        self.dataset, self.micro, self.rank, self.world, self.seed = dataset, micro, rank, world, seed
        self.batch = micro * accumulation * world
        self.grouped = grouped  # global batches that are sorted by length together
        self.epoch = self.skip = 0  # skip: global batches of the first epoch already done

    def batches(self):
        """The epoch's global batches, as arrays of sample numbers (batches, batch)."""
        rng, batches = np.random.default_rng((self.seed, self.epoch)), []
        for modality in (True, False):
            indices = rng.permutation(np.flatnonzero(self.dataset.has_image == modality))
            indices = indices[:len(indices) // self.batch * self.batch]
            for start in range(0, len(indices), self.batch * self.grouped):
                pool = indices[start:start + self.batch * self.grouped]
                pool = pool[np.argsort(self.dataset.said[pool], kind="stable")]
                batches.append(pool.reshape(-1, self.batch))
        return rng.permutation(np.concatenate(batches))

    def __len__(self):
        counts = np.bincount(self.dataset.has_image, minlength=2)
        return int(sum(counts // self.batch)) * (self.batch // self.micro // self.world)

    def __iter__(self):
        for batch in self.batches()[self.skip:].tolist():
            mine = batch[self.rank::self.world]  # every rank has short and long ones
            for start in range(0, len(mine), self.micro):
                yield mine[start:start + self.micro]
