"""Draws documents and writes questions about them in LLaVA's format: the data of the small model.

    python -m data.nano.generate --out data/nano/out    # all files; train.py draws those it lacks

A page is a receipt, a form, a table, a picture of labelled shapes, or a note. The code that lays it
out knows where everything is, so it also writes the questions and their answers. Positions are in
pixels of the image file. Only the boxes in answers are fractions of the padded square that the
model sees, as in LLaVA's data.

The seed determines every file, because all random numbers come from it in a fixed order. A price,
number, date or code is used either for training or for validation, never for both, so that the
model has to read it: it cannot have memorised it.
"""
import argparse
import io
import json
import math
import os
import random
import signal
import sys
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from data.errors import check_ranges, print_error, tell
from data.nano.letters import Print, Text, draw_print, length

WORKERS = min(8, os.cpu_count() or 1)  # processes that draw pages

# Pages are laid out in units that do not depend on the resolution of the image file: the square
# that a page is padded to has a side of 512 units, and a visual token covers 64 x 64 of them.
UNITS = 512
FONT_SIZES = 42, 54  # two or three characters are as wide as a visual token

COLOURS = {
    "red": (210, 40, 40), "green": (30, 140, 60), "blue": (40, 80, 200), "orange": (240, 140, 20),
    "purple": (130, 50, 160), "pink": (240, 130, 180), "brown": (125, 80, 40),
    "black": (25, 25, 25)}
LIGHT_COLOURS = {  # of letters on dark paper
    "red": (250, 90, 90), "green": (90, 220, 120), "blue": (110, 160, 255),
    "orange": (250, 160, 50), "purple": (190, 120, 230), "pink": (250, 160, 200),
    "white": (240, 240, 240)}
PAPERS = ((255, 255, 255), (250, 246, 232), (236, 240, 246), (240, 240, 236), (246, 236, 236),
          (234, 246, 238))
DARK_PAPERS = ((20, 20, 20), (32, 36, 44), (22, 38, 60), (48, 28, 32), (24, 46, 36))
RULE_COLOUR = (150, 150, 150)
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # without I, O and Q, which look like 1, 0 and O

SHOPS = ("Corner Shop", "Green Market", "Blue Cafe", "Book Barn", "Sunny Deli", "City Store",
         "Old Mill", "Star Bakery", "River Cafe", "Happy Mart", "North Shop", "Garden Hut")
ITEMS = ("Tea", "Coffee", "Bread", "Milk", "Apple", "Rice", "Soap", "Cake", "Salt", "Honey",
         "Juice", "Pasta", "Eggs", "Butter", "Sugar", "Lemon", "Onion", "Candle", "Paper", "Pen",
         "Cheese", "Soup", "Beans", "Water", "Plum")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack", "Kate",
         "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor")
CITIES = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Madrid", "Vienna", "Dublin",
          "Prague", "Quito", "Seoul", "Bern", "Turin", "Lyon")
TITLES = ("Entry Form", "Ticket", "Visitor Pass", "Order Form", "Travel Card", "Library Card",
          "Parcel", "Badge")


# ---- Values: what a model has to read, because it cannot guess it ----

def is_for(value, split):
    """Whether a value belongs to "train" or "val": one in eight checksums is for validation."""
    return (zlib.crc32(value.encode()) % 8 == 0) == (split == "val")


def draw_value(rng, split, make):
    """Calls make(rng) until the value belongs to the split."""
    while True:
        value = make(rng)
        if is_for(value, split):
            return value


def price(rng):
    dollars = rng.choice((rng.randint(0, 9), rng.randint(10, 99)))  # one digit as often as two
    return f"{dollars}.{rng.randint(1, 99):02d}"


def number(rng):
    return str(rng.randint(10, 999))


def date(rng):
    year, month, day = rng.randint(2001, 2029), rng.randint(1, 12), rng.randint(1, 28)
    return rng.choice((f"{year}-{month:02d}-{day:02d}", f"{day:02d}/{month:02d}/{year}"))


def code(rng):
    letters = rng.choice(LETTERS) + rng.choice(LETTERS)
    return rng.choice((f"{letters}-{rng.randint(100, 999)}", f"{letters}{rng.randint(10, 99)}"))


def draw_prices(rng, split, count):
    """Prices and their total, all of which belong to the split."""
    while True:
        prices = [draw_value(rng, split, price) for _ in range(count)]
        total = f"{sum(map(float, prices)):.2f}"
        if is_for(total, split):
            return prices, total


