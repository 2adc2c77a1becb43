"""Pretrains the backbones of the small model, "nano", and writes them in the published layouts.

    python -m data.nano.pretrain vision      # data/nano/backbones/open_clip_model.safetensors
    python -m data.nano.pretrain llm         # data/nano/backbones/vicuna-nano/

The ConvNeXt trunk (four stages; stage 5 is new in phase 1) learns to name what covers every 8x16 pixels of a page:
its character or shape, its colour, and where its centre lies and how large it is. Unlike CLIP's pretraining this is
dense, which is what makes it short enough for two cores.

The Llama learns to look things up: in documents as plain text, and in documents as 64 vectors, one for each cell of an
8x8 grid, that a small network (the packer, thrown away afterwards) makes of the characters in the cell and where they
lie. A language model that has only seen one piece of text per position takes very long to learn that a visual token
holds several characters; this one knows, and phase 1 only has to find vectors that it reads. Its tokenizer has a piece
for each coordinate of a box: with one for each digit a box takes 24, and a model this small gets lost on the page.
"""
import argparse
import io
import itertools
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from convnext import NANO, OPENCLIP_NAMES, TRUNK, ConvNeXt, theirs
from convllava import next_token_loss, pad, splice
from data.conversation import IGNORE, IMAGE_TOKEN, SYSTEM, encode_conversation
from data.images import square
from data.nano.generate import (COLOURS, FINDING, SHAPES, caption, form, listing, lookups, make_page, note, questions,
                                receipt, shapes, table)
from data.weights import write_tensors
from llama import Llama, LlamaConfig, Tokenizer
from train import learning_rate, leave_autocast, quick_in_bf16

OUT = Path(__file__).parent / "backbones"
RESOLUTION = 512
ROWS, COLUMNS = 32, 64  # the dense labels' grid: slots of 16 pixels by 8
SYMBOLS = ["", *SHAPES, *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-/:"]
INKS = ["", *COLOURS]


class Pages(IterableDataset):
    """An endless stream of examples from one data process; subclasses say what they are."""

    def __init__(self, seed):
        self.seed = seed

    def __iter__(self):
        rng = random.Random(f"pretrain/{self.seed}")
        for index in itertools.count():
            yield self.example(rng, index)


class DensePages(Pages):
    def example(self, rng, index):
        """Pixels (3, 512, 512), symbols and inks (32, 64), places (32, 64, 4): centre offset and size, in slots."""
        page = make_page(rng, "train")
        symbols, inks = torch.zeros(ROWS, COLUMNS, dtype=torch.long), torch.zeros(ROWS, COLUMNS, dtype=torch.long)
        places = torch.zeros(ROWS, COLUMNS, 4)
        for symbol, ink, (x0, y0, x1, y1) in page.symbols():
            c0, c1 = math.ceil(x0 * COLUMNS - 0.5), math.ceil(x1 * COLUMNS - 0.5)  # slots whose centre is inside
            r0, r1 = math.ceil(y0 * ROWS - 0.5), math.ceil(y1 * ROWS - 0.5)
            c0, r0 = max(c0, 0), max(r0, 0)
            symbols[r0:r1, c0:c1], inks[r0:r1, c0:c1] = SYMBOLS.index(symbol), INKS.index(ink)
            rows = torch.arange(ROWS)[r0:r1, None] + 0.5
            columns = torch.arange(COLUMNS)[None, c0:c1] + 0.5
            places[r0:r1, c0:c1, 0] = (x0 + x1) / 2 * COLUMNS - columns
            places[r0:r1, c0:c1, 1] = (y0 + y1) / 2 * ROWS - rows
            places[r0:r1, c0:c1, 2] = (x1 - x0) * COLUMNS
            places[r0:r1, c0:c1, 3] = (y1 - y0) * ROWS
        return square(Image.open(io.BytesIO(page.jpeg())), RESOLUTION), symbols, inks, places


class DenseHead(nn.Module):
    """Reads the slots under every position of a stage's map: (B, C, H, W) -> (B, 32, 64, outputs)."""

    def __init__(self, dim, rows, columns):
        super().__init__()
        self.rows, self.columns = rows, columns  # slots per position
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, rows * columns * (len(SYMBOLS) + len(INKS) + 4))

    def forward(self, x):
        y = self.linear(self.norm(x.permute(0, 2, 3, 1)))
        b, h, w, _ = y.shape
        y = y.view(b, h, w, self.rows, self.columns, -1).permute(0, 1, 3, 2, 4, 5)  # (B, H, rows, W, columns, outputs)
        return y.reshape(b, h * self.rows, w * self.columns, -1)

    def loss(self, x, symbols, inks, places):
        outputs = self(x).float()
        symbol, ink, place = outputs.split([len(SYMBOLS), len(INKS), 4], dim=-1)
        seen = symbols > 0
        weight = torch.where(seen, 1.0, 0.15)
        named = F.cross_entropy(symbol.flatten(0, 2), symbols.flatten(), reduction="none").view_as(weight)
        named = (named * weight).sum() / weight.sum()
        inked = F.cross_entropy(ink[seen], inks[seen])
        placed = F.smooth_l1_loss(place[seen], places[seen])
        right = (symbol.argmax(-1) == symbols)[seen].float().mean()
        return named + 0.3 * inked + 0.3 * placed, (named, inked, placed, right)


