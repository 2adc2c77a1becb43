"""LLaVA-format data: mixtures of files, the dataset, the sampler and the stream of micro-batches."""
import json
import os
import re
import signal
import traceback
import zlib
from array import array
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.conversation import IGNORE, IMAGE_TOKEN, encode_conversation, parse_turns
from data.errors import data_process_fault
from data.images import read_image
from data.states import all_sum
from data.weights import read_json

TIMEOUT = 300  # seconds to wait for a data process
MALFORMED = -1  # in place of a sample's length
MAX_NAMED = 20  # malformed samples whose fault is told
SPACE = r"[ \t\r\n]*"  # JSON's


def read_mixture(file):
    """The (annotation file, image folder) pairs that a mixture names, relative to the mixture's folder."""
    pairs = []
    for i, part in enumerate(read_json(file, list)):
        if not isinstance(part, dict) or not all(isinstance(part.get(key), str) for key in ("annotations", "images")):
            raise ValueError(f'{file}, part {i}: expected {{"annotations": file, "images": folder}}; to train on a '
                             "LLaVA-format file itself, give its folder with --images")
        pairs.append((Path(file).parent / part["annotations"], Path(file).parent / part["images"]))
    return pairs


def find_sources(files, folders=None):
    """The (annotation file, image folder) pairs of LLaVA-format files and their folders, or else of mixtures."""
    if not files:
        return []
    if not folders:
        return [pair for mixture in files for pair in read_mixture(mixture)]
    if len(folders) != len(files):
        raise ValueError("--images needs one folder for each file in --data")
    return list(zip(files, folders))


def find_validation(file, folders):
    """The (annotation file, image folder) pair to validate on, None without a file; the first folder has its images."""
    if not file:
        return None
    if not folders:
        raise ValueError("--val needs --images, the folder of its images")
    if not Path(file).is_file():
        raise ValueError(f"there is no file of validation questions at {file}")
    return file, folders[0]