FIELDS = {  # of a form: the words to choose from, or the function that makes a value
    "Name": NAMES, "City": CITIES, "Date": date, "Code": code, "Room": number, "Seat": code,
    "Order": number, "Origin": CITIES, "Expiry": date, "Fee": price}


def draw_field(rng, split, label):
    """The word or value that a form has in this field."""
    source = FIELDS[label]
    return rng.choice(source) if isinstance(source, tuple) else draw_value(rng, split, source)


def word_or_value(rng, split):
    """A word, or as often a value."""
    word = rng.choice(NAMES + ITEMS + CITIES)
    value = draw_value(rng, split, rng.choice((price, number, date, code)))
    return rng.choice((word, value))


def draw_absent(rng, choices, present):
    """As many choices that are not on the page as are on it: "No" is as frequent as "Yes"."""
    return rng.sample([choice for choice in choices if choice not in present], len(present))


# ---- The page: what is drawn on it, and what can be asked about it ----

class Shape(NamedTuple):
    kind: str
    colour: str
    box: tuple


class Fact(NamedTuple):
    """A question about a page. Its kind is one of those in EVERYTHING below."""
    kind: str
    question: str
    answer: str


IS_IT_THERE = {  # the wordings of a yes/no question, by kind of page
    "receipt": ("Is {} on the receipt?", "Did they buy {}?"),
    "form": ("Is there a field for the {}?", "Does the form give the {}?"),
    "table": ("Is {} in the table?", "Does the table list {}?"),
    "picture": ("Is there a {}?", "Do you see a {}?"),
}


