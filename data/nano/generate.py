"""Documents drawn with Pillow, and LLaVA-format questions about them: the data of the small model, "nano".

    python -m data.nano.generate --out data/nano/out     # every file; train.py draws what its phase lacks

Receipts, forms, tables, labelled shapes and notes, drawn in pixels of the file and described in units of the padded
square, as in the LLaVA data. Everything follows from the seed. A price, number, date or code is either for
training or for validation, by a checksum of its characters, so that no validation answer can be remembered.
"""
import argparse
import io
import json
import math
import os
import random
import signal
import sys
import zlib
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

WORKERS = min(8, os.cpu_count() or 1)  # processes that draw pages
UNITS = 512  # the long side of every page in layout units; sizes below are in these
PRINT = 42, 54  # size of the font: two or three characters to a visual token of 64 units
COLOURS = {"red": (210, 40, 40), "green": (30, 140, 60), "blue": (40, 80, 200), "orange": (240, 140, 20),
           "purple": (130, 50, 160), "pink": (240, 130, 180), "brown": (125, 80, 40), "black": (25, 25, 25)}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
PAPERS = ((255, 255, 255), (250, 246, 232), (236, 240, 246), (240, 240, 236), (246, 236, 236), (234, 246, 238))
SHOPS = ("Corner Shop", "Green Market", "Blue Cafe", "Book Barn", "Sunny Deli", "City Store", "Old Mill", "Star Bakery",
         "River Cafe", "Happy Mart", "North Shop", "Garden Hut")
ITEMS = ("Tea", "Coffee", "Bread", "Milk", "Apple", "Rice", "Soap", "Cake", "Salt", "Honey", "Juice", "Pasta", "Eggs",
         "Butter", "Sugar", "Lemon", "Onion", "Candle", "Paper", "Pen", "Cheese", "Soup", "Beans", "Water", "Plum")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack", "Kate", "Leo", "Mia",
         "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor")
CITIES = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Madrid", "Vienna", "Dublin", "Prague", "Quito",
          "Seoul", "Bern", "Turin", "Lyon")
TITLES = ("Entry Form", "Ticket", "Visitor Pass", "Order Form", "Travel Card", "Library Card", "Parcel", "Badge")


def is_for(value, split):
    """Whether a value belongs to "train" or "val": one in eight checksums is kept for validation."""
    return (zlib.crc32(value.encode()) % 8 == 0) == (split == "val")


def draw_value(rng, split, make):
    """The first value of make(rng) that belongs to the split."""
    while not is_for(value := make(rng), split):
        pass
    return value


def price(rng):
    return f"{rng.choice((rng.randint(0, 9), rng.randint(10, 99)))}.{rng.randint(1, 99):02d}"


def number(rng):
    return str(rng.randint(10, 999))


def date(rng):
    y, m, d = rng.randint(2001, 2029), rng.randint(1, 12), rng.randint(1, 28)
    return rng.choice((f"{y}-{m:02d}-{d:02d}", f"{d:02d}/{m:02d}/{y}"))


def code(rng):
    letters = "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(2))
    return rng.choice((f"{letters}-{rng.randint(100, 999)}", f"{letters}{rng.randint(10, 99)}"))


FIELDS = {"Name": NAMES, "City": CITIES, "Date": date, "Code": code, "Room": number, "Seat": code, "Order": number,
          "Origin": CITIES, "Expiry": date, "Fee": price}


@lru_cache(maxsize=256)
def font(size):
    return ImageFont.load_default(size)


@lru_cache(maxsize=100_000)
def length(text, size):
    return font(size).getlength(text)


