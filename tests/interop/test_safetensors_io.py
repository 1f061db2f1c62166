"""Safetensors files byte for byte as safetensors writes them, read by rows, in memory that does not grow with them."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from flux_func.errors import UserError
from flux_func.interop import safetensors_io

DTYPES = list(safetensors_io._CODES)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=6)
TENSORS = st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=6)


def random(shape, dtype, seed=0):
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=torch.manual_seed(seed))
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def write(path, tensors, **kwargs):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    safetensors_io.write(path, shapes, dtypes, tensors.__getitem__, **kwargs)


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8).tolist()


# safetensors itself leaves the order of two entries of metadata to chance.
@given(TENSORS, st.dictionaries(NAMES, NAMES, max_size=1))
@settings(max_examples=60, deadline=None)
def test_a_file_is_that_of_safetensors(tmp_path_factory, declared, metadata):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    tensors = {name: random(shape, dtype, seed) for seed, (name, (shape, dtype)) in enumerate(declared.items())}
    counts = []
    write(path, tensors, metadata=metadata, progress=counts.append)
    assert path.read_bytes() == save(tensors, metadata or None)
    assert sum(counts) == sum(tensor.nbytes for tensor in tensors.values())
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata

    found = safetensors_io.open_files([path])
    assert found.metadata == metadata and found.shapes.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.shapes[name] == tensor.shape and found.dtypes[name] == tensor.dtype
        rows = tensor.reshape(tensor.shape or (1,))
        for first in range(len(rows) + 1):
            part = found.read(name, first, len(rows))
            assert part.dtype == tensor.dtype and part.shape == rows[first:].shape
            assert bits(part) == bits(rows[first:])
        with pytest.raises(ValueError, match="rows"):
            found.read(name, 0, len(rows) + 1)


@given(st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_a_file_cut_anywhere_is_refused_in_one_line(tmp_path_factory, place):
    folder = tmp_path_factory.mktemp("cut")
    whole = save({"a": torch.zeros(7, 3), "b": torch.zeros(5)})
    (folder / "x.safetensors").write_bytes(whole[: place % len(whole)])
    with pytest.raises(UserError, match="x.safetensors: is cut short or no safetensors file") as caught:
        safetensors_io.open_files([folder / "x.safetensors"])
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "text.safetensors").write_text("weights of mine, in words")
    for name, words in {
        "none.safetensors": "No such file",
        "text.safetensors": "no safetensors",
        "": "directory",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            safetensors_io.open_files([tmp_path / name])
        assert str(tmp_path / name) in str(caught.value)


def test_a_type_that_torch_cannot_compute_with_is_named(tmp_path):
    packed = torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file({"packed.weight": packed}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="'packed.weight' is of type F4"):
        safetensors_io.open_files([tmp_path / "x.safetensors"])


def test_a_name_in_two_files_is_refused(tmp_path):
    for file in "ab":
        save_file({"same": torch.zeros(1), file: torch.zeros(1)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(UserError, match="b.safetensors: holds 'same', which .*a.safetensors holds too"):
        safetensors_io.open_files([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_a_file_that_shrinks_or_goes_meanwhile_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    read = safetensors_io.open_files([path]).read
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="has become shorter"):
        read("a", 0, 1000)
    assert read("a", 0, 998).shape == (998,)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        read("a", 0, 1)


def test_what_is_read_outlives_the_file(tmp_path):
    save_file({"a": torch.arange(6.0).reshape(3, 2)}, tmp_path / "x.safetensors")
    rows = safetensors_io.open_files([tmp_path / "x.safetensors"]).read("a", 1, 3)
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert rows.tolist() == [[2, 3], [4, 5]]


# Writing.


def test_an_error_on_the_way_leaves_the_target_as_it_was(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, {"a": torch.ones(3)})
    with pytest.raises(UserError, match="is there already"):
        write(path, {"a": torch.zeros(3)})

    def failing(name):
        if name == "b":
            raise KeyboardInterrupt
        return torch.zeros(3)

    shapes, dtypes = {"a": (3,), "b": (3,)}, dict.fromkeys("ab", torch.float32)
    with pytest.raises(KeyboardInterrupt):
        safetensors_io.write(path, shapes, dtypes, failing, overwrite=True)
    assert load_file(path)["a"].tolist() == [1, 1, 1] and [child.name for child in tmp_path.iterdir()] == [path.name]
    write(path, {"a": torch.zeros(3)}, overwrite=True)
    assert load_file(path)["a"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros(3, dtype=torch.float64)])
def test_a_tensor_not_as_announced_is_a_defect(tmp_path, wrong):
    with pytest.raises(ValueError, match="a is .* not as announced"):
        safetensors_io.write(tmp_path / "x.safetensors", {"a": (3,)}, {"a": torch.float32}, lambda name: wrong)
    assert not list(tmp_path.iterdir())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(9, 30))
@settings(max_examples=40, deadline=None)
def test_shards_are_huggingface_hubs(tmp_path_factory, sizes, most):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"w{i}": torch.full((size,), i, dtype=torch.uint8) for i, size in enumerate(sizes)}
    shapes, dtypes = {n: tuple(t.shape) for n, t in tensors.items()}, {n: t.dtype for n, t in tensors.items()}
    safetensors_io.write_sharded(folder, "model", shapes, dtypes, tensors.__getitem__, most, {"format": "pt"})
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=most
    )
    files = set(plan.filename_to_tensors)
    assert {file.name for file in folder.glob("*.safetensors")} == files
    for file, names in plan.filename_to_tensors.items():
        assert load_file(folder / file).keys() == set(names)
    index = folder / "model.safetensors.index.json"
    assert index.exists() == plan.is_sharded
    if plan.is_sharded:
        said = json.loads(index.read_text())
        assert said == {"metadata": {"total_size": sum(sizes)}, "weight_map": plan.tensor_to_filename}
        found = safetensors_io.open_sharded(index)
        assert found.shapes == shapes and found.metadata == {"format": "pt"}
        assert all(torch.equal(found.read(n, 0, len(t)), t) for n, t in tensors.items())


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    tensors = {"a": torch.zeros(2), "b": torch.zeros(50), "c": torch.zeros(2)}
    shapes, dtypes = {n: tuple(t.shape) for n, t in tensors.items()}, dict.fromkeys(tensors, torch.float32)
    safetensors_io.write_sharded(tmp_path, "m", shapes, dtypes, tensors.__getitem__, max_bytes=20)
    assert [list(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))] == [["a"], ["b"], ["c"]]


def sharded(folder: Path) -> Path:
    tensors = {"a": torch.zeros(3), "b": torch.zeros(3)}
    dtypes = dict.fromkeys(tensors, torch.float32)
    safetensors_io.write_sharded(folder, "m", dict.fromkeys(tensors, (3,)), dtypes, tensors.__getitem__, max_bytes=12)
    return folder / "m.safetensors.index.json"


def edit(index: Path, **entries):
    said = json.loads(index.read_text())
    said["weight_map"] = {name: file for name, file in (said["weight_map"] | entries).items() if file}
    index.write_text(json.dumps(said))


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path):
    index = sharded(tmp_path)
    edit(index, c="m-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="'c' the index has and no shard"):
        safetensors_io.open_sharded(index)
    edit(index, c=None, b=None)
    assert set(safetensors_io.open_sharded(index).shapes) == {"a"}  # a shard that the index does not name
    edit(index, a="m-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="does not fit its shards: 'a' the index has"):
        safetensors_io.open_sharded(index)


def test_an_absent_shard_is_named(tmp_path):
    index = sharded(tmp_path)
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    # A cache whose download was interrupted has links to nothing.
    (tmp_path / "m-00002-of-00002.safetensors").symlink_to(tmp_path / "blobs" / "none")
    with pytest.raises(UserError, match=r"names 'm-00002-of-00002.safetensors', which is not there \(1 absent of 2\)"):
        safetensors_io.open_sharded(index)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/other.safetensors"])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, file):
    (tmp_path / "in").mkdir()
    index = sharded(tmp_path / "in")
    save_file({"b": torch.zeros(3)}, tmp_path / "other.safetensors")
    edit(index, b=file)
    with pytest.raises(UserError, match="which is not there"):
        safetensors_io.open_sharded(index)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": []}'])
def test_what_is_no_index_is_refused(tmp_path, text):
    (tmp_path / "x.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="is no index"):
        safetensors_io.open_sharded(tmp_path / "x.safetensors.index.json")


# Memory.

_PEAK = """
import resource, sys, torch
from flux_func.interop import safetensors_io
path, count, before = sys.argv[1], int(sys.argv[2]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
names = [f"w{i}" for i in range(count)]
shapes, dtypes = dict.fromkeys(names, (2048, 1024)), dict.fromkeys(names, torch.float32)
safetensors_io.write(path, shapes, dtypes, lambda name: torch.ones(2048, 1024))
found = safetensors_io.open_files([path])
assert all(float(found.read(name, 0, 2048).amin()) == 1 for name in names)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for count in (2, 16):  # tensors of 8 MiB
        command = [sys.executable, "-c", _PEAK, str(tmp_path / f"{count}.safetensors"), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < peaks[0] + 16, peaks