class Page:
    """A page of random size, paper and rotation, empty until one of the functions below fills it.

    Everything is laid out upright, in pixels. Only `image` and `box_in_square` apply the rotation.
    """

    def __init__(self, rng, kind, look=None):
        self.rng = rng
        self.kind = kind  # "receipt", "form", "table", "picture" or "note"
        # Pixels per layout unit. The model sees 512 pixels: some pages have fewer, most have more.
        self.unit = rng.choice((0.85, 1.0, 1.0, 1.25, 1.5, 1.75)) * rng.uniform(0.95, 1.05)
        self.side = round(UNITS * self.unit)  # of the square that the page is padded to
        self.size = round(rng.uniform(*FONT_SIZES) * self.unit)  # of the font
        self.look = look or draw_print(rng)
        self.dark = look is None and kind != "picture" and rng.random() < 0.12
        self.paper = rng.choice(DARK_PAPERS if self.dark else PAPERS)
        self.colours = LIGHT_COLOURS if self.dark else COLOURS  # of letters
        self.ink = "white" if self.dark else "black"  # of most letters
        self.title_inks = [colour for colour in self.colours if colour != "white"]
        self.fading = rng.uniform(0, 0.45) if look is None and rng.random() < 0.4 else 0.0
        self.blur = rng.uniform(0.3, 1.1) if look is None and rng.random() < 0.3 else 0.0
        self.angle = rng.choice((0, rng.uniform(-1.5, 1.5)))  # in degrees
        self.width = self.height = 0  # set by `place`

        # What is drawn
        self.texts = []  # of Text
        self.shapes = []  # of Shape
        self.rules = []  # straight lines (x1, y1, x2, y2)

        # What can be asked
        self.lines = []  # the transcription
        self.boxes = []  # one for each line
        self.facts = []  # of Fact

    def px(self, units):
        return units * self.unit

    # Laying out

    def place(self, width, height):
        """Chooses the page's size and where on it content of this size goes.

        Returns the content's top left corner (x, y), or None if it is too large for any page.
        """
        margin = self.px(14)
        least_width, least_height = math.ceil(width + 2 * margin), math.ceil(height + 2 * margin)
        if max(least_width, least_height) > self.side:
            return None
        self.width = self.height = self.side
        orientation = self.rng.choice(("portrait", "landscape", "square"))
        if orientation == "portrait":
            self.width = self.rng.randint(least_width, self.side)
        elif orientation == "landscape":
            self.height = self.rng.randint(least_height, self.side)
        x = self.rng.uniform(margin, self.width - width - margin)
        y = self.rng.uniform(margin, self.height - height - margin)
        return x, y

    def length(self, text, size=None):
        """The width of a text in pixels."""
        return length(text, size or self.size, self.look)

    def write(self, string, x, y, size=None, colour=None):
        """Writes one line of text with its top left corner at x, y. Returns its box."""
        text = Text(string, x, y, size or self.size, colour or self.ink, self.look)
        self.texts.append(text)
        return text.box()

    def add_line(self, string, box):
        """Adds a line to the transcription."""
        self.lines.append(string)
        self.boxes.append(box)

    # Questions

    def ask(self, kind, wordings, answer):
        """Adds a fact, its question in one of the wordings."""
        self.facts.append(Fact(kind, self.rng.choice(wordings), answer))

    def ask_box(self, thing, line):
        """Asks where a thing is. The answer quotes its line, given by number, before the box."""
        wordings = (f"Where is {thing}?", f"Give the box of {thing}.")
        self.ask("box", wordings, self.line_with_box(line))

    def ask_presence(self, thing, answer):
        """Asks whether a thing is on the page. The answer is "Yes" or "No"."""
        self.ask("yes/no", [wording.format(thing) for wording in IS_IT_THERE[self.kind]], answer)

    def line_with_box(self, line):
        """A line of the transcription and its box: "Total 12.75 [0.05, 0.70, 0.93, 0.79]"."""
        box = self.box_in_square(self.boxes[line])
        numbers = ", ".join(f"{min(max(v, 0), 1):.2f}" for v in box)
        return f"{self.lines[line]} [{numbers}]"

    # Positions on the finished image

    def rotate(self, x, y):
        """Where a point lies after the page was rotated about its centre."""
        angle = math.radians(-self.angle)  # Pillow rotates counter-clockwise
        cx, cy = self.width / 2, self.height / 2
        dx, dy = x - cx, y - cy
        return (cx + dx * math.cos(angle) - dy * math.sin(angle),
                cy + dx * math.sin(angle) + dy * math.cos(angle))

    def box_in_square(self, box):
        """A box in pixels -> the box around it after the rotation, in fractions of the square."""
        x1, y1, x2, y2 = box
        corners = [self.rotate(x, y) for x in (x1, x2) for y in (y1, y2)]
        left, top = (self.side - self.width) / 2, (self.side - self.height) / 2  # the padding
        xs = [(x + left) / self.side for x, _ in corners]
        ys = [(y + top) / self.side for _, y in corners]
        return min(xs), min(ys), max(xs), max(ys)

    def symbols(self):
        """All shapes, then all characters: [(symbol, colour, box in fractions of the square)]."""
        symbols = []
        for shape in self.shapes:
            symbols.append((shape.kind, shape.colour, self.box_in_square(shape.box)))
        for text in self.texts:
            for i, char in enumerate(text.string):
                if char != " ":
                    symbols.append((char, text.colour, self.box_in_square(text.box(i, i + 1))))
        return symbols

    # Drawing

    def image(self):
        """The page as an RGB image. Each call draws new noise."""
        # Upright: lines, shapes, text
        image = Image.new("RGB", (self.width, self.height), self.paper)
        draw = ImageDraw.Draw(image)
        for rule in self.rules:
            draw.line(rule, fill=RULE_COLOUR, width=max(1, round(self.px(2))))
        for shape in self.shapes:
            draw_shape(draw, shape.kind, COLOURS[shape.colour], shape.box)
        for text in self.texts:
            rgb = zip(self.colours[text.colour], self.paper)
            text.draw(image, tuple(round(c + self.fading * (p - c)) for c, p in rgb))

        # Rotation
        if self.angle:
            image = image.rotate(self.angle, Image.Resampling.BICUBIC, fillcolor=self.paper)

        # A photograph that is a little out of focus
        if self.blur:
            image = image.filter(ImageFilter.GaussianBlur(self.px(self.blur)))

        # Grey noise on half of the pages
        strength = self.rng.choice((0, 0, 4, 9))
        if strength:
            numpy_rng = np.random.default_rng(self.rng.getrandbits(32))
            noise = numpy_rng.normal(0, strength, (self.height, self.width, 1)).astype(np.float32)
            image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
        return image

    def jpeg(self):
        buffer = io.BytesIO()
        self.image().save(buffer, "JPEG", quality=self.rng.randint(55, 92))
        return buffer.getvalue()


def draw_shape(draw, kind, colour, box):
    left, top, right, bottom = box
    cx, cy, radius = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
    if kind == "circle":
        draw.ellipse(box, fill=colour)
    elif kind == "square":
        draw.rectangle(box, fill=colour)
    elif kind == "triangle":
        draw.polygon([(cx, top), (right, bottom), (left, bottom)], fill=colour)
    elif kind == "diamond":
        draw.polygon(corners_around(cx, cy, [radius] * 4), fill=colour)
    elif kind == "star":
        draw.polygon(corners_around(cx, cy, [radius, 0.45 * radius] * 5), fill=colour)
    else:  # a cross: two bars
        half = 0.32 * radius
        draw.rectangle((left, cy - half, right, cy + half), fill=colour)
        draw.rectangle((cx - half, top, cx + half, bottom), fill=colour)