def pretrain_vision(args):
    torch.manual_seed(args.seed)
    model = ConvNeXt(**NANO)
    for stage in model.stages:
        for block in stage.blocks:
            nn.init.constant_(block.gamma, 0.3)  # 1e-6 suits long schedules
    leave_autocast(model)
    heads = nn.ModuleList([DenseHead(NANO["dims"][2], 1, 2), DenseHead(NANO["dims"][3], 2, 4)])
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], betas=(0.9, 0.98), weight_decay=0.02)
    pages = iter(DataLoader(DensePages(args.seed), batch_size=16, num_workers=1, prefetch_factor=4))
    started = time.time()
    for step in (bar := tqdm(range(args.steps), "vision", mininterval=10)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, 2e-3)
        pixels, *labels = next(pages)
        with torch.autocast("cpu", torch.bfloat16, enabled=quick_in_bf16("cpu")):
            x = pixels.contiguous(memory_format=torch.channels_last)
            losses = []
            for i, stage in enumerate(model.stages):
                x = stage(x)
                if i >= 2:
                    losses.append(heads[i - 2].loss(x, *labels))
        (losses[0][0] + losses[1][0]).backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *heads.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            parts = " | ".join(" ".join(f"{v.item():.3f}" for v in parts) for _, parts in losses)
            bar.write(f"step {step} {time.time() - started:.0f}s symbols inks places right: {parts}", file=sys.stderr)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            OUT.mkdir(parents=True, exist_ok=True)
            tensors = {TRUNK + theirs(k, OPENCLIP_NAMES): v for k, v in model.state_dict().items()}
            with tempfile.TemporaryDirectory(dir=OUT) as new:  # the file before stays until this one is whole
                write_tensors(Path(new), tensors, torch.bfloat16)
                os.replace(Path(new) / "model.safetensors", OUT / "open_clip_model.safetensors")


BATCH = 24  # conversations
CELLS = 8  # per side: the visual tokens of 512 pixels
LLAMA = LlamaConfig(vocab_size=1024, hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4,
                    num_key_value_heads=4, max_position_embeddings=2048)
COORDINATES = [piece for i in range(101) for piece in (f"▁[{i / 100:.2f}", f",▁{i / 100:.2f}")]
CURRICULUM = (  # until which share of the steps: the lessons and their weights
    (0.05, {"string": 1}),
    (0.11, {"string": 1, "note": 1}),
    (0.26, {"string": 1, "note": 4, "plain": 3, "listing": 4}),
    (0.42, {"note": 1, "plain": 3, "listing": 3, "page": 6, "find": 6}),
    (0.54, {"lookup": 14, "plain": 2, "page": 2, "find": 2}),
    (1.00, {"note": 1, "plain": 3, "listing": 3, "page": 6, "find": 6, "lookup": 2}))
SHORT = {"string": 4, "note": 2}  # lessons of which a batch is this much larger


