"""The small model: the generator of its pages and questions, and its backbones' pretraining."""
import json
import math
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from torch.utils.data import DataLoader

import bench
from conftest import ENVIRONMENT, ROOT, refused
from convnext import ConvNeXt
from data.conversation import IGNORE, IMAGE_TOKEN, Tokenizer, parse_turns
from data.images import read_image
from data.nano import pretrain
from data.nano.generate import (COLOURS, EVERYTHING, FILES, ITEMS, SHAPES, Page, code, date, is_for, listing,
                                make_page, number, price, sample, shapes, write_examples)
from data.nano.letters import Print, Text, font, length
from llama import Llama

NANO_TOKENIZER = ROOT / "data" / "nano" / "backbones" / "vicuna-nano" / "tokenizer.model"
ORDINALS = ("first", "second", "third")
CAPTION_QUESTIONS = "Describe the picture.", "List the shapes.", "Transcribe the document.", "Read all of the text."


@cache
def training_pages():
    """Pages of all kinds, upright and slightly rotated."""
    rng = random.Random(1)
    return [make_page(rng, "train") for _ in range(300)]


# ---- The values of training and validation ----

@pytest.mark.parametrize("make", [price, number, date, code])
def test_about_one_value_in_eight_is_for_validation(make):
    """12.5% of 300 random values, to a factor of two."""
    rng = random.Random(0)
    values = {make(rng) for _ in range(300)}
    share = sum(is_for(value, "val") for value in values) / len(values)
    assert 1 / 16 < share < 1 / 4


def values_read(split):
    """The words with digits in the answers of 60 pages' questions of what is written somewhere."""
    rng = random.Random(0)
    facts = [fact for _ in range(60) for fact in make_page(rng, split).facts]
    words = {word for fact in facts if fact.kind == "read" for word in fact.answer.split()}
    return {word for word in words if any(char.isdigit() for char in word)}


def test_no_value_of_the_validation_is_in_training():
    validation, training = values_read("val"), values_read("train")
    assert len(validation) > 50
    assert not validation & training
    assert all(is_for(value, "val") for value in validation)


# ---- Samples and files ----

@pytest.mark.parametrize("task, index", [("captions", 3), ("instructions", 4)])
def test_a_sample_follows_from_its_seed_and_split(task, index):
    assert sample("train", task, index, 0) == sample("train", task, index, 0)
    assert sample("train", task, index, 0) != sample("train", task, index, 1)
    assert sample("train", task, index, 0) != sample("val", task, index, 0)


# file: most turns of a sample, what ids begin with, least and most text-only ones of 100
CONTENTS = {
    "captions.json": (1, {"transcription"}, (0, 0)),
    "instructions.json": (11, {"instructions", "text"}, (2, 20)),  # 8 on average
    "pages.json": (15, {"pages"}, (0, 0)),
    "neighbours.json": (15, {"neighbours"}, (0, 0)),
    "lookups.json": (5, {"text"}, (100, 100)),
    "val-captions.json": (1, {"transcription"}, (0, 0)),
    "val-instructions.json": (1, {*EVERYTHING, "text", "transcription"}, (2, 20)),  # answers are counted by kind
}


@pytest.mark.parametrize("file", FILES)
def test_a_file_holds_what_it_is_for(monkeypatch, file):
    monkeypatch.setattr(Page, "jpeg", lambda page: b"")
    most_turns, labels, (least_text, most_text) = CONTENTS[file]
    split, task, _ = FILES[file]

    samples = [sample(split, task, index, seed=0) for index in range(100)]

    assert max(len(parse_turns(entry)[0]) for entry, _ in samples) == most_turns
    assert all(("image" in entry) == (jpeg is not None) for entry, jpeg in samples)
    assert least_text <= sum(jpeg is None for _, jpeg in samples) <= most_text
    assert {entry["id"].split("-")[0] for entry, _ in samples} == labels


def test_a_generated_file_is_ordinary_llava_json(pages):
    entries = json.loads((pages / "instructions.json").read_text())
    assert len(entries) == 24
    for entry in entries:
        turns, paths = parse_turns(entry)
        assert turns and all((pages / path).is_file() for path in paths)