def corners_around(cx, cy, radii):
    """The corners of a polygon at equal angles about its centre, clockwise from the top."""
    corners = []
    for i, radius in enumerate(radii):
        angle = math.radians(-90 + i * 360 / len(radii))
        corners.append((cx + radius * math.cos(angle), cy + radius * math.sin(angle)))
    return corners


# ---- The kinds of pages: each function returns a page, or None where its content does not fit ----

def lay_out_rows(page, title, ink, rows, gap):
    """Lays out a title and rows (label, value), one below the other. Returns whether they fit.

    gap: the least space between a label and its value, in layout units.
    """
    # Sizes
    rng, size = page.rng, page.size
    title_size = round(size * rng.uniform(1.0, 1.15))
    title_width, title_height = page.length(title, title_size), title_size * 1.4
    row_height = size * rng.uniform(1.3, 1.6)
    label_width = max(page.length(label) for label, _ in rows)
    value_width = max(page.length(value) for _, value in rows)
    gap = page.px(gap)
    width = max(label_width + gap + value_width, title_width)
    corner = page.place(width, title_height + row_height * len(rows))
    if corner is None:
        return False
    x, y = corner

    # Style
    aligned_right = page.kind == "receipt" or rng.random() < 0.3
    ruled = rng.random() < 0.4
    title_x = x + rng.choice((0, (width - title_width) / 2))  # at the left or in the middle

    # The title, then the rows
    page.add_line(title, page.write(title, title_x, y, title_size, ink))
    y += title_height
    for label, value in rows:
        page.write(label, x, y)
        value_x = x + width - page.length(value) if aligned_right else x + label_width + gap
        _, top, right, bottom = page.write(value, value_x, y)
        page.add_line(f"{label} {value}", (x, top, right, bottom))
        if ruled:
            rule_y = y + 1.27 * size
            page.rules.append((x, rule_y, x + width, rule_y))
        y += row_height
    return True


def receipt(rng, split, look=None):
    """A shop's name, often a date, two to four items with their prices, and the total."""
    # Content
    page = Page(rng, "receipt", look)
    shop, ink = rng.choice(SHOPS), rng.choice(page.title_inks)
    items = rng.sample(ITEMS, rng.randint(2, 4))
    prices, total = draw_prices(rng, split, len(items))
    rows = [*zip(items, prices), ("Total", total)]
    if rng.random() < 0.5:
        rows.insert(0, ("Date", draw_value(rng, split, date)))

    # Layout
    if not lay_out_rows(page, shop, ink, rows, gap=rng.uniform(16, 70)):
        return None

    # Questions about the rows
    for line, (name, value) in enumerate(rows, start=1):  # line 0 is the shop's name
        label = f"price of {name}" if name in items else name.lower()
        page.ask("read", (f"What is the {label}?", f"Read the {label}."), value)
        page.ask_box(f"the {label}", line)
        if name in items:
            if name != items[0]:
                above = items[items.index(name) - 1]
                wordings = (f"What is above {name}?", f"Which item is above {name}?")
                page.ask("relation", wordings, above)
            page.ask_presence(name, "Yes")

    # Questions about all of it
    page.ask("read", ("What is the name of the shop?", "Which shop is it?"), shop)
    page.ask("colour", ("What colour is the title?", "What is the colour of the shop's name?"), ink)
    count = str(len(items))
    page.ask("count", ("How many items are there?", "How many items were bought?"), count)
    for item in draw_absent(rng, ITEMS, items):
        page.ask_presence(item, "No")
    return page


def form(rng, split, look=None):
    """A title and two to five labelled fields."""
    # Content
    page = Page(rng, "form", look)
    title, ink = rng.choice(TITLES), rng.choice(page.title_inks)
    labels = rng.sample(list(FIELDS), rng.randint(2, 5))
    rows = [(f"{label}:", draw_field(rng, split, label)) for label in labels]

    # Layout
    if not lay_out_rows(page, title, ink, rows, gap=rng.uniform(12, 50)):
        return None

    # Questions about the fields
    for i, (label, (_, value)) in enumerate(zip(labels, rows)):
        field = label.lower()
        page.ask("read", (f"What is the {field}?", f"Read the {field}."), value)
        page.ask_box(f"the {field}", i + 1)  # line 0 is the title
        if i:
            wordings = (f"What is above the {field}?", f"Which field is above the {field}?")
            page.ask("relation", wordings, labels[i - 1])
        page.ask_presence(field, "Yes")

    # Questions about all of it
    page.ask("read", ("What is the title?", "Read the title."), title)
    page.ask("colour", ("What colour is the title?", "What is the colour of the title?"), ink)
    count = str(len(labels))
    page.ask("count", ("How many fields are there?", "How many fields does the form have?"), count)
    for label in draw_absent(rng, FIELDS, labels):
        page.ask_presence(label.lower(), "No")
    return page