class Page:
    """A page while it is laid out, and what may be asked about it. Lengths are pixels of the image file.

    texts: (string, x, y, font size, colour name); shapes: (kind, colour name, box); rules: line segments;
    lines: the transcription; boxes: one for each line; facts: (kind of question, question, answer).
    """

    def __init__(self, rng):
        self.rng = rng
        self.unit = rng.choice((0.85, 1.0, 1.0, 1.25, 1.5, 1.75)) * rng.uniform(0.95, 1.05)  # pixels per layout unit
        self.side = round(UNITS * self.unit)
        self.size = round(rng.uniform(*PRINT) * self.unit)  # of the font
        self.paper = rng.choice(PAPERS)
        self.angle = rng.choice((0, rng.uniform(-1.5, 1.5)))
        self.width = self.height = 0
        self.texts, self.shapes, self.rules, self.lines, self.boxes, self.facts = [], [], [], [], [], []
        self.kind = ""  # of page

    def px(self, units):
        return units * self.unit

    def fit(self, width, height):
        """Sets the page around content of this size: portrait, landscape or square. Returns its corner, or None."""
        margin = self.px(14)
        needed = math.ceil(width + 2 * margin), math.ceil(height + 2 * margin)
        if max(needed) > self.side:
            return None
        shape = self.rng.choice(("portrait", "landscape", "square"))
        self.width = self.rng.randint(needed[0], self.side) if shape == "portrait" else self.side
        self.height = self.rng.randint(needed[1], self.side) if shape == "landscape" else self.side
        return (self.rng.uniform(margin, self.width - width - margin),
                self.rng.uniform(margin, self.height - height - margin))

    def write(self, text, x, y, size=None, colour="black"):
        """Writes one line with its top left at x, y; returns its box."""
        size = size or self.size
        self.texts.append((text, x, y, size, colour))
        return x, y + 0.1 * size, x + length(text, size), y + 1.15 * size

    def turned(self, x, y):
        """Where the point lies after the page's rotation about its centre."""
        a, cx, cy = math.radians(-self.angle), self.width / 2, self.height / 2
        dx, dy = x - cx, y - cy
        return cx + dx * math.cos(a) - dy * math.sin(a), cy + dx * math.sin(a) + dy * math.cos(a)

    def framed(self, box):
        """A box in pixels -> (x1, y1, x2, y2) in 0 to 1 of the padded square, after rotation."""
        corners = [self.turned(x, y) for x in box[0::2] for y in box[1::2]]
        left, top = (self.side - self.width) / 2, (self.side - self.height) / 2
        xs, ys = [(x + left) / self.side for x, _ in corners], [(y + top) / self.side for _, y in corners]
        return min(xs), min(ys), max(xs), max(ys)

    def line(self, text, box):
        """Adds a line to the transcription, with its box in pixels."""
        self.lines.append(text)
        self.boxes.append(box)

    def placed(self, i):
        """Line i and where it lies, [x1, y1, x2, y2] in 0 to 1 of the padded square."""
        box = ", ".join(f"{min(max(v, 0), 1):.2f}" for v in self.framed(self.boxes[i]))
        return f"{self.lines[i]} [{box}]"

    def ask(self, kind, questions, answer):
        self.facts.append((kind, self.rng.choice(questions), answer))

    def ask_box(self, what, i):
        """The answer says the line that is meant, line i, before where it lies."""
        self.ask("box", (f"Where is {what}?", f"Give the box of {what}."), self.placed(i))

    def symbols(self):
        """Every character and shape as (symbol, colour, box in 0 to 1 of the padded square), in reading order."""
        found = []
        for text, x, y, size, colour in self.texts:
            for i, char in enumerate(text):
                if char != " ":
                    x0, x1 = x + length(text[:i], size), x + length(text[:i + 1], size)
                    found.append((char, colour, self.framed((x0, y + 0.1 * size, x1, y + 1.15 * size))))
        return [(kind, colour, self.framed(box)) for kind, colour, box in self.shapes] + found

    def image(self):
        """Draws the page: an RGB image, with the rotation, blur and noise of this page."""
        image = Image.new("RGB", (self.width, self.height), self.paper)
        draw = ImageDraw.Draw(image)
        for segment in self.rules:
            draw.line(segment, fill=(150, 150, 150), width=max(1, round(self.px(2))))
        for kind, colour, box in self.shapes:
            draw_shape(draw, kind, COLOURS[colour], box)
        for text, x, y, size, colour in self.texts:
            draw.text((x, y), text, fill=COLOURS.get(colour, (255, 255, 255)), font=font(size))
        if self.angle:
            image = image.rotate(self.angle, Image.Resampling.BICUBIC, fillcolor=self.paper)
        if (noise := self.rng.choice((0, 0, 4, 9))):
            random_state = np.random.default_rng(self.rng.getrandbits(32))
            grain = random_state.normal(0, noise, (self.height, self.width, 1)).astype(np.float32)
            image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
        return image

    def jpeg(self):
        buffer = io.BytesIO()
        self.image().save(buffer, "JPEG", quality=self.rng.randint(55, 92))
        return buffer.getvalue()


