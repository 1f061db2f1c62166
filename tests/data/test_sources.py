"""Sources against the files they were made from, splits, and every way in which a path can be wrong."""

import gzip
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from flux_func.data import sources
from flux_func.data.images import Unusable
from flux_func.errors import UserError
from tests.helpers import tiny_data
from tests.helpers.tiny_data import encoded, members, picture, write_tar

Tars, Folder = sources.Tars, sources.Folder


def write_folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def assert_holds_pictures(source, count):
    assert len(source) == count
    for i in range(count):
        image, caption = source[i]
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(i)))
        assert caption == f"caption {i}"


# Splits


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 300), st.floats(0.01, 0.9))
def test_held_out_parts_make_the_whole(count, fraction):
    whole = range(count)
    assume(round(count * fraction) < count)
    parts = {split: sources.held_out(whole, fraction, split) for split in ("train", "validation")}
    held = [parts["validation"][i] for i in range(len(parts["validation"]))]
    rest = [parts["train"][i] for i in range(len(parts["train"]))]
    assert sorted(held + rest) == list(whole)
    assert len(held) == max(1, round(count * fraction))


def test_held_out_is_spread_and_fixed():
    part = sources.held_out(range(1000), 0.2, "validation")
    held = [part[i] for i in range(len(part))]
    assert np.abs(np.histogram(held, bins=4, range=(0, 1000))[0] - 50).max() < 4 * np.sqrt(50)
    # What is held out must never change: a model trained on by a later version must not see it.
    assert held[:6] == [478, 755, 39, 393, 840, 369]


@pytest.mark.parametrize(("fraction", "split"), [(0.0, "validation"), (1.0, "train"), (0.99, "train")])
def test_an_empty_part_is_an_error(fraction, split):
    with pytest.raises(UserError, match=f"data.validation_fraction is {fraction}: .*nothing is left for {split}"):
        sources.held_out(range(3), fraction, split)


def test_nothing_held_out_leaves_all():
    assert len(sources.held_out(range(3), 0.0, "train")) == 3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**63), st.integers(0, 2**40))
def test_shuffled_is_a_permutation(size, seed, epoch):
    assert sorted(sources.shuffled(i, size, seed, "shuffle", epoch) for i in range(size)) == list(range(size))


def test_shuffled_depends_on_seed_purpose_and_position():
    def order(*key):
        return tuple(sources.shuffled(i, 100, *key) for i in range(100))

    orders = {order(0, "shuffle", 0), order(0, "shuffle", 1), order(1, "shuffle", 0), order(0, "replacement", 0)}
    assert len(orders) == 4
    # Adjacent places are uncorrelated: within 4 standard errors of zero.
    places = np.array([order(0, "shuffle", epoch) for epoch in range(50)])
    assert abs(np.corrcoef(places[:, :-1].ravel(), places[:, 1:].ravel())[0, 1]) < 4 / np.sqrt(places.size)


# digits