class Lessons(Pages):
    """Batches of conversations of one lesson: (its name, [(ids, labels, packed symbols or None)]).

    A curriculum: strings of random characters in a few cells; notes, of which only the rows that are written on are
    shown; lists of all that is on a page and where; pages as they are; and when those are read, look-ups of one fact
    among several in text. Only "page" has the system prompt, without which the sequences are shorter.
    """

    def __init__(self, seed, tokenizer_file, steps):
        super().__init__(seed)
        self.tokenizer_file, self.steps = tokenizer_file, steps

    def __iter__(self):
        self.tokenizer = Tokenizer(self.tokenizer_file)
        for name, examples in super().__iter__():  # four batches, by length, so that little of them is padding
            examples.sort(key=lambda example: len(example[0]) + (example[2][2] if example[2] else 0))
            size = len(examples) // 4
            for start in random.Random(len(examples[0][0])).sample(range(0, len(examples), size), 4):
                yield name, examples[start:start + size]

    def example(self, rng, index):
        weights = next(weights for until, weights in CURRICULUM if 4 * index / self.steps < until or until == 1)
        name, = rng.choices(list(weights), weights.values())
        return name, [getattr(self, name)(rng) for _ in range(4 * BATCH * SHORT.get(name, 1))]

    def string(self, rng):
        """A row of characters, each alone or with others in its cell."""
        text = "".join(rng.choice("0123456789ABCDEFGHKMNPRSTVWXYZ0123456789.-/") for _ in range(rng.randint(2, 9)))
        if rng.random() < 0.2:
            return *self.short([(0, f"{text}\nRead all of the text.", text)]), None
        width, x, y = rng.uniform(0.35, 0.6), rng.uniform(0, 1), rng.uniform(0.1, 0.9)
        centres = [x + width * (i + 0.5) for i in range(len(text))]
        indices = [(int(c), SYMBOLS.index(char), INKS.index("black"), 4 * (y > 0.5) + int(c % 1 * 4)) for c, char in
                   zip(centres, text)]
        places = [(c % 1 - 0.5, y - 0.5, width, 0.8, *(rng.random() for _ in range(4))) for c in centres]
        symbols = torch.tensor(indices), torch.tensor(places), int(centres[-1]) + rng.randint(1, 2)
        return *self.short([(1, "Read all of the text.", text)]), symbols

    def short(self, turns):
        """The encoded conversation without its system prompt."""
        ids, labels = encode_conversation(self.tokenizer, turns)
        skip = ids.index(IMAGE_TOKEN) - 3 if turns[0][0] else len(self.tokenizer.encode(SYSTEM)) + 1
        return torch.tensor(ids[skip:]), torch.tensor(labels[skip:])

    def lookup(self, rng):
        """Several questions about the same stated values: where they stand is all that tells them apart."""
        turns = lookups(rng, "train", 4, whose=0.5)
        return *self.short([(0, *turn) for turn in turns]), None

    def plain(self, rng):
        """All that can be asked about a page as plain text."""
        page = make_page(rng, "train")
        facts = [fact for fact in page.facts if fact[0] in ("read", "relation", "yes/no", "count")]
        turns = [(0, *fact[1:]) for fact in rng.sample(facts, min(14, len(facts)))]
        turns[0] = (0, "\n".join(page.lines) + "\n" + turns[0][1], turns[0][2])
        return *self.short(turns), None

    def note(self, rng):
        """A transcription or two questions about one to three lines."""
        page = make_page(rng, "train", (note,))
        turns = caption(page, rng) if rng.random() < 0.7 else [fact[1:] for fact in questions(page, rng, 2)]
        return *self.short([(int(i == 0), *turn) for i, turn in enumerate(turns)]), packed(page, crop=rng)

    def listing(self, rng):
        """Every line and where it lies."""
        page = make_page(rng, "train")
        return *self.short([(1, *turn) for turn in listing(page, rng)]), packed(page)

    def find(self, rng):
        """Which of several on a page, by its name, row, column or neighbour."""
        page = make_page(rng, "train", (receipt, form, table, table, shapes, shapes, shapes))
        turns = [fact[1:] for fact in questions(page, rng, 12, FINDING)]
        return *self.short([(int(i == 0), *turn) for i, turn in enumerate(turns)]), packed(page)

    def page(self, rng):
        """All that can be asked about a page."""
        page = make_page(rng, "train")
        turns = caption(page, rng) if rng.random() < 0.15 else []
        turns += [fact[1:] for fact in questions(page, rng, 14)]
        ids, labels = encode_conversation(self.tokenizer, [(int(i == 0), *turn) for i, turn in enumerate(turns)])
        return torch.tensor(ids), torch.tensor(labels), packed(page)