def draw_shape(draw, kind, colour, box):
    x0, y0, x1, y1 = box
    cx, cy, r = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2
    around = lambda radii, turn=-90: [(cx + p * math.cos(math.radians(turn + i * 360 / len(radii))),
                                       cy + p * math.sin(math.radians(turn + i * 360 / len(radii))))
                                      for i, p in enumerate(radii)]
    if kind == "circle":
        draw.ellipse(box, fill=colour)
    elif kind == "square":
        draw.rectangle(box, fill=colour)
    elif kind == "triangle":
        draw.polygon([(cx, y0), (x1, y1), (x0, y1)], fill=colour)
    elif kind == "diamond":
        draw.polygon(around([r] * 4), fill=colour)
    elif kind == "star":
        draw.polygon(around([r, 0.45 * r] * 5), fill=colour)
    else:
        draw.rectangle((x0, cy - 0.32 * r, x1, cy + 0.32 * r), fill=colour)
        draw.rectangle((cx - 0.32 * r, y0, cx + 0.32 * r, y1), fill=colour)


def receipt(rng, split):
    """A shop's name, perhaps a date, two to four items with prices, and their total."""
    page = Page(rng)
    shop, ink = rng.choice(SHOPS), rng.choice(list(COLOURS))
    items = rng.sample(ITEMS, rng.randint(2, 4))
    while True:
        prices = [draw_value(rng, split, price) for _ in items]
        total = f"{sum(map(float, prices)):.2f}"
        if is_for(total, split):
            break
    rows = [(name, value) for name, value in zip(items, prices)] + [("Total", total)]
    if rng.random() < 0.5:
        rows.insert(0, ("Date", draw_value(rng, split, date)))
    page.kind = "receipt"
    if not two_columns(page, shop, ink, rows, gap=rng.uniform(16, 70)):
        return None
    for i, (name, value) in enumerate(rows):
        label = name.lower() if name in ("Total", "Date") else f"price of {name}"
        page.ask("read", (f"What is the {label}?", f"Read the {label}."), value)
        page.ask_box(f"the {label}", i + 1)
        if name in items:
            k = items.index(name)
            if k:
                page.ask("relation", (f"What is above {name}?", f"Which item is above {name}?"), items[k - 1])
            page.ask("yes/no", (f"Is {name} on the receipt?", f"Did they buy {name}?"), "Yes")
    page.ask("read", ("What is the name of the shop?", "Which shop is it?"), shop)
    page.ask("colour", ("What colour is the title?", "What is the colour of the shop's name?"), ink)
    page.ask("count", ("How many items are there?", "How many items were bought?"), str(len(items)))
    for name in rng.sample([n for n in ITEMS if n not in items], len(items)):
        page.ask("yes/no", (f"Is {name} on the receipt?", f"Did they buy {name}?"), "No")
    return page


