"""Images: what a file looks like once it is read, and the pixels that the vision encoder gets."""
import io
import os

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from data.images import MEAN, PAD_COLOUR, STD, any_aspect, check_resolution, read_image, square


def levels(pixels):
    """Normalised pixels (3, H, W) -> levels 0 to 255."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (pixels * std + mean) * 255


# ---- Reading files ----

def save_turned(picture, file):
    """A camera on its side saves a turned photo: EXIF says to turn it 90 degrees clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif, quality=95)


def save_animation(picture, file):
    black = Image.new("RGB", picture.size)
    picture.save(file, save_all=True, append_images=[black])


FILES = {
    "rgb.png": lambda picture, file: picture.save(file),
    "palette.png": lambda picture, file: picture.quantize(8).save(file),
    "rgba.png": lambda picture, file: picture.convert("RGBA").save(file),
    "cmyk.jpg": lambda picture, file: picture.convert("CMYK").save(file, quality=95),
    "first-frame.gif": save_animation,
    "turned.jpg": save_turned,
    "odd-metadata.png": lambda picture, file: picture.save(file, exif=b"no metadata at all"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_people_see_it(tmp_path, name):
    """A dark left and a light right half, within 12 of 255 levels (JPEG, palette)."""
    picture = Image.new("RGB", (40, 20), (200, 100, 50))
    picture.paste((10, 20, 30), (0, 0, 20, 20))
    FILES[name](picture, tmp_path / name)

    image = read_image(tmp_path / name)

    assert image.mode == "RGB" and image.size == (40, 20)
    for x in (5, 35):  # away from the border between the halves
        column, expected = (np.asarray(one).astype(int)[:, x] for one in (image, picture))
        assert np.abs(column - expected).max() <= 12


def test_16_bits_of_grey_become_8(tmp_path):
    """The levels 0, 257, 514, ... 65535 are the 256 levels of 8 bits."""
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp * 257).save(tmp_path / "deep.png")
    image = np.asarray(read_image(tmp_path / "deep.png"))
    assert np.array_equal(image, np.stack([ramp] * 3, axis=-1))


@pytest.mark.parametrize("black", [np.inf, -np.inf, np.nan])
def test_a_value_that_is_not_finite_leaves_the_others_as_they_are(tmp_path, black):
    """In a float TIFF, in 0 to 1; resampling may have gone a little beyond."""
    Image.fromarray(np.array([[black, 0.5, 1.001]], dtype=np.float32)).save(tmp_path / "float.tiff")
    assert np.asarray(read_image(tmp_path / "float.tiff"))[0, :, 0].tolist() == [0, 128, 255]


def ink_on_nothing(mode):
    """Dark ink on a transparent ground that is black where its colour is looked at."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.putpixel((2, 3), (20, 20, 20, 255))
    return image.convert(mode)


def ink_with_a_transparent_colour():
    """The same as a palette whose first colour is transparent (PNG's tRNS)."""
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 20, 20, 20])
    image.putpixel((2, 3), 1)
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize("image", [ink_on_nothing("RGBA"), ink_on_nothing("LA"), ink_with_a_transparent_colour()],
                         ids=["RGBA", "LA", "palette"])
def test_transparency_is_laid_on_white(tmp_path, image):
    image.save(tmp_path / "ink.png")
    seen = read_image(tmp_path / "ink.png")
    assert seen.mode == "RGB"
    assert seen.getpixel((2, 3)) == (20, 20, 20)
    assert seen.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("values, expected", [
    (np.array([[0.0, 0.5], [0.25, 1.0]], np.float32), [0, 128, 64, 255]),  # white is 1
    (np.array([[0.0, 128.0], [64.0, 255.0]], np.float32), [0, 128, 64, 255]),  # white is 255
    (np.array([[0, 128], [64, 255]], np.int32), [0, 128, 64, 255]),
    (np.array([[0, 128 * 257], [64 * 257, 65535]], np.int32), [0, 128, 64, 255]),  # white is 65535
], ids=["floats to 1", "floats to 255", "32 bits to 255", "32 bits to 65535"])
def test_the_white_of_32_bits_is_found_by_the_largest_value(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "deep.tif")
    assert np.asarray(read_image(tmp_path / "deep.tif"))[..., 0].flatten().tolist() == expected


def test_a_dark_png_of_16_bits_stays_dark(tmp_path):
    Image.fromarray(np.full((2, 2), 255, np.uint16)).save(tmp_path / "dark.png")
    assert np.asarray(read_image(tmp_path / "dark.png")).max() == 1


def test_values_above_16_bits_are_white(tmp_path):
    Image.fromarray(np.full((2, 2), 65_900, np.int32)).save(tmp_path / "deeper.tif")
    assert np.asarray(read_image(tmp_path / "deeper.tif")).min() == 255


@pytest.mark.parametrize("size", [(1, 1), (20000, 20), (3, 9000)])
def test_extreme_sizes_are_read(tmp_path, size):
    Image.new("RGB", size, "white").save(tmp_path / "a.png")
    pixels = levels(square(read_image(tmp_path / "a.png"), 64))
    assert pixels.shape == (3, 64, 64)
    assert pixels.max() > max(PAD_COLOUR) + 1  # some of the image shows in its padding