class LlavaDataset(Dataset):
    """One or several (annotation file, image folder) pairs as one dataset of tokenised conversations.

    Items: input_ids and labels (T,), images [(3, H, W)], unreadable [sentences]. If a sample cannot be read, the
    dataset returns another one that can and reports in `unreadable` which was skipped.

    compression: pixels along the side of a visual token; max_length: tokens after which a sample is cut, visual tokens
    counted. Of each sample only its place in its file is kept in memory, 40 bytes.
    """

    def __init__(self, sources, tokenizer, compression, max_length, transform):
        self.tokenizer, self.transform = tokenizer, transform
        self.compression, self.max_length = compression, max_length
        self.sources = [(Path(file), Path(folder)) for file, folder in sources]
        self.digest = 0  # of the files, by which a resumed run knows that they are the same
        self.malformed = []  # a sentence for each of the first malformed samples

        # of each sample: its file, the bytes of its JSON there, whether it has images, and its length in characters
        columns = [array("q") for _ in range(5)]
        for number, (file, folder) in enumerate(self.sources):
            if not folder.is_dir():
                raise ValueError(f"there is no image folder at {folder}")
            for index, (start, end, entry) in enumerate(scan(file)):
                has_image, length = self.measure(entry, f"{file}, sample {index}")
                for column, value in zip(columns, (number, start, end, has_image, length)):
                    column.append(value)
            self.digest = zlib.crc32(file.read_bytes(), self.digest)
        self.source, self.start, self.end, self.has_image, self.length = (
            np.frombuffer(column, np.int64) for column in columns)

    def measure(self, entry, name):
        """(whether it has images, characters of its conversation) of a sample; (False, MALFORMED) where it has none."""
        try:
            turns, paths = parse_turns(entry)
        except ValueError as error:
            if len(self.malformed) < MAX_NAMED:
                self.malformed.append(f"{name}: {error}")
            return False, MALFORMED
        return bool(paths), sum(len(question) + len(answer) for _, question, answer in turns)

    @property
    def num_malformed(self):
        return int((self.length == MALFORMED).sum())

    def __len__(self):
        return len(self.source)

    def entry(self, index):
        """A sample's JSON object, its image folder, and its name for messages."""
        file, folder = self.sources[self.source[index]]
        number_in_file = index - int(np.searchsorted(self.source, self.source[index]))
        with open(file, "rb") as opened:
            opened.seek(self.start[index])
            text = opened.read(self.end[index] - self.start[index])
        try:
            return json.loads(text), folder, f"{file}, sample {number_in_file}"
        except ValueError:
            raise ValueError(f"{file} has been changed since it was opened: begin anew") from None

    def __getitem__(self, index):
        unreadable = []
        for attempt in range(100):
            # Each attempt jumps further, as samples of one missing image folder are neighbours in their file.
            entry, folder, name = self.entry((index + attempt ** 3) % len(self))
            try:
                return self.read(entry, folder) | {"unreadable": unreadable}
            except ValueError as error:
                if not unreadable:  # that a replacement is unreadable too is reported when its own turn comes
                    unreadable = [f"{name}: {error}"]
        raise ValueError(f"no sample can be read from here on: {unreadable[0]}")

    def num_visual_tokens(self, image):
        """How many visual tokens a (3, H, W) image becomes; the encoder leaves out pixels beyond a multiple."""
        return (image.shape[1] // self.compression) * (image.shape[2] // self.compression)

    def read(self, entry, folder):
        """A sample's JSON object -> its item. Raises ValueError where it or its images cannot be read."""
        turns, paths = parse_turns(entry)
        images = [self.transform(read_image(inside(folder, path))) for path in paths]
        ids, labels = encode_conversation(self.tokenizer, turns)

        # cut at the length that the language model will see, where an image counts with its visual tokens
        num_visual = iter([self.num_visual_tokens(image) for image in images])
        length = num_ids = 0
        for token in ids:
            length += next(num_visual) if token == IMAGE_TOKEN else 1
            if length <= self.max_length:
                num_ids += 1
        ids, labels = torch.tensor(ids[:num_ids]), torch.tensor(labels[:num_ids])
        if (labels == IGNORE).all():
            raise ValueError(f"its first {self.max_length} tokens hold no answer")
        num_images = int((ids == IMAGE_TOKEN).sum())
        return {"input_ids": ids, "labels": labels, "images": images[:num_images]}


def scan(file):
    """Yields (first byte, last byte + 1, sample) for every element of a JSON array.

    The file's text is held while this goes on, but only one parsed sample at a time.
    """
    try:
        if Path(file).exists() and not Path(file).is_file():
            raise OSError("it is a folder, a pipe or a device")
        text = Path(file).read_bytes().decode("utf-8")
        decode = json.JSONDecoder().raw_decode
        separator = re.compile(rf"{SPACE}([,\]]){SPACE}")
        opening = re.match(rf"{SPACE}\[{SPACE}", text)
        if not opening:
            raise ValueError(f"it begins with {text[:20]!r} and not with [")

        # `char` and `byte` are the same place: they differ where a character takes several bytes
        is_ascii = text.isascii()
        char = byte = opening.end()
        while True:
            entry, end = decode(text, char)
            size = end - char if is_ascii else len(text[char:end].encode())
            yield byte, byte + size, entry

            follows = separator.match(text, end)
            if not follows:
                raise ValueError(f"neither , nor ] follows the sample that ends at character {end}")
            byte += size + follows.end() - end
            char = follows.end()
            if follows[1] == "]":
                break
        if char != len(text):
            raise ValueError(f"more follows its end at character {char}")
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{file} is not a JSON array of samples: {error}") from None


def inside(folder, path):
    """The path below its folder. One whose words leave the folder is refused; what is a link there may lead out."""
    if Path(path).is_absolute() or os.path.normpath(path).startswith(".."):
        raise ValueError(f"the image path {path!r} leaves its folder {folder}")
    return folder / path


class MicroBatchSampler(Sampler):
    """The micro-batches of one process, as lists of sample numbers: its share of random global batches.

    A global batch is a random draw of samples that all have images or all have none, but for an epoch's last ones. Only
    inside of it samples are sorted by length, so that a micro-batch has little padding. LLaVA's Trainer does the same:
    batches of one length would make the number of labels, and so the weight of a single label, vary from step to step.

    An epoch has ceil(samples / batch) global batches. What fills no batch of its modality comes last, both modalities
    shuffled together, and the last batch is filled up with samples drawn again. The order depends on the seed and the
    epoch, not on how many processes and micro-batches share a global batch.
    """

    def __init__(self, dataset, batch, micro_batch, rank=0, world=1, seed=0):
        self.dataset, self.batch, self.micro_batch = dataset, batch, micro_batch
        self.rank, self.world, self.seed = rank, world, seed
        if self.batches_per_epoch == 0:
            raise ValueError(f"no sample can be read: {dataset.malformed[0]}")
        self.start_at(0)

    def start_at(self, step):
        """Goes on behind so many global batches."""
        self.epoch, self.skip = divmod(step, self.batches_per_epoch)

    def global_batches(self):
        """The epoch's global batches: sample numbers (batches, batch), each row sorted by length."""
        rng = np.random.default_rng((self.seed, self.epoch))
        readable = self.dataset.length != MALFORMED
        has_image = self.dataset.has_image.astype(bool)

        # batches of one modality, in random order
        full, remainder = [], []
        for modality in (has_image, ~has_image):
            samples = rng.permutation(np.flatnonzero(modality & readable))
            num_full = len(samples) // self.batch * self.batch
            full.append(samples[:num_full].reshape(-1, self.batch))
            remainder.append(samples[num_full:])
        full = rng.permutation(np.concatenate(full))

        # batches of what is left over
        remainder = rng.permutation(np.concatenate(remainder))
        num_missing = -len(remainder) % self.batch
        again = rng.choice(np.flatnonzero(readable), num_missing)
        remainder = np.concatenate([remainder, again]).reshape(-1, self.batch)

        batches = np.concatenate([full, remainder])
        order = np.argsort(self.dataset.length[batches], axis=1, kind="stable")
        return np.take_along_axis(batches, order, axis=1)

    @property
    def batches_per_epoch(self):
        num_readable = int((self.dataset.length != MALFORMED).sum())
        return -(-num_readable // self.batch)  # rounded up

    def __iter__(self):
        for batch in self.global_batches()[self.skip:].tolist():
            share = batch[self.rank::self.world]  # short and long samples for every process
            for start in range(0, len(share), self.micro_batch):
                yield share[start:start + self.micro_batch]


def micro_batches(dataset, sampler, step, workers, pin_memory):
    """The sampler's micro-batches without end, epoch after epoch, from those of the given step on."""
    sampler.start_at(step)
    while True:
        # A generator of its own, so that the loader takes none of the random numbers of the model.
        generator = torch.Generator().manual_seed(sampler.seed + sampler.epoch)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers,
                            pin_memory=pin_memory, worker_init_fn=ignore_signals, generator=generator,
                            timeout=TIMEOUT if workers else 0)
        try:
            yield from loader
        except Exception as error:
            # The error's frames hold the data processes, which would then not end, and Python would wait for them.
            traceback.clear_frames(error.__traceback__)
            raise
        sampler.epoch, sampler.skip = sampler.epoch + 1, 0


def take(batches, count, log):
    """This process's next micro-batches; then, of all processes, the labels, the unreadable samples and a fault.

    The fault, or "", is that a data process of any process was lost. log: a states.Log, which names unreadable samples.
    """
    micros, fault = [], ""
    try:
        micros = [next(batches) for _ in range(count)]
    except (RuntimeError, ConnectionError, EOFError) as error:
        fault = data_process_fault(error)
        if not fault:
            raise
    unreadable = [sentence for micro in micros for sentence in micro["unreadable"]]
    log.report(unreadable)
    num_labels = sum(micro["num_labels"] for micro in micros)
    num_labels, num_unreadable, num_faults = all_sum([num_labels, len(unreadable), int(fault != "")])
    if num_faults and not fault:
        fault = "another process has lost a data process"
    return micros, num_labels, num_unreadable, fault


def ignore_signals(worker):
    """Leaves signals to stop to the training process, which saves and then ends its data processes."""
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, signal.SIG_IGN)


def shape_only(image, resolution):
    """In place of `square`, where an image has to be read and nothing but its shape is needed."""
    return torch.empty(3, resolution, resolution, device="meta")


def collate(items):
    """A batch of ragged lists, in sample order: the model pads when it has spliced the visual tokens in."""
    batch = {key: [item[key] for item in items] for key in ("input_ids", "labels")}
    for key in ("images", "unreadable"):
        batch[key] = [value for item in items for value in item[key]]
    # a sample's first token is predicted from nothing, so it has no loss
    batch["num_labels"] = sum(int((item["labels"][1:] != IGNORE).sum()) for item in items)
    return batch
