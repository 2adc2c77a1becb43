"""Images in: reading files of every kind, and the two transforms (paper, section 4.3)."""
import os
import warnings
from contextlib import suppress

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's, as in the original
STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = tuple(int(m * 255) for m in MEAN)  # (122, 116, 104)
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # not EPS, which starts a program
LONGEST = 10_000  # pixels; longer images are first reduced to this, so that padding them to a square fits in memory


def read_image(path):
    """The first frame of an image file as a viewer shows it, in RGB. Raises ValueError where it cannot be read."""
    if not os.path.exists(path):
        raise ValueError(f"there is no image at {str(path) or 'an empty path'}")
    if not os.path.isfile(path):  # reading a pipe or a device might never end
        raise ValueError(f"{path} is no image file but {'a folder' if os.path.isdir(path) else 'a pipe or a device'}")
    return decode_image(path, path)


def decode_image(file, name):
    """The same, of a path or an open file that is there. name: for messages."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            image = Image.open(file, formats=FORMATS)
            image.load()
            is_png = image.format == "PNG"
            with suppress(Exception):  # broken metadata: as it lies in the file
                image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # modes I, I;16 and F
                image = to_8_bits(image, is_png)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has too many pixels to open safely: make it smaller") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is damaged, or no image of a kind that is read: {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        raise ValueError(f"{name} is not a whole image that Pillow can read ({error})") from None


def to_8_bits(image, is_png):
    """A grey image of 16 or 32 bits, or of floats, in 8 bits. White is 1, 255 or 65535, by type and largest value."""
    grey = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0, neginf=0)
    has_16_bits = is_png or image.mode not in ("I", "F")
    if image.mode == "F" and grey.max() <= 2:  # resampling goes a little beyond 1
        white = 1
    elif grey.max() <= 255 and not has_16_bits:
        white = 255
    else:
        white = 65535
    return Image.fromarray((grey / white * 255).clip(0, 255).round().astype(np.uint8))


def square(image, resolution):
    """Pads to a square of the mean colour and resizes: (3, resolution, resolution), normalised."""
    if max(image.size) > LONGEST:
        image = ImageOps.contain(image, (LONGEST, LONGEST), Image.Resampling.BICUBIC)
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), PAD_COLOUR)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return normalise(canvas.resize((resolution, resolution), Image.Resampling.BICUBIC))


def any_aspect(image, resolution, max_pixels=64_000_000):
    """Resizes the short side to `resolution` and keeps the ratio: (3, H, W), normalised. Paper, section 4.3.

    The encoder leaves out pixels at the right and the bottom that do not make a visual token.
    """
    long_side = int(resolution * max(image.size) / min(image.size))
    if resolution * long_side > max_pixels:
        raise ValueError(f"an image of {image.width}x{image.height} pixels would become {resolution}x{long_side} "
                         "with its aspect ratio kept: use the square transform or crop it")
    size = (resolution, long_side) if image.width <= image.height else (long_side, resolution)
    return normalise(image.resize(size, Image.Resampling.BICUBIC))


def light_up(image, light, num_across, keep_ratio):
    """The image, lit by its visual tokens (rows, columns), from 0 to 1. num_across: how many lie across the
    square or, with keep_ratio, across the image; the last may be a part of one."""
    if keep_ratio:
        side, left, top = image.width, 0, 0
    else:
        side = max(image.size)  # of the padded square
        left, top = (side - image.width) // 2, (side - image.height) // 2
    box = [edge * num_across / side for edge in (left, top, left + image.width, top + image.height)]  # in visual tokens
    light = Image.fromarray(np.pad((255 * light).byte().numpy(), (0, 1)))  # dark behind the last visual tokens
    light = light.resize(image.size, Image.Resampling.NEAREST, box)
    return Image.composite(image, image.point(lambda value: value // 4), light)


def normalise(image):
    """RGB image -> float (3, H, W)."""
    pixels = torch.from_numpy(np.array(image))
    pixels = pixels.permute(2, 0, 1).contiguous().float()  # (H, W, 3) -> (3, H, W)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return pixels.div_(255).sub_(mean).div_(std)


def check_resolution(resolution, compression, max_length):
    """Refuses a resolution for training that is no whole number of visual tokens a side, or leaves no room for text.

    compression: pixels along the side of a visual token; max_length: tokens of a sample, visual ones counted.
    """
    side = resolution // compression
    if resolution % compression or side < 1:
        raise ValueError(f"--resolution {resolution}: it should be a positive multiple of {compression}, the side of a "
                         "visual token")
    if side ** 2 >= max_length:
        raise ValueError(f"--resolution {resolution} makes {side ** 2} visual tokens, and a sample has at most "
                         f"{max_length} tokens: use a smaller one")


def preprocessor_config(resolution):
    """The fields of a published preprocessor_config.json for square images of this side."""
    return dict(image_processor_type="CLIPImageProcessor", size={"shortest_edge": resolution}, resample=3,
                crop_size={"height": resolution, "width": resolution}, image_mean=MEAN, image_std=STD,
                do_resize=True, do_center_crop=True, do_normalize=True, do_rescale=True, do_convert_rgb=True)