@pytest.fixture
def png(tmp_path):
    """The bytes of a readable PNG file."""
    Image.effect_noise((60, 60), 60).save(tmp_path / "readable.png")
    return (tmp_path / "readable.png").read_bytes()


@pytest.mark.parametrize("problem, damage", [
    ("is not a whole image", lambda png: png[:1500]),
    ("is damaged, or no image of a kind that is read: BMP, GIF", lambda png: b"this is no image"),
    ("is damaged", lambda png: b""),
    ("is damaged", lambda png: png[:16] + bytes(4) + png[20:]),  # the width's place in the header
], ids=["truncated", "text", "empty", "no width"])
def test_a_damaged_file_is_refused_with_its_name(tmp_path, png, problem, damage):
    (tmp_path / "a.png").write_bytes(damage(png))
    with pytest.raises(ValueError, match=f"a.png {problem}"):
        read_image(tmp_path / "a.png")


def test_a_folder_in_place_of_an_image_is_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="folder.png is no image file but a folder"):
        read_image(tmp_path / "folder.png")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="pipe.png is no image file but a pipe or a device"):
        read_image(tmp_path / "pipe.png")


def test_postscript_is_refused_as_another_program_would_read_it(tmp_path, png, monkeypatch):
    Image.open(io.BytesIO(png)).convert("RGB").save(tmp_path / "page.eps")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)
    with pytest.raises(ValueError, match="page.eps is damaged, or no image of a kind that is read"):
        read_image(tmp_path / "page.eps")


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(ValueError, match="there is no image at .*missing.png"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="there is no image at an empty path"):
        read_image("")


def test_a_decompression_bomb_is_refused(tmp_path, png, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="readable.png has too many pixels"):
        read_image(tmp_path / "readable.png")


# ---- The two transforms ----

def test_padding_has_the_mean_colour():
    """The original's: CLIP's mean of 0 to 1, times 255, rounded down."""
    assert PAD_COLOUR == (122, 116, 104)


@pytest.mark.parametrize("size", [(200, 90), (90, 200), (77, 76), (30, 30)])
def test_square_pads_and_then_resizes(size):
    """Reference: NumPy's padding and Pillow's bicubic resize, to 0.01 of 255 levels."""
    image = Image.effect_noise(size, 60).convert("RGB")
    side, (width, height) = max(size), size
    left, top = (side - width) // 2, (side - height) // 2
    padded = np.zeros((side, side, 3), np.uint8) + np.array(PAD_COLOUR, np.uint8)
    padded[top:top + height, left:left + width] = np.asarray(image)
    resized = Image.fromarray(padded).resize((128, 128), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()

    pixels = square(image, 128)

    assert pixels.shape == (3, 128, 128)
    torch.testing.assert_close(levels(pixels), expected, rtol=0, atol=0.01)


def test_a_long_image_is_reduced_before_it_is_padded(monkeypatch):
    """The canvas of a 20,000 x 20 image would otherwise take 1.2 GB."""
    image, sides = Image.new("RGB", (20000, 20)), []
    new = Image.new

    def new_canvas(mode, size, *colour):
        sides.append(max(size))
        return new(mode, size, *colour)

    monkeypatch.setattr(Image, "new", new_canvas)
    square(image, 64)
    assert sides and max(sides) <= 10_000


@pytest.mark.parametrize("size, shape", [
    ((200, 100), (3, 64, 128)), ((100, 333), (3, 213, 64)), ((50, 50), (3, 64, 64))])
def test_any_aspect_makes_the_short_side_the_resolution(size, shape):
    """Reference: Pillow's bicubic resize, to 0.01 of 255 levels."""
    image = Image.effect_noise(size, 60).convert("RGB")
    resized = image.resize((shape[2], shape[1]), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
    torch.testing.assert_close(levels(any_aspect(image, 64)), expected, rtol=0, atol=0.01)


def test_any_aspect_refuses_what_would_not_fit_in_memory():
    with pytest.raises(ValueError, match="20000x20"):
        any_aspect(Image.new("RGB", (20000, 20)), 512)


# ---- The resolution to train at, with visual tokens of 64 x 64 pixels ----

@pytest.mark.parametrize("resolution", [64, 22 * 64])
def test_a_resolution_that_leaves_room_for_text_is_accepted(resolution):
    check_resolution(resolution, compression=64, max_length=23 ** 2)


@pytest.mark.parametrize("resolution", [-64, 0, 32, 1440])
def test_a_resolution_of_no_whole_visual_tokens_is_refused(resolution):
    with pytest.raises(ValueError, match="should be a positive multiple of 64"):
        check_resolution(resolution, compression=64, max_length=23 ** 2)


def test_a_resolution_that_leaves_no_room_for_text_is_refused():
    with pytest.raises(ValueError, match="makes 529 visual tokens, and a sample has at most 529"):
        check_resolution(23 * 64, compression=64, max_length=23 ** 2)