WORKS_WITH_A_CHILD = """
import time
from multiprocessing import get_context
from data.nano.generate import start_worker

def work():
    start_worker()
    print("ready", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    get_context("spawn").Process(target=work).start()
    time.sleep(600)
"""


def test_a_process_that_draws_ends_with_the_one_that_started_it(tmp_path):
    """Which the kernel may have killed."""
    (tmp_path / "parent.py").write_text(WORKS_WITH_A_CHILD)
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], env=environment, stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"ready\n"
    parent.kill()
    parent.communicate(timeout=60)  # the child has this end of the pipe too, as long as it lives


def test_no_unfinished_file_is_left(pages):
    assert not list(pages.glob("*.tmp"))


@pytest.mark.parametrize("task", ["instructions", "pages", "neighbours"])
def test_three_conversations_in_ten_also_ask_for_a_transcription(monkeypatch, task):
    """Anywhere among their questions. Of 200: 30%, to a third of it."""
    monkeypatch.setattr(Page, "jpeg", lambda page: b"")
    places = []
    for index in range(200):
        turns, _ = parse_turns(sample("train", task, index, 0)[0])
        places += [place for place, (_, question, _) in enumerate(turns)
                   if question.removeprefix("\n") in CAPTION_QUESTIONS]
    assert 0.2 < len(places) / 200 < 0.4
    assert min(places) == 0 and max(places) > 5


def test_lookups_ask_for_what_is_stated():
    """Reference: the pairs in "The code of Anna is XK-52." of the first question."""
    for index in range(50):
        entry, _ = sample("train", "lookups", index, 0)
        turns, _ = parse_turns(entry)
        value_of = dict(re.findall(r"of (\w+) is (\S+)\.(?: |$)", turns[0][1]))
        for _, question, answer in turns:
            if "Whose is each" in question:
                pairs = [pair.split() for pair in answer.removesuffix(".").split(". ")]
                assert {name: value for value, name in pairs} == value_of
            elif "Whose" in question:
                assert value_of[answer] in question
            else:
                name = question.removesuffix("?").split()[-1]
                assert value_of[name] == answer


