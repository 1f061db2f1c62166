"""Image bytes to RGB, RGB to squares in [-1, 1], and arrays back to pictures and captioned grids."""

import functools
import io
import math
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

# What may be read from a data set: Pillow would run other programs for some formats (EPS), whatever a file is called.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


class Unusable(Exception):
    """A sample that cannot be trained on; the message is the reason."""


def decode(data: bytes) -> Image.Image:
    """Returns an encoded image in RGB, upright as its EXIF orientation says.

    Raises:
      Unusable: the bytes are broken, or no image of `FORMATS`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise Unusable("not an image") from error  # Pillow's own message has an address of memory in it
    except Unusable:
        raise
    except Exception as error:  # on broken bytes Pillow's decoders raise nearly any class
        raise Unusable(f"cannot be decoded: {' '.join(str(error).split())}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an image of any mode in RGB: transparent pixels over white, 16-bit ones divided by 257.

    Raises:
      Unusable: pixels of floating point, whose range is not known.
    """
    if image.mode == "F":
        raise Unusable("its pixels are of floating point, in a range that is not known")
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit values at 255
        grey = np.clip(np.asarray(image).astype(np.float64) / 257, 0, 255)
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def square(image: Image.Image, size: int, along: float = 0.5) -> np.ndarray:
    """Returns the image resized so that its shorter side is `size`, and cropped to a square.

    The square is cut first and then resized by an antialiased bicubic filter, which comes to the same and keeps the
    proportions exact; an image whose shorter side is `size` keeps its pixels.

    Args:
      image: RGB.
      size: of the result, in pixels.
      along: where on the longer side the square lies: from 0 (its start) to 1 (its end); 0.5 is the center.

    Returns:
      float32 [3, size, size] in [-1, 1].

    Raises:
      Unusable: the shorter side is below `size`.
    """
    width, height = image.size
    short = min(width, height)
    if short < size:
        raise Unusable(f"{width}x{height} is below {size} pixels")
    places = width + height - 2 * short + 1
    offset = min(int(along * places), places - 1)
    left, top = (offset, 0) if width > height else (0, offset)
    box = (left, top, left + short, top + short)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box), dtype=np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) / 127.5 - 1


def to_pil(array: np.ndarray) -> Image.Image:
    """Returns the picture of an array [3, H, W]; values outside [-1, 1] are clipped, and NaN is grey."""
    pixels = np.rint((np.nan_to_num(np.clip(array, -1, 1)) + 1) * 127.5).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def save(picture: Image.Image, path: str | os.PathLike) -> None:
    """Writes a PNG beside `path` and renames it; its folder is made if need be."""
    path = os.fspath(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    picture.save(f"{path}.part", format="PNG")
    os.replace(f"{path}.part", path)


_SMALLEST_TILE = 96  # pixels: narrower ones leave no room for a caption
_MOST_LINES = 4  # of a caption


def grid(images: Sequence[np.ndarray], captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """Returns one picture of all images in rows, each with its caption below.

    Args:
      images: arrays [3, H, W] in [-1, 1], all of one size; small ones are enlarged by a whole factor.
      captions: one for each image, wrapped to its width and cut after four lines.
      columns: images in a row; None: near square, without gaps where the count allows it.
    """
    tiles = [_enlarge(to_pil(image)) for image in images]
    width, height = tiles[0].size
    columns = columns or _columns(len(tiles))
    font = _font(min(max(11, width // 20), 32))
    wrapped = [_wrap(caption, font, width) for caption in captions]
    gap, line = max(8, width // 24), math.ceil(font.size * 1.25)
    rows = [range(i, min(i + columns, len(tiles))) for i in range(0, len(tiles), columns)]
    heights = [height + gap + line * max(len(wrapped[i]) for i in row) + gap // 2 for row in rows]
    page = Image.new("RGB", (gap + columns * (width + gap), gap + sum(heights)), "white")
    draw, top = ImageDraw.Draw(page), gap
    for row, row_height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = gap + column * (width + gap)
            page.paste(tiles[i], (left, top))
            for n, text in enumerate(wrapped[i]):
                draw.text((left, top + height + gap // 2 + n * line), text, font=font, fill="#222222")
        top += row_height
    return page


def _enlarge(image: Image.Image) -> Image.Image:
    factor = math.ceil(_SMALLEST_TILE / image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _columns(count: int) -> int:
    least = math.ceil(math.sqrt(count))
    return next((columns for columns in range(least, 2 * least) if count % columns == 0), least)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # for its DejaVu Sans, which has Greek, Cyrillic and accents; Pillow's own font has not

    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _wrap(caption: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Returns the caption in lines no wider than `width` pixels, the last of `_MOST_LINES` with an ellipsis if cut."""
    lines = [""]
    for word in caption.split():
        joined = f"{lines[-1]} {word}".lstrip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        *full, rest = _break(word, font, width)
        lines += [*full, rest]
        if len(lines) > _MOST_LINES + 1:
            break
    lines = lines if lines[0] or len(lines) == 1 else lines[1:]
    if len(lines) <= _MOST_LINES:
        return lines
    last = lines[_MOST_LINES - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: _MOST_LINES - 1], last.rstrip() + "…"]


def _break(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Returns a word in pieces no wider than `width`; one that fits is one piece."""
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces
