"""Pretrains the backbones of the small model and writes them in the published layouts.

    python -m data.nano.pretrain vision      # data/nano/backbones/open_clip_model.safetensors
    python -m data.nano.pretrain llm         # data/nano/backbones/vicuna-nano/
    python -m data.nano.pretrain llm --resume     # goes on where a run was stopped

They stand in for CLIP's ConvNeXt and for Vicuna, from which phase 1 starts at full size.

vision: a ConvNeXt of four stages (phase 1 adds stage 5) learns to name what covers every 8x16
pixels of a page: the character or shape, its colour, its centre and its size. An image has 2,048
such labels, and one caption in CLIP's pretraining. So this is short enough for two cores.

llm: a Llama learns to look things up in documents. It reads a document as text, or as 64 vectors,
one for each cell of an 8x8 grid, as it will read 64 visual tokens later. A small network, the
packer, makes the vector of a cell from the characters in it and their positions. It is thrown away
at the end. A language model that has only read text, one piece at each position, takes very long to
learn that a visual token holds several characters. This one knows it already, so that phase 1 only
has to find vectors that it can read.

The Llama's tokenizer has one piece for each coordinate of a box. With a piece for each digit a box
would take 24 tokens instead of 5, and a model this small gets lost in so many.
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
from typing import NamedTuple

import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from convllava import next_token_loss, pad, splice
from convnext import NANO, OPENCLIP_NAMES, TRUNK, ConvNeXt, published_name
from data.conversation import IGNORE, SYSTEM, Tokenizer, encode_conversation
from data.images import square
from data.nano.generate import (COLOURS, SHAPES, caption, form, listing, lookups,
                                make_page, note, questions, receipt, shapes, table, turns_of)
from data.weights import write_tensors
from llama import Llama, LlamaConfig
from train import faster_dtype, learning_rate

OUT = Path(__file__).parent / "backbones"
SAVE_EVERY = 100  # steps
SYMBOLS = ["", *SHAPES,  # "": nothing
           *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-/:"]
INKS = ["", *COLOURS, "white"]


class Pages(IterableDataset):
    """An endless stream of examples from one data process. A subclass says what an example is.

    start: the number of the first example, where a run goes on.
    """

    def __init__(self, seed, start=0):
        self.seed, self.start = seed, start

    def __iter__(self):
        for index in itertools.count(self.start):
            yield self.example(random.Random(f"pretrain/{self.seed}/{index}"), index)


class State:
    """What a stopped run needs to go on, in a file: the steps done and the states of its parts.

    parts: the modules and optimizers. torch's random generator and the type to compute in are saved too.
    """

    def __init__(self, file, settings, parts):
        self.file, self.settings, self.parts = file, settings, parts
        self.bf16 = faster_dtype("cpu") == "bf16"

    def save(self, step):
        states = [part.state_dict() for part in self.parts]
        contents = {"settings": self.settings, "step": step, "states": states,
                    "bf16": self.bf16, "rng": torch.get_rng_state()}
        unfinished = self.file.with_name(f"{self.file.name}.{os.getpid()}.tmp")
        torch.save(contents, unfinished)
        unfinished.replace(self.file)

    def load(self):
        """The number of steps done."""
        if not self.file.is_file():
            raise ValueError(f"{self.file} is not there: start without --resume")
        contents = torch.load(self.file, weights_only=True)
        if contents["settings"] != self.settings:
            raise ValueError(f"{self.file} is of a run with {contents['settings']}, and this one has "
                             f"{self.settings}: start with the same, or without --resume")
        for part, state in zip(self.parts, contents["states"]):
            part.load_state_dict(state)
        torch.set_rng_state(contents["rng"])
        self.bf16 = contents["bf16"]
        return contents["step"]

    def remove(self):
        self.file.unlink()


def set_learning_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


# ---- The vision backbone ----

RESOLUTION = 512
PAGES = 16  # of a step
ROWS, COLUMNS = 32, 64  # labels of a page: one for each slot of 16 pixels in height and 8 in width


class DensePages(Pages):
    """Pages and what covers the centre of each of their slots."""

    def example(self, rng, index):
        """Pixels (3, 512, 512), symbols and inks (32, 64), places (32, 64, 4).

        A place is the way from the slot's centre to the symbol's (x, y) and the symbol's width and
        height, in slots.
        """
        page = make_page(rng, "train")
        symbols = torch.zeros(ROWS, COLUMNS, dtype=torch.long)
        inks = torch.zeros_like(symbols)
        places = torch.zeros(ROWS, COLUMNS, 4)
        slot_y = torch.arange(ROWS)[:, None] + 0.5  # centres
        slot_x = torch.arange(COLUMNS) + 0.5
        for symbol, ink, (x1, y1, x2, y2) in page.symbols():
            # The box in slots, and the slots whose centres are in it
            left, top, right, bottom = x1 * COLUMNS, y1 * ROWS, x2 * COLUMNS, y2 * ROWS
            rows = slice(max(0, math.ceil(top - 0.5)), math.ceil(bottom - 0.5))
            columns = slice(max(0, math.ceil(left - 0.5)), math.ceil(right - 0.5))

            symbols[rows, columns] = SYMBOLS.index(symbol)
            inks[rows, columns] = INKS.index(ink)
            places[rows, columns, 0] = (left + right) / 2 - slot_x[columns]
            places[rows, columns, 1] = (top + bottom) / 2 - slot_y[rows]
            places[rows, columns, 2] = right - left
            places[rows, columns, 3] = bottom - top
        pixels = square(Image.open(io.BytesIO(page.jpeg())), RESOLUTION)
        return pixels, symbols, inks, places


class DenseHead(nn.Module):
    """Predicts symbol, ink and place of each slot; a position of the map covers rows x columns."""

    def __init__(self, dim, rows, columns):
        super().__init__()
        self.rows, self.columns = rows, columns
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, rows * columns * (len(SYMBOLS) + len(INKS) + 4))

    def forward(self, x):
        """(B, C, H, W) -> (B, 32, 64, outputs)"""
        x = self.linear(self.norm(x.permute(0, 2, 3, 1)))  # (B, H, W, rows * columns * outputs)
        b, h, w, _ = x.shape
        x = x.view(b, h, w, self.rows, self.columns, -1)
        x = x.permute(0, 1, 3, 2, 4, 5)  # (B, H, rows, W, columns, outputs)
        return x.reshape(b, h * self.rows, w * self.columns, -1)

    def loss(self, x, symbols, inks, places):
        """The loss, and for the log its three parts and the share of symbols that are right."""
        outputs = self(x).float()
        symbol_logits, ink_logits, offsets = outputs.split([len(SYMBOLS), len(INKS), 4], dim=-1)

        # Empty slots count less: they are most of a page, and easy
        covered = symbols > 0  # (B, 32, 64)
        weights = torch.where(covered, 1.0, 0.15)
        losses = F.cross_entropy(symbol_logits.flatten(0, 2), symbols.flatten(), reduction="none")
        symbol_loss = (losses.view_as(weights) * weights).sum() / weights.sum()

        # An empty slot has no ink and no place
        ink_loss = F.cross_entropy(ink_logits[covered], inks[covered])
        place_loss = F.smooth_l1_loss(offsets[covered], places[covered])

        right = (symbol_logits.argmax(-1) == symbols)[covered].float().mean()
        loss = symbol_loss + 0.3 * ink_loss + 0.3 * place_loss
        return loss, (symbol_loss, ink_loss, place_loss, right)


def save_trunk(model):
    """Writes the ConvNeXt as an OpenCLIP file. An older one stays until the new one is complete."""
    OUT.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict().items()
    tensors = {TRUNK + published_name(name, OPENCLIP_NAMES): value for name, value in tensors}
    with tempfile.TemporaryDirectory(dir=OUT) as folder:
        write_tensors(Path(folder), tensors, torch.bfloat16)
        os.replace(Path(folder) / "model.safetensors", OUT / "open_clip_model.safetensors")


def pretrain_vision(args):
    """Trains args.steps steps from args.seed; writes the trunk every 100 steps and at the end."""
    # The model. Layer scales of 1e-6 suit much longer schedules.
    torch.manual_seed(args.seed)
    model = ConvNeXt(**NANO)
    for stage in model.stages:
        for block in stage.blocks:
            nn.init.constant_(block.gamma, 0.3)

    # A head for stage 3, whose positions cover 16 x 16 pixels, and one for stage 4, 32 x 32 pixels
    heads = nn.ModuleList([DenseHead(NANO["dims"][2], 1, 2), DenseHead(NANO["dims"][3], 2, 4)])
    trained = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.02)
    settings = {"seed": args.seed, "steps": args.steps}
    state = State(OUT / "vision.state", settings, [model, heads, optimizer])
    first_step = state.load() if args.resume else 0
    pages = DensePages(args.seed, PAGES * first_step)
    batches = iter(DataLoader(pages, batch_size=PAGES, num_workers=1, prefetch_factor=4))

    started = time.time()
    bar = tqdm(range(first_step, args.steps), "vision", args.steps, initial=first_step, mininterval=10)
    for step in bar:
        # Forward, backward, step
        set_learning_rate(optimizer, learning_rate(step, args.steps, 2e-3))
        pixels, *labels = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=state.bf16):
            x = pixels.contiguous(memory_format=torch.channels_last)
            maps = []
            for stage in model.stages:
                x = stage(x)
                maps.append(x)
            results = [head.loss(x, *labels) for head, x in zip(heads, maps[2:])]
        sum(loss for loss, _ in results).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

        # Log and save
        if step % 25 == 0:
            seconds = time.time() - started
            numbers = " | ".join(" ".join(f"{part:.3f}" for part in parts) for _, parts in results)
            line = f"step {step} {seconds:.0f}s symbols inks places right: {numbers}"
            bar.write(line, file=sys.stderr)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            save_trunk(model)
            state.save(step + 1)
    state.remove()


# ---- The language model: what it reads ----

CELLS = 8  # in each direction: 64 cells are the visual tokens of 512 pixels
LLAMA = LlamaConfig(vocab_size=1024, hidden_size=192, intermediate_size=512, num_hidden_layers=5,
                    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048)
COORDINATES = [piece for i in range(101) for piece in (f"▁[{i / 100:.2f}", f",▁{i / 100:.2f}")]


class PackedPage(NamedTuple):
    """The symbols of a page, each assigned to the cell that holds it."""
    indices: torch.Tensor  # (S, 4): cell, symbol, ink, part of the cell
    places: torch.Tensor  # (S, 8): offset from the cell's centre and size, in cells; box on the page
    num_cells: int


class Example(NamedTuple):
    """A conversation as token ids and labels, both (T,), and the page that it is about."""
    ids: torch.Tensor
    labels: torch.Tensor
    page: PackedPage | None  # None: the conversation is only text

    @property
    def length(self):
        """Positions, with the page's cells."""
        return len(self.ids) + (self.page.num_cells if self.page else 0)