def test_digits():
    config = tiny_data.settings(source="digits", image_size=64, validation_fraction=0.1)
    parts = [sources.build(config, split) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [1617, 180]
    digits = load_digits()
    whole = parts[0].source
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for i in (0, 1, 7, 1796):
        image, caption = whole[i]
        assert image.size == (64, 64) and image.mode == "RGB"
        assert caption == f"a handwritten {names[digits.target[i]]}"
        # Averaged over its 8x8 blocks, an enlarged digit is the digit again, somewhat blurred.
        small = np.asarray(image.convert("L"), dtype=np.float64).reshape(8, 8, 8, 8).mean(axis=(1, 3))
        assert np.corrcoef(small.ravel(), digits.images[i].ravel())[0, 1] > 0.97
    assert whole.name(7) == "digit 7"


def test_digits_of_eight_pixels_are_the_data():
    whole = sources.Digits.load(8)
    pixels = np.stack([np.asarray(whole[i][0])[..., 0] for i in range(50)])
    np.testing.assert_array_equal(pixels, np.rint(load_digits().images[:50] * 255 / 16))


# wds


def test_tar(tmp_path):
    path = str(write_tar(tmp_path / "a.tar", members(5)))
    source = Tars.scan(path)
    assert_holds_pictures(source, 5)
    assert source.name(2) == f"{path}:002"
    assert_holds_pictures(pickle.loads(pickle.dumps(source)), 5)


def test_tars_by_glob_and_by_commas(tmp_path):
    files = list(members(6).items())
    paths = [str(write_tar(tmp_path / f"[{n}].tar", dict(files[4 * n : 4 * n + 4]))) for n in range(3)]
    assert_holds_pictures(Tars.scan(str(tmp_path / "*.tar")), 6)
    assert len(Tars.scan(paths[0])) == 2  # a path that is there is taken as it is, brackets and all
    commas = f"{tmp_path}/*0*.tar, {tmp_path}/*1*.tar"
    assert len(Tars.scan(commas)) == 4


def test_members_in_any_order_and_case(tmp_path):
    png = encoded(picture(0))
    files = {
        "x/1.txt": b"one",
        "x/2.PNG": png,
        "x/1.jpg": encoded(picture(1), "JPEG"),
        "x/2.json": json.dumps({"caption": "zwei Übergrößen", "width": 3}).encode(),
        "y/1.png": png,
        "y/1.txt": "один".encode(),
        "y/1.json": b"not read, as there is a txt",
        "y/1.seg.png": b"another kind of image",
        "y/._1.png": b"what a Mac leaves",
        "README": b"no sample",
        "日本.webp": encoded(picture(0), "WEBP", lossless=True),
        "日本.txt": b"nihon",
    }
    source = Tars.scan(str(write_tar(tmp_path / "a.tar", files)))
    assert [source.name(i).partition(":")[2] for i in range(4)] == ["x/1", "x/2", "y/1", "日本"]
    assert [source[i][1] for i in range(4)] == ["one", "zwei Übergrößen", "один", "nihon"]
    for i in (1, 2, 3):
        np.testing.assert_array_equal(np.asarray(source[i][0]), np.asarray(picture(0)))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.txt": b"alone"}, "no image"),
        ({"a.png": encoded(picture(0))}, "no caption"),
        ({"a.png": encoded(picture(0)), "a.json": b"{"}, "no caption in its JSON"),
        ({"a.png": encoded(picture(0)), "a.json": b"[1]"}, "no caption in its JSON"),
        ({"a.png": encoded(picture(0)), "a.json": b'{"text": "x"}'}, "no caption in its JSON"),
        ({"a.png": encoded(picture(0)), "a.json": b'{"caption": null}'}, "no caption"),
        ({"a.png": encoded(picture(0)), "a.txt": b"\xff"}, "not UTF-8"),
        ({"a.png": encoded(picture(0)), "a.txt": b" "}, "empty"),
        ({"a.png": b"", "a.txt": b"x"}, "not an image"),
        ({"a.jpg": encoded(picture(0, (64, 64)), "JPEG")[:500], "a.txt": b"x"}, "cannot be decoded"),
    ],
)
def test_unusable_samples(tmp_path, files, reason):
    tar = Tars.scan(str(write_tar(tmp_path / "a.tar", files)))
    with pytest.raises(Unusable, match=reason):
        tar[0]
    if any(name.endswith(".png") for name in files) and not any(name.endswith(".json") for name in files):
        folder = Folder.scan(write_folder(tmp_path / "folder", files))
        with pytest.raises(Unusable, match=reason):
            folder[0]


def test_opening_reads_headers_alone(tmp_path, monkeypatch):
    files = {name: data + bytes(200_000) for name, data in members(20).items()}
    path = write_tar(tmp_path / "a.tar", files)
    read = []

    class Counting:
        def __init__(self, file):
            self.file = file

        def read(self, size=-1):
            data = self.file.read(size)
            read.append(len(data))
            return data

        def __getattr__(self, name):
            return getattr(self.file, name)

    opened = tarfile.bltn_open
    monkeypatch.setattr(tarfile, "bltn_open", lambda *args, **kwargs: Counting(opened(*args, **kwargs)))
    assert len(Tars.scan(str(path))) == 20
    assert sum(read) < 45 * 1024 < path.stat().st_size / 100