def packed(page, crop=None):
    """The symbols of a page by cell: indices (S, 4) of cell, symbol, ink, part, places (S, 8), number of cells.

    crop: a random generator; then only the rows of cells with symbols, and perhaps their neighbours, are kept.
    """
    indices, places = [], []  # a place: centre within the cell and size, in cells; the box on the page, in 0 to 1
    for symbol, ink, box in page.symbols():
        x0, y0, x1, y1 = (v * CELLS for v in box)
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        if symbol in SHAPES:  # a shape is seen in every cell that it touches, a character in its centre's
            cells = [(r, c) for r in range(int(y0), int(y1) + 1) for c in range(int(x0), int(x1) + 1)]
        else:
            cells = [(int(y), int(x))]
        for r, c in cells:
            if 0 <= r < CELLS and 0 <= c < CELLS:
                part = 4 * (y - r > 0.5) + min(3, max(0, int((x - c) * 4)))
                indices.append((r * CELLS + c, SYMBOLS.index(symbol), INKS.index(ink), part))
                places.append((x - c - 0.5, y - r - 0.5, x1 - x0, y1 - y0, *box))
    indices, last = torch.tensor(indices), CELLS
    if crop:
        rows = indices[:, 0] // CELLS
        first = max(0, rows.min().item() - crop.randint(0, 1))
        last = min(CELLS, rows.max().item() + 1 + crop.randint(0, 1))
        indices[:, 0] -= first * CELLS
        last -= first
    return indices, torch.tensor(places), last * CELLS


class Packer(nn.Module):
    """Packed pages -> for each (cells, dim): a vector for each cell, in eight parts, one for each 16x32 pixels."""

    def __init__(self, dim):
        super().__init__()
        part = dim // 8
        self.symbol, self.ink = nn.Embedding(len(SYMBOLS), part), nn.Embedding(len(INKS), part)
        self.place = nn.Linear(40, part)
        for module in (self.symbol, self.ink):
            nn.init.normal_(module.weight, std=1.0)  # at a tenth of this, nothing is read for a long time

    def forward(self, pages):
        indices, places, counts = zip(*pages)
        starts = torch.tensor([0, *itertools.accumulate(counts)])
        parts = torch.cat([(i[:, 0] + start) * 8 + i[:, 3] for i, start in zip(indices, starts)])
        indices, places = torch.cat(indices), torch.cat(places)
        noise = 0.01 * torch.randn(len(places), 4)
        within, box = places[:, :4] + noise, places[:, 4:] + noise / CELLS
        scaled = torch.cat([within * 2, within * 8, box * 2, box * 8, box * 24], dim=-1)
        waves = torch.cat([scaled.sin(), scaled.cos()], dim=-1)  # (S, 40)
        each = (self.symbol(indices[:, 1]) + self.ink(indices[:, 2]) + 2 * self.place(waves)).float()
        cells = each.new_zeros(8 * sum(counts), each.shape[-1]).index_add(0, parts, each).view(sum(counts), -1)
        return (cells + 0.2 * torch.randn_like(cells)).split(counts)


def train_tokenizer(path, seed):
    """A SentencePiece model like Llama's (BPE, digits apart, byte fallback), on the text of conversations."""
    rng = random.Random(f"tokenizer/{seed}")
    lines = []
    for _ in range(6000):
        page = make_page(rng, "train")
        turns = [*caption(page, rng), *listing(page, rng), *lookups(rng, "train", 1)]
        turns += [fact[1:] for fact in questions(page, rng, 3)]
        lines += [part for question, answer in turns for part in (f"USER: {question} ASSISTANT:", *answer.split("\n"))]
    lines += [SYSTEM] * 2000
    with open(path, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=LLAMA.vocab_size, model_type="bpe",
            split_digits=True, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            character_coverage=1.0, user_defined_symbols=COORDINATES, minloglevel=2)