def lay_out_cells(page, corner, rows, widths, row_height, padding, ink):
    """Writes a table, its first row in the colour `ink`. A line of the transcription is a row."""
    left, top = corner
    for i, row in enumerate(rows):
        x, y = left, top + i * row_height
        text_y = y + (row_height - 1.25 * page.size) / 2
        colour = ink if i == 0 else page.ink
        for text, width in zip(row, widths):
            _, text_top, _, text_bottom = page.write(text, x + padding, text_y, colour=colour)
            x += width
        page.add_line(" ".join(row), (left, text_top, left + sum(widths), text_bottom))


def draw_grid(page, corner, widths, row_height, num_rows):
    """Draws lines between a table's cells and around them."""
    left, top = corner
    right, bottom = left + sum(widths), top + row_height * num_rows
    for i in range(num_rows + 1):
        y = top + i * row_height
        page.rules.append((left, y, right, y))
    for i in range(len(widths) + 1):
        x = left + sum(widths[:i])
        page.rules.append((x, top, x, bottom))


def ask_about_cells(page, rows, line):
    """Asks for each value of one row of a table, and what is left of it."""
    header, row = rows[0], rows[line]
    values = [text for row in rows[1:] for text in row]
    for column in range(1, len(header)):
        value = row[column]
        what = f"the {header[column].lower()} of {row[0]}"
        page.ask("read", (f"What is {what}?", f"Read {what}."), value)
        if values.count(value) == 1:  # else the question would have two answers
            wordings = (f"What is left of {value}?", f"Which entry is left of {value}?")
            page.ask("relation", wordings, row[column - 1])


def table(rng, split, look=None):
    """Two or three columns under a header, one to four rows, with or without a grid."""
    # Content
    page = Page(rng, "table", look)
    padding = page.px(rng.uniform(6, 12))
    row_height = page.size * rng.uniform(1.35, 1.6)
    names_of = {"Item": ITEMS, "Name": NAMES, "City": CITIES}
    first = rng.choice(list(names_of))
    header = [first] + rng.sample(("Qty", "Cost", "Age", "Size"), rng.randint(1, 2))
    names = rng.sample(names_of[first], rng.randint(1, 4))
    rows = [header]
    for name in names:
        rows.append([name] + [draw_value(rng, split, number) for _ in header[1:]])

    # Layout
    columns = zip(*rows)
    widths = [2 * padding + max(page.length(text) for text in column) for column in columns]
    corner = page.place(sum(widths), row_height * len(rows))
    if corner is None:
        return None
    ink = rng.choice(page.title_inks)
    lay_out_cells(page, corner, rows, widths, row_height, padding, ink)
    if rng.random() < 0.7:
        draw_grid(page, corner, widths, row_height, len(rows))

    # Questions
    for line, name in enumerate(names, start=1):  # line 0 is the header
        ask_about_cells(page, rows, line)
        page.ask_box(f"the row of {name}", line)
        page.ask_presence(name, "Yes")
        if line > 1:
            above = rows[line - 1][0]
            page.ask("relation", (f"What is above {name}?", f"Which entry is above {name}?"), above)
    page.ask("colour", ("What colour is the header?", "What is the colour of the first line?"), ink)
    page.ask("count", ("How many rows are there below the header?",
                       "How many entries does the table list?"), str(len(names)))
    for name in draw_absent(rng, names_of[first], names):
        page.ask_presence(name, "No")
    return page


def draw_labelled_shape(page, corner, cell_size, cell, appearance, label):
    """Puts a shape near the middle of its cell and a label below it. Both are one line."""
    (width, height), (row, column), (colour, kind) = cell_size, cell, appearance
    rng = page.rng
    side = min(page.px(rng.uniform(66, 92)), height - 1.25 * page.size)  # leaves room for the label
    x = corner[0] + column * width + (width - side) / 2 + page.px(rng.uniform(-8, 8))
    y = corner[1] + row * height + page.px(rng.uniform(0, 6))
    box = (x, y, x + side, y + side)
    page.shapes.append(Shape(kind, colour, box))
    page.write(label, x + (side - page.length(label)) / 2, y + side)
    page.add_line(f"{colour} {kind} {label}", box)