def form(rng, split):
    """A title and two to five labelled fields."""
    page = Page(rng)
    title, ink = rng.choice(TITLES), rng.choice(list(COLOURS))
    labels = rng.sample(list(FIELDS), rng.randint(2, 5))
    draw = lambda make: rng.choice(make) if isinstance(make, tuple) else draw_value(rng, split, make)
    values = [draw(FIELDS[label]) for label in labels]
    page.kind = "form"
    if not two_columns(page, title, ink, [(f"{k}:", v) for k, v in zip(labels, values)], gap=rng.uniform(12, 50)):
        return None
    for i, (label, value) in enumerate(zip(labels, values)):
        field = label.lower()
        page.ask("read", (f"What is the {field}?", f"Read the {field}."), value)
        page.ask_box(f"the {field}", i + 1)
        if i:
            page.ask("relation", (f"What is above the {field}?", f"Which field is above the {field}?"), labels[i - 1])
        page.ask("yes/no", (f"Is there a field for the {field}?", f"Does the form give the {field}?"), "Yes")
    page.ask("read", ("What is the title?", "Read the title."), title)
    page.ask("colour", ("What colour is the title?", "What is the colour of the title?"), ink)
    page.ask("count", ("How many fields are there?", "How many fields does the form have?"), str(len(labels)))
    for label in rng.sample([k for k in FIELDS if k not in labels], len(labels)):
        field = label.lower()
        page.ask("yes/no", (f"Is there a field for the {field}?", f"Does the form give the {field}?"), "No")
    return page


def two_columns(page, title, ink, rows, gap):
    """Lays out a title and rows of a label and a value, a line each. Returns whether they fit."""
    rng, size = page.rng, page.size
    title_size = round(size * rng.uniform(1.0, 1.15))
    pitch, gap = size * rng.uniform(1.3, 1.6), page.px(gap)
    left = max(length(label, size) for label, _ in rows)
    width = max(left + gap + max(length(value, size) for _, value in rows), length(title, title_size))
    corner = page.fit(width, title_size * 1.4 + pitch * len(rows))
    if corner is None:
        return False
    x, y = corner
    aligned_right, ruled = page.kind == "receipt" or rng.random() < 0.3, rng.random() < 0.4
    title_x = x + rng.choice((0, (width - length(title, title_size)) / 2))
    page.line(title, page.write(title, title_x, y, title_size, ink))
    y += title_size * 1.4
    for label, value in rows:
        page.write(label, x, y)
        value_x = x + width - length(value, size) if aligned_right else x + left + gap
        _, top, right, bottom = page.write(value, value_x, y)
        page.line(f"{label} {value}", (x, top, right, bottom))
        if ruled:
            page.rules.append((x, y + 1.27 * size, x + width, y + 1.27 * size))
        y += pitch
    return True


def table(rng, split):
    """Two or three columns under a header, one to four rows, with or without a grid."""
    page = Page(rng)
    size, pad = page.size, page.px(rng.uniform(6, 12))
    pitch = size * rng.uniform(1.35, 1.6)
    columns = [rng.choice(("Item", "Name", "City"))]
    words = {"Item": ITEMS, "Name": NAMES, "City": CITIES}[columns[0]]
    columns += rng.sample(("Qty", "Cost", "Age", "Size"), rng.randint(1, 2))
    names = rng.sample(words, rng.randint(1, 4))
    cells = [[name] + [draw_value(rng, split, number) for _ in columns[1:]] for name in names]
    widths = [max(length(row[c], size) for row in [columns] + cells) + 2 * pad for c in range(len(columns))]
    corner = page.fit(sum(widths), pitch * (len(cells) + 1))
    if corner is None:
        return None
    x0, y0 = corner
    page.kind = "table"
    ink, grid = rng.choice(list(COLOURS)), rng.random() < 0.7
    for r, row in enumerate([columns] + cells):
        x, y = x0, y0 + r * pitch
        for c, text in enumerate(row):
            box = page.write(text, x + pad, y + (pitch - 1.25 * size) / 2, size, "black" if r else ink)
            if r and c:
                page.ask("read", (f"What is the {columns[c].lower()} of {row[0]}?",
                                  f"Read the {columns[c].lower()} of {row[0]}."), text)
                if sum(text in other for other in cells) == 1 and row.count(text) == 1:
                    page.ask("relation", (f"What is left of {text}?", f"Which entry is left of {text}?"), row[c - 1])
            x += widths[c]
        page.line(" ".join(row), (x0, box[1], x0 + sum(widths), box[3]))
        if r:
            page.ask_box(f"the row of {row[0]}", r)
            page.ask("yes/no", (f"Is {row[0]} in the table?", f"Does the table list {row[0]}?"), "Yes")
            if r > 1:
                page.ask("relation", (f"What is above {row[0]}?", f"Which entry is above {row[0]}?"), names[r - 2])
        if grid:
            page.rules.append((x0, y, x0 + sum(widths), y))
    if grid:
        bottom = y0 + pitch * (len(cells) + 1)
        page.rules.append((x0, bottom, x0 + sum(widths), bottom))
        for edge in [x0 + sum(widths[:c]) for c in range(len(columns) + 1)]:
            page.rules.append((edge, y0, edge, bottom))
    page.ask("colour", ("What colour is the header?", "What is the colour of the first line?"), ink)
    page.ask("count", ("How many rows are there below the header?", "How many entries does the table list?"),
             str(len(cells)))
    for name in rng.sample([w for w in words if w not in names], len(names)):
        page.ask("yes/no", (f"Is {name} in the table?", f"Does the table list {name}?"), "No")
    return page


def shapes(rng, split):
    """One to six coloured shapes on a grid of two or three columns, each with a letter or number beside it."""
    page = Page(rng)
    columns, rows = rng.choice(((2, 1), (2, 2), (3, 1), (3, 2), (2, 3), (3, 3)))
    cell_w, cell_h = page.px(rng.uniform(135, 158)), page.px(rng.uniform(140, 158))
    corner = page.fit(columns * cell_w, rows * cell_h)
    if corner is None:
        return None
    page.kind = "picture"
    grid = [(r, c) for r in range(rows) for c in range(columns)]
    places = sorted(rng.sample(grid, rng.randint(1, min(6, len(grid)))))
    looks = rng.sample([(colour, kind) for colour in COLOURS for kind in SHAPES], len(places))
    tags = rng.sample("ABCDEFGHJKLMNPRSTUVWXYZ", len(places))
    if rng.random() < 0.4:
        tags = [draw_value(rng, split, number) for _ in places]
    for i, ((r, c), (colour, kind), tag) in enumerate(zip(places, looks, tags)):
        side = min(page.px(rng.uniform(66, 92)), cell_h - 1.25 * page.size)
        x = corner[0] + c * cell_w + (cell_w - side) / 2 + page.px(rng.uniform(-8, 8))
        y = corner[1] + r * cell_h + page.px(rng.uniform(0, 6))
        box = (x, y, x + side, y + side)
        page.shapes.append((kind, colour, box))
        page.write(tag, x + (side - length(tag, page.size)) / 2, y + side)
        look = f"{colour} {kind}"
        page.line(f"{look} {tag}", box)
        page.ask("read", (f"What is written under the {look}?", f"Read the label of the {look}."), tag)
        page.ask_box(f"the {look}", i)
        page.ask("yes/no", (f"Is there a {look}?", f"Do you see a {look}?"), "Yes")
        if [k for _, k in looks].count(kind) == 1:
            page.ask("colour", (f"What colour is the {kind}?", f"What is the colour of the {kind}?"), colour)
        if tags.count(tag) == 1:
            page.ask("colour", (f"What colour is the shape labelled {tag}?", f"What is the colour of {tag}?"), colour)
        for where, other in (("left of", (r, c - 1)), ("above", (r - 1, c))):
            if other in places:
                answer = " ".join(looks[places.index(other)])
                page.ask("relation", (f"What is {where} the {look}?", f"Which shape is {where} the {look}?"), answer)
    for colour, kind in rng.sample([(k, s) for k in COLOURS for s in SHAPES if (k, s) not in looks], len(places)):
        page.ask("yes/no", (f"Is there a {colour} {kind}?", f"Do you see a {colour} {kind}?"), "No")
    page.ask("count", ("How many shapes are there?", "Count the shapes."), str(len(places)))
    kinds = [k for _, k in looks]
    kind = rng.choice(kinds)
    page.ask("count", (f"How many {plural(kind)} are there?", f"Count the {plural(kind)}."), str(kinds.count(kind)))
    return page