def broken_tar(path, how):
    whole = write_tar(path, members(3)).read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-2]  # an image
    changed = {
        "in a member": whole[: last.offset_data + last.size // 2],
        "in a header": whole[: last.offset + 100],
        "between members": whole[: last.offset],
        "damaged header": whole[: last.offset] + b"?" * 512 + whole[last.offset + 512 :],
        "empty": b"",
        "no tar": b"It was a dark and stormy night. " * 100,
        "compressed": gzip.compress(whole),
    }
    path.write_bytes(changed[how])
    return str(path)


@pytest.mark.parametrize(
    "how",
    ["in a member", "in a header", "between members", "damaged header", "empty", "no tar", "compressed"],
)
def test_broken_tars(tmp_path, how):
    path = broken_tar(tmp_path / "a.tar", how)
    with pytest.raises(UserError, match="^data.path is .*a.tar.* cannot be read .*should be a whole tar") as caught:
        Tars.scan(path)
    assert "\n" not in str(caught.value)


def test_a_tar_without_samples(tmp_path):
    for files in ({}, {"README": b"x"}):
        with pytest.raises(UserError, match="data.path is .*no samples"):
            Tars.scan(str(write_tar(tmp_path / "a.tar", files)))


@pytest.mark.parametrize("path", ["{}/none.tar", "{}/*.tar", "{}", "{}/a.txt,{}/none.tar"])
def test_missing_tars(tmp_path, path):
    (tmp_path / "a.txt").write_text("x")
    path = path.format(tmp_path, tmp_path)
    with pytest.raises(UserError, match="no such file: should name a tar or a glob") as caught:
        Tars.scan(path)
    assert repr(path) in str(caught.value)


def test_a_tar_that_shrinks_or_goes(tmp_path):
    path = write_tar(tmp_path / "a.tar", members(3))
    source = Tars.scan(str(path))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(Unusable, match="shorter than when it was opened"):
        source[2]
    path.unlink()
    with pytest.raises(Unusable, match="cannot be read: No such file"):
        source[0]


@pytest.mark.skipif(not tiny_data.PHOTOGRAPHS.exists(), reason=f"{tiny_data.PHOTOGRAPHS.name} is not there")
def test_photographs():
    source = Tars.scan(str(tiny_data.PHOTOGRAPHS))
    assert len(source) == 32
    with tarfile.open(tiny_data.PHOTOGRAPHS) as tar:
        for i in range(32):
            image, caption = source[i]
            key = source.name(i).partition(":")[2]
            assert caption == tar.extractfile(f"{key}.txt").read().decode().strip()
            np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(tar.extractfile(f"{key}.jpg"))))


# folder


def test_folder(tmp_path):
    files = members(4)
    moved = {name.replace("002", "sub/naïve 日本"): data for name, data in files.items()}
    moved |= {".hidden.png": b"x", "notes.txt": b"x"}
    moved["003.PNG"] = moved.pop("003.png")
    source = Folder.scan(write_folder(tmp_path, moved))
    assert source.names == ["000.png", "001.png", "003.PNG", "sub/naïve 日本.png"]
    assert [source[i][1] for i in range(4)] == ["caption 0", "caption 1", "caption 3", "caption 2"]
    np.testing.assert_array_equal(np.asarray(source[3][0]), np.asarray(picture(2)))
    assert pickle.loads(pickle.dumps(source)) == source


def test_the_order_of_a_folder_is_that_of_its_names(tmp_path, monkeypatch):
    path = write_folder(tmp_path, {f"{d}/{n}": b"" for d in "ab" for n in ("1.png", "0.jpg", "2.webp")})
    names = Folder.scan(path).names
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda root: reversed([(d, s, f[::-1]) for d, s, f in walk(root)]))
    assert Folder.scan(path).names == names == sorted(names)


def test_a_folder_without_images(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="data.path is .*no images in it: should hold files ending in .jpg"):
        Folder.scan(str(tmp_path))


@pytest.mark.parametrize("name", ["none", "a.txt"])
def test_a_folder_that_is_none(tmp_path, name):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="data.path is .*no such folder"):
        Folder.scan(str(tmp_path / name))


# build


def test_build_finds_paths_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tar(tmp_path / "a.tar", members(10))
    write_folder(tmp_path / "f", members(10))
    for source, path in (("wds", "~/a.tar"), ("folder", "~/f")):
        config = tiny_data.settings(source=source, path=path, validation_fraction=0.2)
        train, validation = sources.build(config, "train"), sources.build(config, "validation")
        assert sorted(part[i][1] for part in (train, validation) for i in range(len(part))) == sorted(
            f"caption {i}" for i in range(10)
        )
        assert len(validation) == 2


def test_only_hf_streams():
    with pytest.raises(UserError, match="data.streaming is True: should be False"):
        sources.build(tiny_data.settings(source="digits", streaming=True), "train")