def ask_about_shape(page, line, cell, appearances, labels):
    """Asks about the shape in a cell, which is this line of the transcription."""
    row, column = cell
    colour, kind = appearances[cell]
    label = labels[cell]
    shape = f"{colour} {kind}"
    wordings = (f"What is written under the {shape}?", f"Read the label of the {shape}.")
    page.ask("read", wordings, label)
    page.ask_box(f"the {shape}", line)
    page.ask_presence(shape, "Yes")

    # Its colour, asked only where its kind or its label belongs to no other shape
    kinds = [kind for _, kind in appearances.values()]
    if kinds.count(kind) == 1:
        wordings = (f"What colour is the {kind}?", f"What is the colour of the {kind}?")
        page.ask("colour", wordings, colour)
    if list(labels.values()).count(label) == 1:
        page.ask("colour", (f"What colour is the shape labelled {label}?",
                            f"What is the colour of {label}?"), colour)

    # Its neighbours
    for direction, neighbour in (("left of", (row, column - 1)), ("above", (row - 1, column))):
        if neighbour in appearances:
            thing = f"{direction} the {shape}"
            answer = " ".join(appearances[neighbour])
            page.ask("relation", (f"What is {thing}?", f"Which shape is {thing}?"), answer)


def shapes(rng, split, look=None):
    """One to six coloured shapes in a grid of cells, under each a letter or a number."""
    # Layout
    page = Page(rng, "picture", look)
    columns, rows = rng.choice(((2, 1), (2, 2), (3, 1), (3, 2), (2, 3), (3, 3)))
    cell_size = page.px(rng.uniform(135, 158)), page.px(rng.uniform(140, 158))  # width, height
    corner = page.place(columns * cell_size[0], rows * cell_size[1])
    if corner is None:
        return None

    # Content: the cells with a shape, each one's appearance (colour, kind) and label
    grid = [(row, column) for row in range(rows) for column in range(columns)]
    cells = sorted(rng.sample(grid, rng.randint(1, min(6, len(grid)))))
    all_appearances = [(colour, kind) for colour in COLOURS for kind in SHAPES]
    appearances = dict(zip(cells, rng.sample(all_appearances, len(cells))))
    labels = dict(zip(cells, rng.sample(LETTERS, len(cells))))
    if rng.random() < 0.4:
        labels = {cell: draw_value(rng, split, number) for cell in cells}

    # Each shape and the questions about it
    for line, cell in enumerate(cells):
        draw_labelled_shape(page, corner, cell_size, cell, appearances[cell], labels[cell])
        ask_about_shape(page, line, cell, appearances, labels)

    # Questions about all of it
    for colour, kind in draw_absent(rng, all_appearances, appearances.values()):
        page.ask_presence(f"{colour} {kind}", "No")
    page.ask("count", ("How many shapes are there?", "Count the shapes."), str(len(cells)))
    kinds = [kind for _, kind in appearances.values()]
    kind = rng.choice(kinds)
    count = str(kinds.count(kind))
    plural = kind + ("es" if kind == "cross" else "s")
    page.ask("count", (f"How many {plural} are there?", f"Count the {plural}."), count)
    return page


def note(rng, split, look=None):
    """One to three lines, each of one or two words or values."""
    # Content
    page = Page(rng, "note", look)
    lines = []
    for _ in range(rng.randint(1, 3)):
        lines.append(" ".join(word_or_value(rng, split) for _ in range(rng.randint(1, 2))))

    # Layout
    line_height = page.size * rng.uniform(1.35, 2.2)
    corner = page.place(max(page.length(line) for line in lines), line_height * len(lines))
    if corner is None:
        return None
    x, y = corner

    # Each line and the questions about it
    for i, line in enumerate(lines):
        ink = rng.choice((page.ink, page.ink, "blue", "red"))
        page.add_line(line, page.write(line, x, y + i * line_height, colour=ink))
        ordinal = ("first", "second", "third")[i]
        page.ask("read", (f"What is in the {ordinal} line?", f"Read the {ordinal} line."), line)
        page.ask_box(f"the {ordinal} line", i)
    page.ask("count", ("How many lines are there?", "Count the lines."), str(len(lines)))
    return page


# Kinds to draw pages from; one that stands here twice is twice as frequent.
ALL_PAGES = (receipt, receipt, form, form, table, table, shapes, shapes, note)
CAPTION_PAGES = (receipt, form, table, shapes, note, note)
NEIGHBOUR_PAGES = (table, table, table, receipt, receipt, form, form, shapes, shapes)