@torch.no_grad()
def answers_right(llama, hidden, targets):
    """The share of answers of which every token is the likeliest: greedy decoding would say them."""
    labelled = targets[:, 1:] != IGNORE
    wrong = torch.zeros_like(labelled)
    wrong[labelled] = llama.lm_head(hidden[:, :-1][labelled].float()).argmax(-1) != targets[:, 1:][labelled]
    number = (labelled & ~F.pad(labelled, (1, 0))[:, :-1]).flatten().cumsum(0)[labelled.flatten()]  # of its answer
    return 1 - len(number[wrong[labelled]].unique()) / number.max().item()


def pretrain_llm(args):
    torch.manual_seed(args.seed)
    scratch = tempfile.TemporaryDirectory()  # the backbone's tokenizer changes with its weights
    tokenizer_file = Path(scratch.name) / "tokenizer.model"
    train_tokenizer(tokenizer_file, args.seed)
    tokenizer, llama, packer = Tokenizer(tokenizer_file), Llama(LLAMA), Packer(LLAMA.hidden_size)
    llama.init_weights(std=0.06)  # about one over the root of this small width
    nn.init.normal_(llama.embed_tokens.weight, std=1.0)  # as large as the packer's vectors
    llama.embed_tokens.weight.data += torch.randn(LLAMA.hidden_size)  # and what is text can be told from what is seen
    for layer in llama.layers:  # at first a position holds what stands there and nothing else
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    leave_autocast(llama)
    matrices = [p for p in llama.layers.parameters() if p.ndim == 2]
    others = [p for p in [*llama.parameters(), *packer.parameters()] if not any(p is matrix for matrix in matrices)]
    optimizers = (torch.optim.Muon(matrices, weight_decay=0.02),  # looks things up after fewer steps than with AdamW
                  torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.02))
    lessons = Lessons(args.seed, tokenizer_file, args.steps)
    batches, started = iter(DataLoader(lessons, batch_size=None, num_workers=1, prefetch_factor=8)), time.time()
    for step in (bar := tqdm(range(args.steps), "llm", mininterval=10)):
        for optimizer, lr in zip(optimizers, (2e-2, 4e-3)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, lr)
        lesson, batch = next(batches)
        ids, labels, symbols = zip(*batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=quick_in_bf16("cpu")):
            cells = packer(drawn) if (drawn := [page for page in symbols if page is not None]) else []
            embeds, answers = splice(llama.embed_tokens, ids, cells, labels)
            # where there is no page, all of the text is learnt and not only the answers
            targets = [answer if page is not None else text for text, answer, page in zip(ids, answers, symbols)]
            hidden, answers, targets = llama.hidden(pad(embeds)), pad(answers, IGNORE), pad(targets, IGNORE)
            loss = next_token_loss(llama, hidden, targets)
        loss.backward()
        nn.utils.clip_grad_norm_([*matrices, *others], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0:
            bar.write(f"step {step} {time.time() - started:.0f}s {lesson} loss {loss.item():.3f} "
                      f"answers right {answers_right(llama, hidden, answers):.3f}", file=sys.stderr)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            llama.save_pretrained(OUT / "vicuna-nano", torch.bfloat16, tokenizer)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone", choices=("vision", "llm"))
    parser.add_argument("--steps", type=int, help="default: 1,200 for vision, 5,000 for llm")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.backbone == "llm" and not hasattr(torch.optim, "Muon"):
        parser.error("this torch has no Muon: the language model is pretrained with torch 2.9 or newer")
    pretrain, steps = {"vision": (pretrain_vision, 1200), "llm": (pretrain_llm, 5000)}[args.backbone]
    args.steps = steps if args.steps is None else args.steps
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}: it should be at least 1")
    if not 0 <= args.seed < 2 ** 32:
        parser.error(f"--seed is {args.seed}: take 0 to {2 ** 32 - 1}")
    try:
        pretrain(args)
    except OSError as error:
        print(f"data.nano.pretrain: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
