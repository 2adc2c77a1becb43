"""The letters on the small model's pages: Pillow's one typeface, drawn with changes.

A model that has only read one typeface reads no other. The changes make letters bold or thin, slanted,
wide, spaced, or with the stems and feet of serif typefaces, without any font file.
"""
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont


class Print(NamedTuple):
    """How a page's letters differ from Pillow's own typeface. Lengths are shares of the font's size."""
    stroke: float = 0.0  # added on all sides of every line of a letter, or a pixel less where it is negative
    stem: float = 0.0  # added to the width of upright lines only
    serif: float = 0.0  # the length of the feet at the top and the bottom of a letter
    slant: float = 0.0  # to the right, for each unit of height
    stretch: float = 1.0  # the factor for a letter's width
    spacing: float = 0.0  # added between two letters
    evenness: float = 0.0  # 0: each letter as wide as it is; 1: all letters equally wide
    curved: bool = False  # the stems of 6 and 9, which are straight in Pillow's typeface
    round_a: bool = False  # an a of a bowl and a stem, as in handwriting
    typeface: str | None = None  # a font file in place of Pillow's own; only to measure with


def draw_print(rng):
    """The print of a page for training: as it is on a fifth, else each change on some of the pages."""
    if rng.random() < 0.2:
        return Print()

    def sometimes(share, low, high, otherwise=0.0):
        return rng.uniform(low, high) if rng.random() < share else otherwise
    serif = sometimes(0.35, 0.03, 0.1)
    return Print(
        stroke=sometimes(0.6, -0.025, 0.05),
        stem=rng.uniform(0, 0.06) if serif else 0.0,
        serif=serif,
        slant=sometimes(0.4, -0.1, 0.3),
        stretch=sometimes(0.5, 0.78, 1.2, otherwise=1.0),
        spacing=sometimes(0.35, 0, 0.18),
        evenness=sometimes(0.3, 0.3, 1.0),
        curved=rng.random() < 0.6,
        round_a=rng.random() < 0.25)


# ---- Widths ----

@lru_cache(maxsize=256)
def font(size, typeface=None):
    if typeface:
        return ImageFont.truetype(typeface, size, layout_engine=ImageFont.Layout.BASIC)
    return ImageFont.load_default(size)


@lru_cache(maxsize=100_000)
def letter_widths(letter, size, look):
    """How wide a letter is drawn, and its cell, from which the next one's is spaced: in pixels."""
    own = font(size, look.typeface).getlength(letter)
    cell = own + look.evenness * (0.6 * size - own)
    return look.stretch * min(own, cell), look.stretch * cell


def step(letter, size, look):
    """From where a letter begins to where the next one does, in pixels. Thick letters need space."""
    _, cell = letter_widths(letter, size, look)
    return cell + (look.spacing + 1.5 * max(0, look.stroke) + look.stem) * size


def length(text, size, look):
    """The width of a text in pixels."""
    if is_plain(look):
        return plain_length(text, size, look.typeface)
    return sum(step(letter, size, look) for letter in text)


def is_plain(look):
    """Whether Pillow draws the letters as they are, its own or another typeface's."""
    return look == Print(typeface=look.typeface)


@lru_cache(maxsize=100_000)
def plain_length(text, size, typeface):
    return font(size, typeface).getlength(text)


# ---- Drawing ----

# The letters that have feet at the top, or at the bottom, in serif typefaces
FEET_ABOVE = "BDEFHIKLMNPRUVWXYbdhklmnpruvwxy"
FEET_BELOW = "ABDEFHIKLMNPRTXYfhiklmnprx14"


def curved_six(width, height, thickness):
    """The mask of a 6: a ring, and an arc from the ring's left side over the top. In pixels."""
    large = Image.new("L", (4 * width, 4 * height), 0)  # reduced below, which smooths the edges
    draw, line = ImageDraw.Draw(large), 4 * thickness
    ring_top = round(0.38 * large.height)
    draw.ellipse((0, ring_top, large.width - 1, large.height - 1), outline=255, width=line)
    draw.arc((0, 0, 1.15 * large.width, 1.1 * large.height), 170, 292, 255, line)
    return large.resize((width, height), Image.Resampling.BOX)