def make_page(rng, split, kinds=ALL_PAGES, look=None):
    """A page of a random kind. Draws another where the content of one does not fit.

    look: the print of its letters, on light paper and sharp; None: as training draws it.
    """
    while True:
        page = rng.choice(kinds)(rng, split, look)
        if page is not None:
            return page


# ---- Conversations: lists of turns (question, answer) ----

# Weights of the kinds of facts: how often each is asked, relative to the others.
EVERYTHING = {"read": 4, "box": 2, "relation": 1.5, "colour": 1, "count": 1, "yes/no": 1}
NEIGHBOURS = {"read": 4, "relation": 8, "box": 1, "count": 1}


def caption(page, rng):
    """One turn that asks for all that is on the page."""
    if page.kind == "picture":
        question = rng.choice(("Describe the picture.", "List the shapes."))
    else:
        question = rng.choice(("Transcribe the document.", "Read all of the text."))
    return [(question, "\n".join(page.lines))]


def listing(page, rng):
    """One turn that asks for every line and its box."""
    question = rng.choice(("List the lines with their boxes.", "What is where?"))
    return [(question, "\n".join(page.line_with_box(i) for i in range(len(page.lines))))]


def questions(page, rng, limit, weights=EVERYTHING):
    """Draws up to `limit` of a page's facts; the weights say how likely each kind is."""
    # All facts in random order, by kind
    by_kind = {}
    for fact in rng.sample(page.facts, len(page.facts)):
        if fact.kind in weights:
            by_kind.setdefault(fact.kind, []).append(fact)

    # A random kind, then a fact of it, until none are left
    facts = []
    while by_kind and len(facts) < limit:
        kind, = rng.choices(list(by_kind), [weights[kind] for kind in by_kind])
        facts.append(by_kind[kind].pop())
        if not by_kind[kind]:
            del by_kind[kind]
    return facts


def turns_of(facts):
    return [(fact.question, fact.answer) for fact in facts]


def lookups(rng, split, limit, ask_name=0.3, ask_all=0.0):
    """Turns without an image: facts such as "The code of Anna is XK-52." and questions about them.

    limit: the most questions. ask_name: the share of them that give a value and ask for its name.
    ask_all: the share of conversations that first ask for the names of all values. In that answer
    each name follows its value, from which the model learns sooner to find a name by its value.
    """
    # Two to four facts
    what, make = rng.choice((("code", code), ("number", number), ("date", date), ("price", price)))
    names = rng.sample(ITEMS if what == "price" else NAMES, rng.randint(2, 4))
    pairs = [(name, draw_value(rng, split, make)) for name in names]
    statement = " ".join(f"The {what} of {name} is {value}." for name, value in pairs)

    # A question about each, in another order
    turns = []
    for name, value in rng.sample(pairs, len(pairs)):
        if rng.random() < ask_name:
            turns.append((f"Whose {what} is {value}?", name))
        else:
            turns.append((f"What is the {what} of {name}?", value))
    turns = turns[:limit]
    if ask_all and rng.random() < ask_all:
        shuffled = rng.sample(pairs, len(pairs))
        answer = " ".join(f"{value} {name}." for name, value in shuffled)
        turns.insert(0, (f"Whose is each {what}?", answer))

    # The facts stand before the first question
    question, answer = turns[0]
    return [(f"{statement} {question}", answer), *turns[1:]]


def conversation(turns, has_image):
    """Turns -> LLaVA's list of messages; "<image>" stands before the first question."""
    messages = []
    for question, answer in turns:
        messages.append({"from": "human", "value": question})
        messages.append({"from": "gpt", "value": answer})
    if has_image:
        messages[0]["value"] = "<image>\n" + messages[0]["value"]
    return messages


# ---- Files ----

# Of each task: the kinds of its pages, the most questions about one page, and how often each kind
# of question is asked. Two tasks are not listed: "captions" transcribe a page, and "lookups" have
# no image.
TASKS = {
    "instructions": (ALL_PAGES, 10, EVERYTHING),
    "pages": (ALL_PAGES, 14, EVERYTHING),
    "neighbours": (NEIGHBOUR_PAGES, 14, NEIGHBOURS),
}
TRANSCRIBED = 0.3  # of the conversations also ask for a transcription: else phase 3 forgets it