def note(rng, split):
    """One to three lines of a word or a value or two."""
    page = Page(rng)
    page.kind = "note"
    pick = lambda: rng.choice((rng.choice(NAMES + ITEMS + CITIES),
                               draw_value(rng, split, rng.choice((price, number, date, code)))))
    lines = [" ".join(pick() for _ in range(rng.randint(1, 2))) for _ in range(rng.randint(1, 3))]
    pitch, width = page.size * rng.uniform(1.35, 2.2), max(length(line, page.size) for line in lines)
    corner = page.fit(width, pitch * len(lines))
    if corner is None:
        return None
    for i, line in enumerate(lines):
        ink = rng.choice(("black", "black", "blue", "red"))
        page.line(line, page.write(line, corner[0], corner[1] + i * pitch, page.size, ink))
        place = ("first", "second", "third")[i]
        page.ask("read", (f"What is in the {place} line?", f"Read the {place} line."), line)
        page.ask_box(f"the {place} line", i)
    page.ask("count", ("How many lines are there?", "Count the lines."), str(len(lines)))
    return page


def plural(kind):
    return kind + ("es" if kind == "cross" else "s")


def make_page(rng, split, kinds=(receipt, receipt, form, form, table, table, shapes, shapes, note)):
    """A page of a random kind; layouts that do not fit on the page are drawn again."""
    while True:
        page = rng.choice(kinds)(rng, split)
        if page is not None:
            return page


def caption(page, rng):
    """A conversation of one turn that asks for all that is on the page."""
    text = "\n".join(page.lines)
    if page.kind == "picture":
        return [(rng.choice(("Describe the picture.", "List the shapes.")), text)]
    return [(rng.choice(("Transcribe the document.", "Read all of the text.")), text)]


def listing(page, rng):
    """A conversation of one turn that asks for every line and where it lies."""
    return [(rng.choice(("List the lines with their boxes.", "What is where?")),
             "\n".join(page.placed(i) for i in range(len(page.lines))))]


EVERYTHING = {"read": 4, "box": 2, "relation": 1.5, "colour": 1, "count": 1, "yes/no": 1}
FINDING = {"read": 3, "box": 2, "relation": 5, "colour": 1}  # by a name, row, column or neighbour
NEIGHBOURS = {"read": 4, "relation": 8, "box": 1, "count": 1}


def questions(page, rng, most, weights=EVERYTHING):
    """Up to `most` facts, of kinds drawn by these weights: [(kind, question, answer)]."""
    by_kind = {}
    for fact in rng.sample(page.facts, len(page.facts)):
        if fact[0] in weights:
            by_kind.setdefault(fact[0], []).append(fact)
    chosen = []
    while by_kind and len(chosen) < most:
        kind = rng.choices(list(by_kind), [weights[k] for k in by_kind])[0]
        chosen.append(by_kind[kind].pop())
        if not by_kind[kind]:
            del by_kind[kind]
    return chosen


def lookups(rng, split, most, whose=0.3, all_of_them=0.0):
    """Two to four stated values, without an image, and up to `most` questions about them: [(question, answer)].

    whose: the share of the questions that ask for the name. all_of_them: the share of the conversations that ask
    whose each value is first: where a name follows its value at once, finding it by the value is learnt sooner.
    """
    what, make = rng.choice((("code", code), ("number", number), ("date", date), ("price", price)))
    names = rng.sample(NAMES if what != "price" else ITEMS, rng.randint(2, 4))
    values = [draw_value(rng, split, make) for _ in names]
    said = " ".join(f"The {what} of {n} is {v}." for n, v in zip(names, values))
    turns = [(f"Whose {what} is {v}?", n) if rng.random() < whose else (f"What is the {what} of {n}?", v)
             for n, v in rng.sample(list(zip(names, values)), len(names))][:most]
    if all_of_them and rng.random() < all_of_them:
        each = rng.sample(list(zip(names, values)), len(names))
        turns.insert(0, (f"Whose is each {what}?", " ".join(f"{v} {n}." for n, v in each)))
    return [(f"{said} {turns[0][0]}", turns[0][1]), *turns[1:]]


def conversation(turns, image):
    """LLaVA's list of turns from [(question, answer)]."""
    said = []
    for i, (question, answer) in enumerate(turns):
        said.append({"from": "human", "value": ("<image>\n" if image and i == 0 else "") + question})
        said.append({"from": "gpt", "value": answer})
    return said