def draw_shape_of(mask, letter, size, look):
    """Draws a letter in its usual shape or, where the print has another one, in that."""
    draw, face = ImageDraw.Draw(mask), font(size, look.typeface)
    stroke = max(0, round(look.stroke * size))
    drawn_as = "q" if letter == "a" and look.round_a else letter
    draw.text((size, 0), drawn_as, 255, face, stroke_width=stroke)
    if drawn_as != letter:  # the part of a q that stands on the line
        _, _, _, line = draw.textbbox((size, 0), "x", face, stroke_width=stroke)
        draw.rectangle((0, line + 1, *mask.size), fill=0)
    if letter in "69" and look.curved:
        left, top, right, bottom = mask.getbbox()
        six = curved_six(right - left, bottom - top, round(0.09 * size) + 2 * stroke)
        mask.paste(six if letter == "6" else six.rotate(180), (left, top))


def add_feet(mask, letter, serif, size):
    """Widens the highest and the lowest part of a letter that stands on stems. serif: a foot's length."""
    _, top, _, bottom = mask.getbbox()
    thickness = max(2, round(0.05 * size))
    feet = []  # (where it begins, the directions in which it is widened)
    if letter in FEET_ABOVE:
        feet.append((top, (-1,) if letter.islower() else (-1, 1)))
    if letter in FEET_BELOW:
        feet.append((bottom - thickness, (-1, 1)))
    for start, directions in feet:
        foot = mask.crop((0, start, mask.width, start + thickness))
        for direction in directions * round(serif * size):
            foot = ImageChops.lighter(foot, ImageChops.offset(foot, direction, 0))
        mask.paste(foot, (0, start))


def add_dot(mask, size):
    """Draws the dot with which some typewriters tell a zero from an O."""
    left, top, right, bottom = mask.getbbox()
    x, y, radius = (left + right) / 2, (top + bottom) / 2, 0.05 * size
    ImageDraw.Draw(mask).ellipse((x - radius, y - 2 * radius, x + radius, y + 2 * radius), 255)


@lru_cache(maxsize=1_000)
def draw_letter(letter, size, look):
    """A letter's mask, an "L" image of which 255 is ink. Its origin is at (size, 0) in the mask."""
    mask = Image.new("L", (3 * size, 2 * size), 0)
    draw_shape_of(mask, letter, size, look)
    if round(look.stroke * size) < 0:
        mask = mask.filter(ImageFilter.MinFilter(3))  # a pixel less on all sides
    for _ in range(round(look.stem * size)):  # ink that is moved to the right thickens upright lines only
        mask = ImageChops.lighter(mask, ImageChops.offset(mask, 1, 0))

    # With feet a typewriter's narrow letters fill their cells
    serif = max(look.serif, 0.16 * look.evenness) if letter in "Iijl1" else look.serif
    if serif and mask.getbbox():
        add_feet(mask, letter, serif, size)
    if letter == "0" and look.evenness > 0.7:
        add_dot(mask, size)

    # Width, in the middle of the cell, and slant, about the middle of a small letter's height
    own, _ = letter_widths(letter, size, Print(typeface=look.typeface))
    drawn, cell = letter_widths(letter, size, look)
    scale = own / drawn  # from the result to the mask
    start = size + (cell - drawn) / 2 + look.slant * 0.7 * size
    across = (scale, scale * look.slant, size - scale * start)
    return mask.transform(mask.size, Image.Transform.AFFINE, (*across, 0, 1, 0),
                          Image.Resampling.BICUBIC)


class Text(NamedTuple):
    """One line of text. x, y: where Pillow starts to draw, a little above the first letter."""
    string: str
    x: float
    y: float
    size: int  # of the font, in pixels
    colour: str
    look: Print

    def box(self, start=0, end=None):
        """The box (left, top, right, bottom) of its characters from `start` up to `end`."""
        left = self.x + length(self.string[:start], self.size, self.look)
        right = self.x + length(self.string[:end], self.size, self.look)
        # capitals begin a little below y, and letters such as "g" reach a little below y + size
        return left, self.y + 0.1 * self.size, right, self.y + 1.15 * self.size

    def draw(self, image, rgb):
        """Draws it on an RGB image."""
        if is_plain(self.look):
            face = font(self.size, self.look.typeface)
            ImageDraw.Draw(image).text((self.x, self.y), self.string, rgb, face)
            return
        x = self.x
        for letter in self.string:
            mask = draw_letter(letter, self.size, self.look)
            image.paste(rgb, (round(x) - self.size, round(self.y)), mask)
            x += step(letter, self.size, self.look)