FILES = {  # file: split, task, number of samples
    "captions.json": ("train", "captions", 8_000),
    "instructions.json": ("train", "instructions", 8_000),
    "pages.json": ("train", "pages", 16_000),
    "neighbours.json": ("train", "neighbours", 16_000),
    "lookups.json": ("train", "lookups", 8_000),
    "val-captions.json": ("val", "captions", 200),
    "val-instructions.json": ("val", "instructions", 1_100),
}


def text_sample(index, turns):
    return {"id": f"text-{index}", "conversations": conversation(turns, has_image=False)}, None


def sample(split, task, index, seed):
    """Sample `index` of a file: (LLaVA entry, JPEG bytes or None). Only the arguments decide it."""
    rng = random.Random(f"{seed}/{split}/{task}/{index}")

    # Text only: look-ups, and some of the instructions
    if task == "lookups":
        return text_sample(index, lookups(rng, split, 4, ask_name=0.6, ask_all=0.7))
    if task == "instructions" and rng.random() < 0.08:
        return text_sample(index, lookups(rng, split, 1 if split == "val" else 4))

    # A page and the conversation about it
    if task == "captions":
        page = make_page(rng, split, CAPTION_PAGES)
        label, turns = "transcription", caption(page, rng)
    elif split == "val":  # one question, whose kind the validation reports apart
        page = make_page(rng, split)
        fact, = questions(page, rng, 1)
        label, turns = fact.kind, turns_of([fact])
        if rng.random() < 0.1:
            label, turns = "transcription", caption(page, rng)
    else:
        pages, limit, weights = TASKS[task]
        page = make_page(rng, split, pages)
        label, turns = task, turns_of(questions(page, rng, limit, weights))
        if rng.random() < TRANSCRIBED:
            place = rng.randint(0, len(turns))
            turns[place:place] = caption(page, rng)

    # The entry; a folder holds a thousand images
    name = f"{split}-{task}-{index:06d}"
    path = f"images/{name[:-3]}/{name}.jpg"
    entry = {"id": f"{label}-{index}", "image": path, "conversations": conversation(turns, True)}
    return entry, page.jpeg()


def write_sample(job):
    """Writes a sample's image below the folder `out` and returns its entry."""
    out, split, task, index, seed = job
    entry, jpeg = sample(split, task, index, seed)
    if jpeg is not None:
        path = Path(out) / entry["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)
    return entry


def start_worker():
    """Leaves Ctrl-C, which reaches every process, to the one that started this worker; ends when that has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def generate(out, files=FILES, seed=0, workers=WORKERS, quiet=False):
    """Writes the JSON files that are not there yet, and their images, below the folder `out`.

    A JSON file appears only when all of its images have been written.
    """
    out = Path(out)
    missing = {name: contents for name, contents in files.items() if not (out / name).is_file()}
    if not missing:
        return

    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker)
    try:
        for name, (split, task, count) in missing.items():
            jobs = ((str(out), split, task, index, seed) for index in range(count))
            entries = pool.map(write_sample, jobs, chunksize=32)
            entries = list(tqdm(entries, name, count, disable=quiet, unit="image"))
            out.mkdir(parents=True, exist_ok=True)
            unfinished = out / f"{name}.{os.getpid()}.tmp"
            unfinished.write_text(json.dumps(entries))
            unfinished.replace(out / name)
    except BrokenProcessPool:
        raise ValueError("a process that draws pages has been ended, most often because the memory is full: draw them "
                         "with fewer, `python -m data.nano.generate --workers 1`") from None
    finally:
        pool.shutdown(cancel_futures=True)


def write_examples(folder):
    """Writes seven pages of the validation split: one of each kind, a second receipt and a form in bold letters."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in (receipt, form, table, shapes, note):
        page = make_page(random.Random(f"example/{kind.__name__}"), "val", (kind,), Print())
        page.image().save(folder / f"{kind.__name__}.png")
    page = make_page(random.Random("example/0"), "val", (receipt,), Print())
    (folder / "receipt.jpg").write_bytes(page.jpeg())
    page = make_page(random.Random("example/bold"), "val", (form,), Print(stroke=0.045))
    page.image().save(folder / "bold.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--examples", metavar="FOLDER", help="only write the seven example images")
    args = parser.parse_args()
    try:
        check_ranges(args, workers=(1, 999))
        if args.examples:
            write_examples(args.examples)
            return
        for name in FILES:
            if (args.out / name).is_file():
                tell(f"{args.out / name} is there and stays, whatever its seed")
        generate(args.out, seed=args.seed, workers=args.workers)
    except Exception as error:
        print_error("generate.py", error, out_of_memory="draw with fewer --workers")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