def sample(split, phase, index, seed):
    """Sample `index` of a file: (LLaVA entry, JPEG bytes or None). Depends on its arguments only."""
    rng = random.Random(f"{seed}/{split}/{phase}/{index}")
    name, turns = f"{split}-{phase}-{index:06d}", []
    if phase == "instructions" and rng.random() < 0.08:
        turns = lookups(rng, split, 1 if split == "val" else 4)
    elif phase == "lookups":
        turns = lookups(rng, split, 4, whose=0.6, all_of_them=0.7)
    if turns:
        return {"id": f"text-{index}", "conversations": conversation(turns, image=False)}, None
    if phase == "captions":
        page = make_page(rng, split, (receipt, form, table, shapes, note, note))
        turns, kind = caption(page, rng), "caption"
    elif phase == "finding":
        page = make_page(rng, split, (receipt, form, table, table, shapes, shapes, shapes, note))
        turns, kind = [fact[1:] for fact in questions(page, rng, 12, FINDING)], "finding"
    elif phase == "neighbours":
        page = make_page(rng, split, (table, table, table, receipt, receipt, form, form, shapes, shapes))
        turns, kind = [fact[1:] for fact in questions(page, rng, 14, NEIGHBOURS)], "neighbours"
    else:
        page = make_page(rng, split)
        facts = questions(page, rng, 1 if split == "val" else 14 if phase == "pages" else 10)
        turns, kind = [fact[1:] for fact in facts], facts[0][0] if split == "val" else "instructions"
    path = f"images/{name[:-3]}/{name}.jpg"
    return {"id": f"{kind}-{index}", "image": path, "conversations": conversation(turns, image=True)}, page.jpeg()


FILES = {  # file: split, phase, number of samples
    "captions.json": ("train", "captions", 8_000),
    "instructions.json": ("train", "instructions", 8_000),
    "finding.json": ("train", "finding", 16_000),
    "pages.json": ("train", "pages", 16_000),
    "lookups.json": ("train", "lookups", 16_000),
    "neighbours.json": ("train", "neighbours", 20_000),
    "val-captions.json": ("val", "captions", 200),
    "val-instructions.json": ("val", "instructions", 1_000),
}


def write_sample(job):
    out, split, phase, index, seed = job
    entry, jpeg = sample(split, phase, index, seed)
    if jpeg is not None:
        path = Path(out) / entry["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)
    return entry


def generate(out, files=FILES, seed=0, workers=WORKERS, quiet=False):
    """Writes LLaVA JSON files and their images below `out`; a JSON file appears when its images are all there."""
    out = Path(out)
    files = {name: what for name, what in files.items() if not (out / name).is_file()}
    if not files:
        return
    with get_context("spawn").Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:  # Ctrl-C is ours
        for name, (split, phase, count) in files.items():
            jobs = ((str(out), split, phase, i, seed) for i in range(count))
            entries = list(tqdm(pool.imap(write_sample, jobs, chunksize=32), name, count, disable=quiet, unit="image"))
            out.mkdir(parents=True, exist_ok=True)
            new = out / f"{name}.{os.getpid()}.tmp"
            new.write_text(json.dumps(entries))
            new.replace(out / name)


def write_examples(folder):
    """Six pages of validation values, one of each kind and a second receipt, to look at and to ask about."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for kind in (receipt, form, table, shapes, note):
        page = make_page(random.Random(f"example/{kind.__name__}"), "val", (kind,))
        page.image().save(Path(folder) / f"{kind.__name__}.png")
    (Path(folder) / "receipt.jpg").write_bytes(make_page(random.Random("example/0"), "val", (receipt,)).jpeg())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--examples", metavar="FOLDER", help="only write the six example images")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}: it should be at least 1")
    try:
        if args.examples:
            write_examples(args.examples)
        else:
            for name in FILES:
                if (args.out / name).is_file():
                    print(f"{args.out / name} is there and stays, whatever its seed", file=sys.stderr)
            generate(args.out, seed=args.seed, workers=args.workers)
    except OSError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
