"""Decoding, colours, orientation and squares against numpy's own arithmetic."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flux_func.data import images
from tests.helpers.tiny_data import encoded, picture


def decoded(image, form="PNG", **options):
    return np.asarray(images.decode(encoded(image, form, **options))).astype(np.float64)


def test_grey_is_repeated():
    grey = picture(0, mode="L")
    np.testing.assert_array_equal(decoded(grey), np.repeat(np.asarray(grey)[..., None], 3, axis=2))


def test_bilevel_is_black_and_white():
    bits = np.random.default_rng(0).integers(0, 2, (9, 13)).astype(bool)
    np.testing.assert_array_equal(decoded(Image.fromarray(bits)), np.repeat(bits[..., None], 3, axis=2) * 255)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_lies_over_white(mode):
    image = picture(1, mode=mode)
    pixels = np.asarray(image).astype(np.float64)
    alpha = pixels[..., -1:] / 255
    want = np.broadcast_to(pixels[..., :-1] * alpha + 255 * (1 - alpha), (*alpha.shape[:2], 3))
    assert np.abs(decoded(image) - want).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_transparent_colour_is_white(mode):
    image = Image.new(mode, (6, 4), (10, 20, 30) if mode == "RGB" else 7)
    image.putpixel((2, 1), (200, 100, 50) if mode == "RGB" else 9)
    if mode == "P":
        image.putpalette([v for i in range(256) for v in (i, 255 - i, (3 * i) % 256)])
    opaque = {"RGB": (200, 100, 50), "L": (9, 9, 9), "P": (9, 246, 27)}[mode]
    out = decoded(image, transparency=(10, 20, 30) if mode == "RGB" else 7)
    want = np.full((4, 6, 3), 255)
    want[1, 2] = opaque
    np.testing.assert_array_equal(out, want)


def test_palette():
    colours = np.random.default_rng(2).integers(0, 256, (256, 3), dtype=np.uint8)
    indices = np.random.default_rng(3).integers(0, 256, (11, 7), dtype=np.uint8)
    image = Image.frombytes("P", (7, 11), indices.tobytes())
    image.putpalette(colours.tobytes())
    for form in ("PNG", "GIF"):
        np.testing.assert_array_equal(decoded(image, form), colours[indices])


@pytest.mark.parametrize(("form", "bound"), [("TIFF", 1), ("JPEG", 6)])
def test_cmyk(form, bound):
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:] = (200, 40, 90, 60)
    inks[8:] = (0, 250, 10, 5)
    image = Image.frombytes("CMYK", (16, 16), inks.tobytes())
    want = (255 - inks[..., :3].astype(np.float64)) * (255 - inks[..., 3:]) / 255
    out = decoded(image, form, **({"quality": 100, "subsampling": 0} if form == "JPEG" else {}))
    assert np.abs(out - want).max() <= bound


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_range(form):
    values = np.random.default_rng(4).integers(0, 1 << 16, (10, 12), dtype=np.uint16)
    values[0, 0], values[0, 1] = 0, 65535
    out = decoded(Image.fromarray(values), form)
    np.testing.assert_array_equal(out, np.repeat(np.rint(values / 257)[..., None], 3, axis=2))


def test_floating_point_is_refused():
    data = encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(images.Unusable, match="floating point"):
        images.decode(data)


# What brings an image stored with each EXIF orientation upright (Exif 2.32, tag 274), as its rows and columns go.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(orientation):
    stored = picture(5)
    exif = Image.Exif()
    exif[274] = orientation
    want = UPRIGHT[orientation](np.asarray(stored))
    np.testing.assert_array_equal(decoded(stored, exif=exif), want)
    smooth = stored.resize((64, 48), Image.Resampling.BICUBIC)
    out = decoded(smooth, "JPEG", exif=exif, quality=100, subsampling=0)
    assert np.abs(out - UPRIGHT[orientation](np.asarray(smooth))).mean() < 2


@pytest.mark.parametrize("data", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image(data):
    with pytest.raises(images.Unusable, match="^not an image$"):
        images.decode(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_cut_off_bytes(form):
    data = encoded(picture(6, (64, 64)), form)
    for kept in (0.3, 0.6, 0.9):
        with pytest.raises(images.Unusable) as caught:
            images.decode(data[: int(len(data) * kept)])
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)  # the reason is the same in every run


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
)
def test_any_damage_is_an_image_or_unusable(form, damage):
    data = bytearray(encoded(picture(7, (16, 16)), form))
    for place, value in damage:
        data[int(place * len(data))] = value
    try:
        assert images.decode(bytes(data)).mode == "RGB"
    except images.Unusable as error:
        assert str(error)


def as_levels(array):
    return np.rint((array.transpose(1, 2, 0) + 1) * 127.5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 9), st.booleans(), st.floats(0, 1))
def test_an_image_of_the_size_keeps_its_pixels(size, slack, wide, along):
    image = picture(8, (size + slack, size) if wide else (size, size + slack))
    pixels = np.asarray(image)
    out = images.square(image, size, along)
    assert out.shape == (3, size, size) and out.dtype == np.float32 and out.flags.c_contiguous
    crops = [pixels[:, i : i + size] if wide else pixels[i : i + size] for i in range(slack + 1)]
    expected = min(int(along * (slack + 1)), slack)
    np.testing.assert_array_equal(as_levels(out), crops[expected])


def test_every_place_is_equally_likely():
    ramp = Image.fromarray(np.arange(7, dtype=np.uint8)[None].repeat(3, axis=0)).convert("RGB")
    first = [as_levels(images.square(ramp, 3, along))[0, 0, 0] for along in (np.arange(1000) + 0.5) / 1000]
    np.testing.assert_array_equal(np.unique(first, return_counts=True), [[0, 1, 2, 3, 4], [200] * 5])
    assert as_levels(images.square(ramp, 3))[0, 0, 0] == 2  # the center


def test_a_ramp_stays_a_ramp():
    width, size = 256, 32
    ramp = Image.fromarray(np.arange(width, dtype=np.uint8)[None].repeat(width, axis=0)).convert("RGB")
    centers = (np.arange(size) + 0.5) * width / size - 0.5
    out = (images.square(ramp, size)[0] + 1) * 127.5
    assert np.abs(out - centers)[:, 2:-2].max() <= 0.51


def test_shrinking_is_antialiased():
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    image = Image.fromarray(board.astype(np.uint8)).convert("RGB")
    assert np.abs(images.square(image, 16)).max() < 0.05


def test_the_square_keeps_proportions():
    disc = np.hypot(*(np.indices((80, 80)) - 39.5)) < 30
    page = np.zeros((80, 121), np.uint8)
    page[:, 20:100] = disc * 255
    out = images.square(Image.fromarray(page).convert("RGB"), 40)[0] > 0
    assert abs(int(out.any(axis=0).sum()) - int(out.any(axis=1).sum())) <= 1
    assert abs(out.sum() - np.pi * 15**2) < 20


def test_black_and_white_are_the_ends():
    assert (images.square(Image.new("RGB", (9, 9)), 5) == -1).all()
    assert (images.square(Image.new("RGB", (9, 9), "white"), 5) == 1).all()


@pytest.mark.parametrize("size", [(31, 400), (400, 31), (31, 31)])
def test_smaller_ones_are_unusable(size):
    with pytest.raises(images.Unusable, match=f"^{size[0]}x{size[1]} is below 32 pixels$"):
        images.square(Image.new("RGB", size), 32)


def test_to_pil_inverts_square():
    image = picture(9, (16, 16))
    np.testing.assert_array_equal(np.asarray(images.to_pil(images.square(image, 16))), np.asarray(image))


def test_to_pil_clips():
    array = np.array([-9.0, -1, 0, 1, 9, np.nan], np.float32)[None, None].repeat(3, axis=0)
    assert np.asarray(images.to_pil(array))[0, :, 0].tolist() == [0, 0, 128, 255, 255, 128]


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (6, 3), (7, 3), (8, 4), (10, 5)])
def test_grid_lays_the_tiles_out(count, columns):
    tiles = [images.square(picture(i, (40, 40)), 40) for i in range(count)]
    page = np.asarray(images.grid(tiles, ["x"] * count)).astype(int)
    gap, side = 8, 120  # 40 pixels are enlarged threefold
    assert page.shape[1] == gap + columns * (side + gap)
    rows = -(-count // columns)
    step = (page.shape[0] - gap) // rows
    for i, tile in enumerate(tiles):
        left, top = gap + i % columns * (side + gap), gap + i // columns * step
        want = np.asarray(images.to_pil(tile)).repeat(3, axis=0).repeat(3, axis=1)
        np.testing.assert_array_equal(page[top : top + side, left : left + side], want)
        below = page[top + side : top + step, left : left + side]
        assert below.min() < 100 and (below == 255).mean() > 0.9  # dark text on white


@pytest.mark.parametrize("side", [96, 256])
@pytest.mark.parametrize("caption", ["", "word " * 60, "w" * 300, "naïve Ωμέγα Привет 日本語 " * 9])
def test_grid_captions_stay_under_their_tiles(side, caption):
    tiles = [np.ones((3, side, side), np.float32)] * 2
    page = np.asarray(images.grid(tiles, [caption, ""], columns=2))
    gap = max(8, side // 24)
    assert (page[:, gap + side + 2 :] == 255).all()
    font = images._font(12)
    lines = images._wrap(caption, font, side)
    assert len(lines) <= 4 and all(font.getlength(line) <= side for line in lines)
    shown = " ".join(lines)
    if shown.endswith("…"):
        assert caption.replace(" ", "").startswith(shown[:-1].replace(" ", ""))
    else:
        assert shown == caption


def test_grid_is_written_as_png():
    page = images.grid([np.zeros((3, 64, 64), np.float32)], ["grey"])
    assert Image.open(io.BytesIO(encoded(page))).size == page.size