def test_the_examples_are_drawn_as_they_are_shipped(tmp_path):
    """To 3 of 255 levels on average: older Pillows shift some text by a part of a pixel."""
    write_examples(tmp_path)
    shipped = ROOT / "data" / "nano" / "examples"
    names = sorted(path.name for path in shipped.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        drawn, expected = (np.asarray(read_image(folder / name)) for folder in (tmp_path, shipped))
        assert drawn.shape == expected.shape
        assert np.abs(drawn.astype(int) - expected).mean() < 3, name


# ---- Answers, worked out again from what is drawn where ----

class Thing(NamedTuple):
    """A text or a shape on a page. x, y: a text's top left corner, a shape's middle and bottom."""
    name: str
    x: float
    y: float
    colour: str


class Reader:
    """Answers questions about a page from where its texts and shapes lie, and from nothing else."""

    def __init__(self, page):
        self.texts = []  # from top to bottom
        for text in sorted(page.texts, key=lambda text: text.y):
            self.texts.append(Thing(text.string.rstrip(":"), text.x, text.y, text.colour))
        self.shapes = []
        for kind, colour, (left, _, right, bottom) in page.shapes:
            self.shapes.append(Thing(f"{colour} {kind}", (left + right) / 2, bottom, colour))
        self.labels = [self.nearest_text(shape, page) for shape in self.shapes]
        self.things = self.shapes or self.texts
        self.near = page.px(30) if self.shapes else 0.01  # shapes are not quite in rows and columns

    def nearest_text(self, shape, page):
        """The text whose upper edge is nearest to the shape's lower edge, by their middles."""
        def distance(text):
            middle = text.x + page.length(text.name) / 2
            return math.dist((middle, text.y), (shape.x, shape.y))
        return min(self.texts, key=distance).name

    def answer(self, kind, question):
        question = question.rstrip("?.")
        words = question.lower()
        named = [thing for thing in self.things
                 if re.search(rf"\b{re.escape(thing.name.lower())}\b", words)]
        if kind == "yes/no":
            return "Yes" if named else "No"
        if kind == "count":
            return str(self.count(words))
        if kind == "relation":
            return self.above(named[0]) if "above" in words else self.left_of(named[0])
        if kind == "colour":
            return self.colour_of(question.split()[-1])
        return self.read(words, named)

    def count(self, words):
        num_lines = len({text.y for text in self.texts})
        below_title = num_lines - 1
        counts = {"items": sum(text.name in ITEMS for text in self.texts), "fields": below_title,
                  "rows": below_title, "entries": below_title, "lines": num_lines,
                  "shapes": len(self.shapes)}
        for kind in SHAPES:
            counts[kind] = sum(kind in shape.name for shape in self.shapes)
        return next(number for what, number in counts.items() if what in words)

    def above(self, thing):
        """The nearest thing above."""
        column = [other for other in self.things if abs(other.x - thing.x) < self.near]
        return max((o for o in column if o.y < thing.y - self.near), key=lambda o: o.y).name

    def left_of(self, thing):
        """The nearest thing on the left."""
        row = [other for other in self.things if abs(other.y - thing.y) < self.near]
        return max((o for o in row if o.x < thing.x - self.near), key=lambda o: o.x).name

    def colour_of(self, word):
        """Of the shape of this kind or label, else of the title."""
        for shape, label in zip(self.shapes, self.labels):
            if word == label or shape.name.endswith(word):
                return shape.colour
        return self.texts[0].colour

    def read(self, words, named):
        """The label of a shape, a line of a note, a table's cell, a row's value or the title."""
        if self.shapes:
            return self.labels[self.shapes.index(named[0])]
        if place := re.search("(first|second|third) line", words):
            return self.texts[ORDINALS.index(place[1])].name
        if not named:
            return self.texts[0].name
        row = [text for text in self.texts if text.y == named[-1].y]
        if len(named) == 2:  # the header of a column, and the first cell of a row
            return next(text.name for text in row if text.x == named[0].x)
        return max(row, key=lambda text: text.x).name


def test_answers_follow_from_what_is_drawn():
    for page in training_pages():
        reader = Reader(page)
        for kind, question, answer in page.facts:
            if kind != "box":
                assert answer == reader.answer(kind, question), f"{page.kind}: {question}"


def test_what_is_read_is_in_the_transcription():
    for page in training_pages():
        for kind, question, answer in page.facts:
            if kind == "read":
                assert answer in "\n".join(page.lines), question


def test_every_kind_of_page_has_every_kind_of_question():
    """A note has neither relations nor colours nor what could be absent."""
    asked = {}
    for page in training_pages():
        for fact in page.facts:
            kind = fact.answer if fact.kind == "yes/no" else fact.kind
            asked.setdefault(page.kind, set()).add(kind)
    everything = {"read", "box", "relation", "colour", "count", "Yes", "No"}
    assert asked == {"receipt": everything, "form": everything, "table": everything,
                     "picture": everything, "note": {"read", "box", "count"}}


def test_a_document_is_transcribed_in_full():
    for page in training_pages():
        if not page.shapes:
            drawn = sorted(symbol for symbol, _, _ in page.symbols())
            assert sorted("".join(page.lines).replace(" ", "")) == drawn


# ---- Boxes, in fractions of the square that a page is padded to ----

def listed_lines(page):
    """The lines of a page's listing, which asks for all of them with their boxes."""
    (_, answer), = listing(page, random.Random(0))
    return answer.split("\n")


def split_box(line):
    """ "Total 12.75 [0.05, 0.70, 0.93, 0.79]" -> "Total 12.75" and the four numbers."""
    text, box = line.removesuffix("]").split(" [")
    return text, [float(number) for number in box.split(", ")]


def symbols_in(page, box):
    """The symbols whose centres are in a box, from left to right: [(symbol, box)]."""
    left, top, right, bottom = box
    inside = []
    for symbol, _, (x1, y1, x2, y2) in page.symbols():
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        if left - 0.02 < x < right + 0.02 and top < y < bottom:
            inside.append((symbol, (x1, y1, x2, y2)))
    return sorted(inside, key=lambda item: item[1][0])


def test_symbols_lie_on_the_page():
    for page in training_pages():
        assert all(-0.02 < value < 1.02 for _, _, box in page.symbols() for value in box)


def test_a_listing_has_every_line():
    for page in training_pages():
        assert [split_box(line)[0] for line in listed_lines(page)] == page.lines


def test_a_box_holds_what_its_line_says_and_nothing_else():
    """For a picture's line "red star K": the star, and below it a label that reads K."""
    for page in training_pages():
        reader = Reader(page)
        for text, box in map(split_box, listed_lines(page)):
            inside = "".join(symbol for symbol, _ in symbols_in(page, box))
            if not page.shapes:
                assert inside == text.replace(" ", "")
                continue
            colour, kind, label = text.split()
            assert inside == kind
            assert label == reader.answer("read", f"Read the label of the {colour} {kind}.")


def test_a_box_is_as_large_as_what_it_holds():
    """To 0.04 of the page. The right side is left out: a table's row is as wide as the table."""
    for page in training_pages():
        for _, (left, top, right, bottom) in map(split_box, listed_lines(page)):
            boxes = np.array([box for _, box in symbols_in(page, (left, top, right, bottom))])
            assert left < right and top < bottom
            assert left == pytest.approx(boxes[:, 0].min(), abs=0.04)
            assert top == pytest.approx(boxes[:, 1].min(), abs=0.04)
            assert bottom == pytest.approx(boxes[:, 3].max(), abs=0.04)


def test_a_question_for_a_box_is_answered_with_its_line():
    """The line begins with what is asked for, but for "the first line" of a note."""
    for page in training_pages():
        lines = listed_lines(page)
        for fact in page.facts:
            if fact.kind != "box":
                continue
            assert fact.answer in lines
            name = re.search(r"(?:is|box of) the (?:price of |row of )?(.+)[?.]", fact.question)[1]
            if name.removesuffix(" line") in ORDINALS:
                name = page.lines[ORDINALS.index(name.removesuffix(" line"))]
            assert fact.answer.lower().startswith(name.lower()), fact.question


# ---- Texts and shapes in the image ----

BOLD, SERIF = Print(stroke=0.04), Print(serif=0.08, stem=0.03)
SLANTED, WIDE, NARROW = Print(slant=0.25), Print(stretch=1.2), Print(stretch=0.8)
SPACED, EVEN = Print(spacing=0.15), Print(evenness=1.0)


def ink_of(string, look, size=48):
    """Where the ink of black letters at (100, 20) lies: (height, width), True where it is dark."""
    image = Image.new("RGB", (900, 100), "white")
    Text(string, 100, 20, size, "black", look).draw(image, (0, 0, 0))
    return np.asarray(image.convert("L")) < 128


@pytest.mark.parametrize("look", [Print(), BOLD, SERIF, SLANTED, WIDE, NARROW, SPACED, EVEN], ids=str)
def test_the_box_of_a_text_holds_its_ink(look):
    """From the top of a capital to the bottom of a "g", to 0.25 of the font's size."""
    page = Page(random.Random(0), "note", look)
    page.angle, page.width, page.height = 0, page.side, page.side
    box = page.write("Apply Eggs", page.px(40), page.px(200))
    rows, columns = (np.asarray(page.image().convert("L")) < 128).nonzero()
    ink = columns.min(), rows.min(), columns.max(), rows.max()
    assert ink == pytest.approx(box, abs=0.25 * page.size)


def test_a_stroke_thickens_all_lines_and_a_stem_only_upright_ones():
    upright, level = "|", "-"
    for look, thickens_level in ((BOLD, True), (Print(stem=0.06), False)):
        plain, thick = (ink_of(upright, one).any(axis=0).sum() for one in (Print(), look))
        assert thick >= plain + 2
        plain, thick = (ink_of(level, one).any(axis=1).sum() for one in (Print(), look))
        assert (thick > plain) == thickens_level


def test_serifs_are_feet_of_letters_that_stand_on_stems():
    plain, serif = (ink_of("p", one).any(axis=0).sum() for one in (Print(), Print(serif=0.1)))
    assert serif > plain + 3
    assert np.array_equal(ink_of("o", Print(serif=0.1)), ink_of("o", Print(slant=1e-9)))


def test_slanted_letters_lean_to_the_right():
    """By the slant, for each unit of height: to 2 pixels."""
    def middle(ink, row):
        return ink[row].nonzero()[0].mean()
    ink = ink_of("l", SLANTED)
    rows = ink.any(axis=1).nonzero()[0]
    top, bottom = rows.min() + 2, rows.max() - 2
    assert middle(ink, top) - middle(ink, bottom) == pytest.approx(0.25 * (bottom - top), abs=2)


def test_letters_of_even_width_stand_in_equal_cells():
    assert len({length(letter, 48, EVEN) for letter in "iMg0."}) == 1
    assert length("12.50", 48, EVEN) == pytest.approx(5 * 0.6 * 48)


@pytest.mark.parametrize("look, change", [(WIDE, 1.2), (NARROW, 0.8)], ids=["wide", "narrow"])
def test_letters_are_stretched(look, change):
    """Their ink to 2 pixels."""
    widths = [np.ptp(ink_of("HOUSE", one).any(axis=0).nonzero()[0]) for one in (Print(), look)]
    assert widths[1] == pytest.approx(change * widths[0], abs=2)


def test_a_typeface_from_a_file_is_drawn_as_pillow_does(tmp_path):
    """Here Pillow's own, so that it has to be equal."""
    (tmp_path / "face.ttf").write_bytes(font(48).font_bytes)
    look = Print(typeface=str(tmp_path / "face.ttf"))
    assert np.array_equal(ink_of("Total 12.50", look), ink_of("Total 12.50", Print()))


def test_training_pages_vary_in_print_and_validation_pages_too():
    """A fifth as Pillow prints, and every change on some of 300 pages."""
    looks = [page.look for page in training_pages()]
    assert 0.12 < sum(look == Print() for look in looks) / len(looks) < 0.28
    for field, plain in Print._field_defaults.items():
        changed = sum(getattr(look, field) != plain for look in looks)
        assert (changed == 0) == (field == "typeface") and changed < 200, field
    dark = sum(page.dark for page in training_pages())
    assert 10 < dark < 60
    assert all(page.kind != "picture" for page in training_pages() if page.dark)


COVERS = {  # the share of its box that a shape covers
    "circle": math.pi / 4, "square": 1, "triangle": 1 / 2, "diamond": 1 / 2,
    "star": 5 / 4 * 0.45 * math.sin(math.pi / 5), "cross": 2 * 0.32 - 0.32 ** 2}


class DrawnShape(NamedTuple):
    """What a page says of a shape, and what its image shows."""
    kind: str
    box: tuple  # in fractions of the padded square
    share: float  # of its box that its pixels cover
    middle: tuple  # the medians of its pixels' x and y, in fractions of the padded square


@cache
def drawn_shapes():
    """The shapes of 20 sharp pictures whose pixels no other shape's colour, nor a label's black, has."""
    rng = random.Random(0)
    drawn = []
    for _ in range(20):
        page = make_page(rng, "train", (shapes,), Print())
        page.angle = rng.choice((-4, 0, 4))
        pixels = np.asarray(page.image()).astype(int)
        margin_x, margin_y = (page.side - page.width) / 2, (page.side - page.height) / 2
        colours = [shape.colour for shape in page.shapes]
        for shape, (_, _, box) in zip(page.shapes, page.symbols()):
            if shape.colour == "black" or colours.count(shape.colour) > 1:
                continue
            is_shape = np.abs(pixels - COLOURS[shape.colour]).max(axis=-1) < 30
            rows, columns = is_shape.nonzero()
            share = len(rows) / (shape.box[2] - shape.box[0]) ** 2
            middle = ((np.median(columns) + margin_x) / page.side,
                      (np.median(rows) + margin_y) / page.side)
            drawn.append(DrawnShape(shape.kind, box, share, middle))
    return drawn


def test_a_shape_covers_its_share_of_its_box():
    """To 10%."""
    assert {shape.kind for shape in drawn_shapes()} == set(SHAPES)
    for shape in drawn_shapes():
        assert shape.share == pytest.approx(COVERS[shape.kind], rel=0.1), shape.kind


def test_a_shape_is_drawn_in_the_middle_of_its_box():
    """To 0.005 of the square. A star and a triangle have their pixels' median elsewhere."""
    for shape in drawn_shapes():
        if shape.kind not in ("star", "triangle"):
            x1, y1, x2, y2 = shape.box
            assert math.dist(shape.middle, ((x1 + x2) / 2, (y1 + y2) / 2)) < 0.005, shape.kind


# ---- Pretraining the vision backbone: a label for each of the 32 x 64 slots of a page ----

@pytest.mark.parametrize("seed", range(4))
def test_the_slot_of_a_symbols_middle_names_it_and_its_place(seed):
    _, symbols, inks, places = pretrain.DensePages(0).example(random.Random(seed), 0)
    for symbol, ink, box in make_page(random.Random(seed), "train").symbols():
        left, top, right, bottom = box[0] * 64, box[1] * 32, box[2] * 64, box[3] * 32
        x, y = (left + right) / 2, (top + bottom) / 2
        row, column = int(y), int(x)
        assert pretrain.SYMBOLS[symbols[row, column]] == symbol
        assert pretrain.INKS[inks[row, column]] == ink
        place = torch.tensor([x - (column + 0.5), y - (row + 0.5), right - left, bottom - top])
        torch.testing.assert_close(places[row, column], place)


@pytest.mark.parametrize("seed", range(4))
def test_a_slot_has_a_label_where_a_symbol_covers_its_centre(seed):
    _, symbols, inks, _ = pretrain.DensePages(0).example(random.Random(seed), 0)
    centre_x, centre_y = torch.arange(64) + 0.5, torch.arange(32)[:, None] + 0.5
    covered = torch.zeros(32, 64, dtype=torch.bool)
    for _, _, box in make_page(random.Random(seed), "train").symbols():
        in_columns = (box[0] * 64 <= centre_x) & (centre_x < box[2] * 64)
        in_rows = (box[1] * 32 <= centre_y) & (centre_y < box[3] * 32)
        covered |= in_rows & in_columns
    assert torch.equal(symbols > 0, covered)
    assert torch.equal(inks > 0, covered)


@pytest.fixture
def backbones_folder(monkeypatch, tmp_path):
    """Where pretraining writes; a vision backbone is small then, and sees two pages at a step."""
    monkeypatch.setattr(pretrain, "OUT", tmp_path / "backbones")
    monkeypatch.setattr(pretrain, "NANO", dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)))
    monkeypatch.setattr(pretrain, "PAGES", 2)
    in_this_process = lambda dataset, batch_size, **options: DataLoader(dataset, batch_size)
    monkeypatch.setattr(pretrain, "DataLoader", in_this_process)
    return tmp_path / "backbones"


def all_changed(before, after):
    """Whether no matrix or kernel of two models is the same."""
    pairs = zip(before.parameters(), after.parameters())
    return not any(torch.equal(old, new) for old, new in pairs if old.dim() > 1)


def pretrain_here(program, steps, resume=False):
    program(SimpleNamespace(seed=0, steps=steps, resume=resume))


def stop_after(monkeypatch, step):
    """Has pretraining stop when its state after that step is saved, of each of which it saves one."""
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 1)
    save = pretrain.State.save

    def save_and_stop(state, done):
        save(state, done)
        if done == step:
            raise KeyboardInterrupt
    monkeypatch.setattr(pretrain.State, "save", save_and_stop)


def assert_equal_after_a_stop(monkeypatch, folder, program, stop, steps):
    """A run that was stopped and resumed writes the bytes of one that was not."""
    def written():
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}

    monkeypatch.setattr(pretrain, "faster_dtype", lambda device: "bf16")  # which is timed, and may change
    pretrain_here(program, steps)
    expected = written()
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain_here(program, steps)
    assert written() != expected and len(list(folder.glob("*.state"))) == 1
    with pytest.raises(ValueError, match="is of a run with .*'steps': .*start with the same, or without --resume"):
        pretrain_here(program, steps + 1, resume=True)
    pretrain_here(program, steps, resume=True)
    assert written() == expected and not list(folder.glob("*.state*"))


def test_a_stopped_run_of_the_vision_backbone_goes_on(backbones_folder, monkeypatch):
    assert_equal_after_a_stop(monkeypatch, backbones_folder, pretrain.pretrain_vision, stop=2, steps=3)


def test_without_a_state_there_is_nothing_to_go_on_with(backbones_folder, ended):
    refused(ended(pretrain.main, "vision", "--resume"), "vision.state is not there: start without --resume")


def test_the_vision_backbone_is_trained(backbones_folder):
    models = []
    for steps in (1, 2):
        pretrain_here(pretrain.pretrain_vision, steps)
        file, = backbones_folder.iterdir()
        models.append(ConvNeXt.from_pretrained(file))
    assert all_changed(*models)


def test_the_older_backbone_stays_when_the_new_cannot_be_written(
        backbones_folder, monkeypatch, ended):
    def fail(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("data.weights.save_file", fail)
    backbones_folder.mkdir()
    older = backbones_folder / "open_clip_model.safetensors"
    older.write_bytes(b"older")

    process = ended(pretrain.main, "vision", "--steps", 1)

    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].endswith("cannot be written: No space left on device")
    assert list(backbones_folder.iterdir()) == [older] and older.read_bytes() == b"older"


@pytest.mark.parametrize("arguments, message", [
    (["--steps", 0], "--steps is 0: it should be at least 1"),
    (["--seed", -1], "--seed is -1: take 0 to 4294967295"),
    (["--seed", 2 ** 32], "--seed is 4294967296: take 0 to 4294967295"),
])
def test_wrong_arguments_are_refused(ended, arguments, message):
    process = ended(pretrain.main, "vision", *arguments)
    assert process.returncode == 2
    assert process.stderr.strip().endswith(message)