def part_of_cell(x, y):
    """Which of a cell's 8 parts, 2 rows of 4, a point is in. x, y: from the cell's corner, 0 to 1."""
    return 4 * (y > 0.5) + min(3, max(0, int(x * 4)))


def packed(page, crop=None):
    """A page as the packer takes it.

    crop: a random generator. With it, the empty rows of cells above and below the symbols are left
    out, except perhaps one on each side.
    """
    indices, places = [], []
    for symbol, ink, box in page.symbols():
        # Its box and centre, in cells
        left, top, right, bottom = (v * CELLS for v in box)
        x, y = (left + right) / 2, (top + bottom) / 2

        # A character is in the cell of its centre, a shape in all cells that it touches
        rows, columns = [int(y)], [int(x)]
        if symbol in SHAPES:
            rows, columns = range(int(top), int(bottom) + 1), range(int(left), int(right) + 1)
        for row, column in itertools.product(rows, columns):
            if 0 <= row < CELLS and 0 <= column < CELLS:
                part = part_of_cell(x - column, y - row)
                cell = row * CELLS + column
                indices.append((cell, SYMBOLS.index(symbol), INKS.index(ink), part))
                places.append((x - column - 0.5, y - row - 0.5, right - left, bottom - top, *box))
    indices, places = torch.tensor(indices), torch.tensor(places)

    # The rows of cells that stay
    first, end = 0, CELLS
    if crop:
        rows = indices[:, 0] // CELLS
        first = max(0, rows.min().item() - crop.randint(0, 1))
        end = min(CELLS, rows.max().item() + 1 + crop.randint(0, 1))
        indices[:, 0] -= first * CELLS
    return PackedPage(indices, places, (end - first) * CELLS)