# ---- Pretraining the language model: pages as 8 x 8 cells ----

@cache
def packed_pages():
    """[(page, the same page packed)]"""
    pages = [make_page(random.Random(seed), "train") for seed in range(20)]
    return [(page, pretrain.packed(page)) for page in pages]


def test_a_packed_page_has_every_symbol_and_its_box():
    for page, (indices, places, num_cells) in packed_pages():
        symbols, packed = set(), set()
        for symbol, ink, box in page.symbols():
            symbols.add((symbol, ink, tuple(torch.tensor(box).tolist())))  # rounded to float32
        for (_, symbol, ink, _), place in zip(indices.tolist(), places):
            packed.add((pretrain.SYMBOLS[symbol], pretrain.INKS[ink], tuple(place[4:].tolist())))
        assert packed == symbols
        assert num_cells == 64


def test_a_packed_symbol_has_its_centre_in_the_cell_and_its_size():
    for _, (indices, places, _) in packed_pages():
        cell = indices[:, 0]
        middle_of_cell = torch.stack([cell % 8, cell // 8], dim=1) + 0.5  # x, y, in cells
        left_top, right_bottom = places[:, 4:6] * 8, places[:, 6:] * 8
        torch.testing.assert_close(middle_of_cell + places[:, :2], (left_top + right_bottom) / 2)
        torch.testing.assert_close(places[:, 2:4], right_bottom - left_top)


def test_a_packed_shape_is_in_all_cells_that_it_touches():
    for page, (indices, places, _) in packed_pages():
        for kind, _, box in page.symbols()[:len(page.shapes)]:
            left, top, right, bottom = (int(value * 8) for value in box)
            touched = {row * 8 + column
                       for row in range(top, bottom + 1) for column in range(left, right + 1)}
            copies = (places[:, 4:] == torch.tensor(box)).all(dim=1)
            assert set(indices[copies, 0].tolist()) == touched, kind
            assert copies.sum() == len(touched)


def test_a_packed_character_is_in_one_part_of_one_cell():
    """In the cell of its middle; the parts of a cell are numbered 0 to 3 above, 4 to 7 below."""
    for page, (indices, places, _) in packed_pages():
        is_character = indices[:, 1] > len(SHAPES)
        assert is_character.sum() == len(page.symbols()) - len(page.shapes)
        for (_, _, _, part), place in zip(indices[is_character].tolist(), places[is_character]):
            x, y = (place[:2] + 0.5).tolist()  # from the cell's left and upper sides
            assert 0 <= x <= 1 and 0 <= y <= 1
            assert part == 4 * (y > 0.5) + int(4 * x)


def test_cropping_leaves_out_nothing_but_empty_rows_of_cells():
    """At most one stays above the symbols and one below. All else is as without cropping."""
    for seed, (page, (indices, places, num_cells)) in enumerate(packed_pages()):
        cropped = pretrain.packed(page, crop=random.Random(seed))
        shift = indices[:, 0] - cropped.indices[:, 0]
        assert (shift == shift[0]).all() and shift[0] % 8 == 0 and cropped.num_cells % 8 == 0
        assert torch.equal(cropped.indices[:, 1:], indices[:, 1:])
        assert torch.equal(cropped.places, places)
        rows = cropped.indices[:, 0] // 8
        assert 0 <= rows.min() <= 1
        assert 1 <= cropped.num_cells // 8 - rows.max() <= 2


LESSONS = sorted({lesson for _, weights in pretrain.CURRICULUM for lesson in weights})


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_has_answers_and_a_page_where_it_shows_one(lesson):
    lessons, rng = pretrain.Lessons(0, NANO_TOKENIZER, steps=1), random.Random(0)
    lessons.tokenizer = Tokenizer(NANO_TOKENIZER)
    for _ in range(10):
        ids, labels, page = getattr(lessons, lesson)(rng)
        assert ids.shape == labels.shape
        assert ((labels == ids) | (labels == IGNORE)).all()
        assert lessons.tokenizer.eos in labels
        assert (ids == IMAGE_TOKEN).sum() == (page is not None)
        if page is not None:
            indices, places, num_cells = page
            assert len(indices) == len(places)
            assert 0 <= indices[:, 0].min() and indices[:, 0].max() < num_cells


def test_a_box_is_five_tokens_of_nanos_tokenizer():
    tokenizer = Tokenizer(NANO_TOKENIZER)
    line = "Total 12.75 [0.05, 0.70, 1.00, 0.99]"
    assert len(tokenizer.encode(line)) == len(tokenizer.encode("Total 12.75")) + 5
    assert tokenizer.decode(tokenizer.encode(line)) == line


def test_an_answer_is_right_when_all_its_tokens_are(model):
    """Four answers in two rows, one token after the other made wrong."""
    targets = torch.full((2, 12), IGNORE)
    with torch.no_grad():
        ids = torch.randint(0, 700, (2, 12))
        hidden = model.llama.hidden(model.llama.embed_tokens(ids))
        likeliest = model.llama.lm_head(hidden).argmax(-1)
    for row, start, stop in ((0, 2, 5), (0, 7, 9), (1, 3, 4), (1, 9, 12)):
        targets[row, start:stop] = likeliest[row, start - 1:stop - 1]

    assert pretrain.answers_right(model.llama, hidden, targets) == 1
    for row, column, expected in ((0, 3, 0.75), (0, 4, 0.75), (1, 3, 0.5)):
        targets[row, column] += 1
        assert pretrain.answers_right(model.llama, hidden, targets) == expected


@pytest.fixture
def llm_folder(tmp_path, monkeypatch):
    """Where pretraining writes, with the small model's tokenizer and one conversation at a step."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("pretraining the language model needs torch 2.9 or newer, for its Muon")
    monkeypatch.setattr(pretrain, "OUT", tmp_path)
    monkeypatch.setattr(pretrain, "BATCH", 1)
    write_tokenizer = lambda path, seed: path.write_bytes(NANO_TOKENIZER.read_bytes())
    monkeypatch.setattr(pretrain, "train_tokenizer", write_tokenizer)
    return tmp_path


def test_the_language_model_is_trained(llm_folder):
    models = []
    for steps in (1, 2):
        pretrain_here(pretrain.pretrain_llm, steps)
        models.append(Llama.from_pretrained(llm_folder / "vicuna-nano"))
    assert all_changed(*models)


def test_a_stopped_run_of_the_language_model_goes_on(llm_folder, monkeypatch):
    """After four steps, whose lessons are drawn together."""
    assert_equal_after_a_stop(monkeypatch, llm_folder, pretrain.pretrain_llm, stop=4, steps=6)


# ---- Other typefaces ----

def test_a_typeface_is_a_row_of_shares(capsys):
    bench.main(["typefaces", "--pages", "2"])
    head, _, pillows = capsys.readouterr().out.splitlines()
    assert pillows.startswith("| Pillow's own |") and len(head.split("|")) == len(pillows.split("|"))


def test_a_font_file_that_is_not_there_is_named_before_any_page(ended):
    refused(ended(bench.main, "typefaces", "gone.ttf"), "gone.ttf is no file: give the path of a font")