class Packer(nn.Module):
    """Packed pages -> for each (cells, dim): one vector per cell, in the place of a visual token.

    A vector consists of eight pieces, one for each part of the cell. A piece is a sum over the
    symbols in its part: what they are, in which ink, and where they lie.
    """

    def __init__(self, dim):
        super().__init__()
        self.symbol = nn.Embedding(len(SYMBOLS), dim // 8)
        self.ink = nn.Embedding(len(INKS), dim // 8)
        self.place = nn.Linear(40, dim // 8)
        for embedding in (self.symbol, self.ink):
            # with 0.1 it takes a long time until the Llama reads anything
            nn.init.normal_(embedding.weight, std=1.0)

    def forward(self, pages):
        # Number the cells of all pages together; cell n has the parts 8n to 8n + 7
        indices, places, num_cells = zip(*pages)
        *starts, total = itertools.accumulate(num_cells, initial=0)
        parts = torch.cat([(i[:, 0] + start) * 8 + i[:, 3] for i, start in zip(indices, starts)])
        indices, places = torch.cat(indices), torch.cat(places)  # (S, 4), (S, 8)

        # Noise, so that the Llama gets used to vectors that are not exact
        noise = 0.01 * torch.randn(len(places), 4)
        in_cell, on_page = places[:, :4] + noise, places[:, 4:] + noise / CELLS

        # Where a symbol lies, as waves of several lengths
        scaled = [in_cell * 2, in_cell * 8, on_page * 2, on_page * 8, on_page * 24]
        scaled = torch.cat(scaled, dim=-1)  # (S, 20)
        waves = torch.cat([scaled.sin(), scaled.cos()], dim=-1)  # (S, 40)

        # Symbols -> parts -> cells
        symbols = self.symbol(indices[:, 1]) + self.ink(indices[:, 2]) + 2 * self.place(waves)
        symbols = symbols.float()  # (S, dim / 8)
        cells = symbols.new_zeros(8 * total, symbols.shape[-1]).index_add(0, parts, symbols)
        cells = cells.view(total, -1)  # (cells * 8, dim / 8) -> (cells, dim)
        return (cells + 0.2 * torch.randn_like(cells)).split(num_cells)


# ---- The language model: its lessons ----

BATCH = 24  # conversations
LARGER_BATCHES = {"string": 4, "note": 2}  # the factor for lessons whose conversations are short
FINDING = {"read": 3, "box": 2, "relation": 5, "colour": 1}  # of the lesson "find"
CURRICULUM = (  # its parts: at which share of the steps each ends, its lessons and their weights
    (0.05, {"string": 1}),
    (0.11, {"string": 1, "note": 1}),
    (0.26, {"string": 1, "note": 4, "plain": 3, "listing": 4}),
    (0.42, {"note": 1, "plain": 3, "listing": 3, "page": 6, "find": 6}),
    (0.54, {"lookup": 14, "plain": 2, "page": 2, "find": 2}),
    (1.00, {"note": 1, "plain": 3, "listing": 3, "page": 6, "find": 6, "lookup": 2}))


class Lessons(Pages):
    """Batches of one lesson each: (its name, [Example]). A lesson is the method of that name.

    The curriculum begins with strings of random characters in a few cells. Then come notes, lists
    of all that is on a page and where, and questions about pages. When the model can read pages, it
    learns to look up one of several facts in text. Only "page" has the system prompt: without it
    the sequences are shorter.
    """

    def __init__(self, seed, tokenizer_file, steps, start=0):
        super().__init__(seed, start)
        self.tokenizer_file, self.steps = tokenizer_file, steps

    def __iter__(self):
        self.tokenizer = Tokenizer(self.tokenizer_file)
        for lesson, examples in super().__iter__():
            # Four batches of similar lengths, so that little of each is padding, in random order
            examples.sort(key=lambda example: example.length)
            size = len(examples) // 4
            order = random.Random(len(examples[0].ids))  # any seed would do
            for start in order.sample(range(0, len(examples), size), 4):
                yield lesson, examples[start:start + size]

    def example(self, rng, index):
        """The examples of four batches, for four steps."""
        progress = 4 * index / self.steps  # above 1 at the end, as the data process works ahead
        weights = next(weights for end, weights in CURRICULUM if progress < end or end == 1)
        lesson, = rng.choices(list(weights), weights.values())
        draw = getattr(self, lesson)
        return lesson, [draw(rng) for _ in range(4 * BATCH * LARGER_BATCHES.get(lesson, 1))]

    def encode(self, turns, page=None, system=False):
        """An Example from turns (question, answer), the first of which shows the packed page."""
        num_images = 0 if page is None else 1
        turns = [(num_images if i == 0 else 0, *turn) for i, turn in enumerate(turns)]
        ids, labels = encode_conversation(self.tokenizer, turns)
        if not system:
            start = 1 + len(self.tokenizer.encode(SYSTEM))  # with the <s> before it
            ids, labels = ids[start:], labels[start:]
        return Example(torch.tensor(ids), torch.tensor(labels), page)

    def string(self, rng):
        """A row of random characters, two or three to a cell, or sometimes as text."""
        characters = "0123456789ABCDEFGHKMNPRSTVWXYZ0123456789.-/"  # digits are twice as frequent
        text = "".join(rng.choice(characters) for _ in range(rng.randint(2, 9)))
        if rng.random() < 0.2:
            return self.encode([(f"{text}\nRead all of the text.", text)])

        width = rng.uniform(0.35, 0.6)  # of a character, in cells
        x, y = rng.uniform(0, 1), rng.uniform(0.1, 0.9)  # of the row's left end in the first cell
        indices, places = [], []
        for i, char in enumerate(text):
            centre = x + width * (i + 0.5)
            cell, in_cell = int(centre), centre % 1
            part = part_of_cell(in_cell, y)
            indices.append((cell, SYMBOLS.index(char), INKS.index("black"), part))
            box = [rng.random() for _ in range(4)]  # where it lies on the page should not matter
            places.append((in_cell - 0.5, y - 0.5, width, 0.8, *box))
        page = PackedPage(torch.tensor(indices), torch.tensor(places), cell + rng.randint(1, 2))
        return self.encode([("Read all of the text.", text)], page)

    def note(self, rng):
        """One to three lines, to be transcribed or with two questions."""
        page = make_page(rng, "train", (note,))
        turns = caption(page, rng) if rng.random() < 0.7 else turns_of(questions(page, rng, 2))
        return self.encode(turns, packed(page, crop=rng))

    def plain(self, rng):
        """A page as plain text, with questions that need neither colours nor positions."""
        page = make_page(rng, "train")
        kinds = ("read", "relation", "yes/no", "count")
        facts = [fact for fact in page.facts if fact.kind in kinds]
        turns = turns_of(rng.sample(facts, min(14, len(facts))))
        question, answer = turns[0]
        turns[0] = "\n".join([*page.lines, question]), answer
        return self.encode(turns)

    def listing(self, rng):
        """Every line of a page and its box."""
        page = make_page(rng, "train")
        return self.encode(listing(page, rng), packed(page))

    def page(self, rng):
        """All that can be asked about a page."""
        page = make_page(rng, "train")
        turns = caption(page, rng) if rng.random() < 0.15 else []
        turns += turns_of(questions(page, rng, 14))
        return self.encode(turns, packed(page), system=True)

    def find(self, rng):
        """Questions that name a thing on the page by its name, row, column or neighbour."""
        page = make_page(rng, "train", (receipt, form, table, table, shapes, shapes, shapes))
        return self.encode(turns_of(questions(page, rng, 12, FINDING)), packed(page))

    def lookup(self, rng):
        """Questions about facts in text, which only differ in where they stand."""
        return self.encode(lookups(rng, "train", 4, ask_name=0.5))


def train_tokenizer(path, seed):
    """Writes a SentencePiece model like Llama's: BPE, single digits, bytes for other characters."""
    rng = random.Random(f"tokenizer/{seed}")
    lines = []
    for _ in range(6000):
        page = make_page(rng, "train")
        turns = [*caption(page, rng), *listing(page, rng), *lookups(rng, "train", 1)]
        turns += turns_of(questions(page, rng, 3))
        for question, answer in turns:
            lines.append(f"USER: {question} ASSISTANT:")
            lines += answer.split("\n")
    lines += [SYSTEM] * 2000  # so often that its words become pieces
    with open(path, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=LLAMA.vocab_size,
            model_type="bpe", split_digits=True, byte_fallback=True, character_coverage=1.0,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            user_defined_symbols=COORDINATES, minloglevel=2)


# ---- The language model: its training ----

def init_llama(llama):
    """Initial weights with which so small a model learns to look things up soon."""
    llama.init_weights(std=0.06)  # about one over the root of its width

    # Embeddings as large as the packer's vectors, with an offset that tells text from what is seen
    nn.init.normal_(llama.embed_tokens.weight, std=1.0)
    llama.embed_tokens.weight.data += torch.randn(LLAMA.hidden_size)

    # Layers that add nothing at first: a position holds what stands there and nothing else
    for layer in llama.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)


def answer_loss(llama, packer, examples):
    """The loss; and for answers_right the hidden states (B, T, C) and answers' labels (B, T)."""
    ids, labels, pages = zip(*examples)
    shown = [page for page in pages if page is not None]
    visual_tokens = packer(shown) if shown else []
    embeds, labels = splice(llama.embed_tokens, ids, visual_tokens, labels)
    hidden = llama.hidden(pad(embeds))

    # Where there is no page, all of the text is learnt and not only the answers
    targets = [text if page is None else label for text, label, page in zip(ids, labels, pages)]
    loss = next_token_loss(llama, hidden, pad(targets, IGNORE))
    return loss, hidden, pad(labels, IGNORE)


@torch.no_grad()
def answers_right(llama, hidden, targets):
    """The share of answers whose tokens are all the likeliest: greedy decoding would give them."""
    targets = targets[:, 1:]  # each position predicts the next one
    labelled = targets != IGNORE  # (B, T - 1)
    predicted = llama.lm_head(hidden[:, :-1][labelled].float()).argmax(-1)
    wrong = predicted != targets[labelled]  # (N,)

    # The number of each token's answer: one begins where a label follows a position without one
    begins = labelled & ~F.pad(labelled, (1, 0))[:, :-1]
    answers = begins.flatten().cumsum(0)[labelled.flatten()]  # (N,), from 1
    return 1 - len(answers[wrong].unique()) / answers.max().item()


def pretrain_llm(args):
    """Trains args.steps steps from args.seed; writes the Llama every 100 steps and at the end."""
    # The tokenizer, in a temporary folder: it is saved together with the weights that belong to it
    torch.manual_seed(args.seed)
    scratch = tempfile.TemporaryDirectory()
    tokenizer_file = Path(scratch.name) / "tokenizer.model"
    train_tokenizer(tokenizer_file, args.seed)
    tokenizer = Tokenizer(tokenizer_file)

    # The models
    llama, packer = Llama(LLAMA), Packer(LLAMA.hidden_size)
    init_llama(llama)

    # Muon for the layers' matrices: look-ups are learnt in fewer steps than with AdamW alone
    matrices, others = [], []
    for name, parameter in llama.named_parameters():
        in_muon = name.startswith("layers.") and parameter.ndim == 2
        (matrices if in_muon else others).append(parameter)
    others += packer.parameters()
    muon = torch.optim.Muon(matrices, weight_decay=0.02)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.02)

    settings = {"seed": args.seed, "steps": args.steps}
    state = State(OUT / "llm.state", settings, [llama, packer, muon, adamw])
    first_step = state.load() if args.resume else 0
    lessons = Lessons(args.seed, tokenizer_file, args.steps, first_step // 4)
    batches = iter(DataLoader(lessons, batch_size=None, num_workers=1, prefetch_factor=8,
                              generator=torch.Generator()))  # not the one that a state brings back

    started = time.time()
    bar = tqdm(range(first_step, args.steps), "llm", args.steps, initial=first_step, mininterval=10)
    for step in bar:
        # Forward, backward, step
        lesson, examples = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=state.bf16):
            loss, hidden, labels = answer_loss(llama, packer, examples)
        loss.backward()
        nn.utils.clip_grad_norm_([*matrices, *others], 1.0)
        for optimizer, peak in ((muon, 2e-2), (adamw, 4e-3)):
            set_learning_rate(optimizer, learning_rate(step, args.steps, peak))
            optimizer.step()
            optimizer.zero_grad()

        # Log and save
        if step % 10 == 0:
            right = answers_right(llama, hidden, labels)
            bar.write(f"step {step} {time.time() - started:.0f}s {lesson} loss {loss.item():.3f} "
                      f"answers right {right:.3f}", file=sys.stderr)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            llama.save_pretrained(OUT / "vicuna-nano", torch.bfloat16, tokenizer)
            state.save(step + 1)
    state.remove()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone", choices=("vision", "llm"))
    parser.add_argument("--steps", type=int, help="default: 2,400 for vision, 5,000 for llm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on where a run was stopped")
    args = parser.parse_args()
    if args.backbone == "llm" and not hasattr(torch.optim, "Muon"):
        parser.error("this torch has no Muon: the language model is pretrained with torch 2.9 or newer")
    programs = {"vision": (pretrain_vision, 2400), "llm": (pretrain_llm, 5000)}
    pretrain, default_steps = programs[args.backbone]
    steps = default_steps if args.steps is None else args.steps
    if steps < 1:
        parser.error(f"--steps is {steps}: it should be at least 1")
    if not 0 <= args.seed < 2 ** 32:
        parser.error(f"--seed is {args.seed}: take 0 to {2 ** 32 - 1}")
    try:
        pretrain(argparse.Namespace(seed=args.seed, steps=steps, resume=args.resume))
    except (OSError, ValueError) as error:
        print(f"data.nano.pretrain: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
