"""DCP folders that are hostile, damaged or cut short: each is one line, and nothing of them is run."""

import io
import os
import pickle
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from flux_func.errors import UserError
from flux_func.interop import dcp


class Calls:
    """What a pickle calls when it is loaded."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def global_of(module, name):
    """A pickle that looks a name up, dots and all."""
    encoded = [text.encode() for text in (module, name)]
    return b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text for text in encoded) + b"\x93."


def hostile(path):
    touch = Calls(os.system, f"touch {path}")
    return {
        "posix.system": pickle.dumps(touch),
        "builtins.eval": pickle.dumps(Calls(eval, f"open({str(path)!r}, 'w')")),
        "builtins.exec": pickle.dumps(Metadata({"w": Calls(exec, f"open({str(path)!r}, 'w')")})),
        "builtins.getattr": pickle.dumps(Metadata({}, planner_data=Calls(getattr, torch.Size, "__class__"))),
        "torch.load": global_of("torch", "load"),
        "torch.Size.__class__": global_of("torch", "Size.__class__"),
        "torch.distributed.checkpoint.metadata.os": global_of("torch.distributed.checkpoint.metadata", "os"),
        "torch.distributed.checkpoint.filesystem.FileSystem": global_of(
            "torch.distributed.checkpoint.filesystem", "FileSystem"
        ),
        "builtins.tuple": global_of("builtins", "tuple"),
    }


@pytest.mark.parametrize("name", list(hostile("")))
def test_a_pickle_that_names_anything_else_is_refused_unrun(tmp_path, name):
    touched = tmp_path / "touched"
    (tmp_path / ".metadata").write_bytes(hostile(touched)[name])
    with pytest.raises(UserError) as error:
        dcp.open_folder(tmp_path)
    assert f"{tmp_path}/.metadata: refused, it names {name}, which has no place in a checkpoint" in str(error.value)
    assert "\n" not in str(error.value) and not touched.exists()


def test_no_class_of_torchs_is_made_or_changed(tmp_path):
    # A pickle may set the attributes of a class that it names: here it is a stand-in, which refuses.
    body = global_of("torch.distributed.checkpoint.metadata", "Metadata")[:-1]
    (tmp_path / ".metadata").write_bytes(body + b"N}\x8c\x08__init__NS\x86b.")
    with pytest.raises(UserError, match="is not a whole DCP .metadata"):
        dcp.open_folder(tmp_path)
    assert Metadata({}).state_dict_metadata == {}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tensors = {"w": torch.randn(40, 30, generator=torch.manual_seed(0)), "b": torch.ones((), dtype=torch.bfloat16)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dcp.write(folder, shapes, {name: tensor.dtype for name, tensor in tensors.items()}, tensors.__getitem__)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(folder, files):
    for name, content in files.items():
        Path(folder, name).write_bytes(content)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_damaged_metadata_is_one_line(saved, data):
    whole_one = saved[".metadata"]
    at = data.draw(st.integers(0, len(whole_one) - 1))
    byte = data.draw(st.none() | st.integers(0, 255))
    damaged = whole_one[:at] if byte is None else whole_one[:at] + bytes([byte]) + whole_one[at + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        put(folder, {**saved, ".metadata": damaged})
        try:
            opened = dcp.open_folder(folder)
            for name, shape in opened.shapes.items():
                opened.read(name, 0, min(shape[0], 40) if shape else 1)
        except UserError as error:
            assert "\n" not in str(error) and folder in str(error)
        else:
            assert byte is not None


def edited(saved, change):
    metadata = pickle.loads(saved[".metadata"])
    change(metadata)
    return {**saved, ".metadata": pickle.dumps(metadata)}


def place(metadata):
    return metadata.storage_data[MetadataIndex("w", (0, 0))]


def chunk(metadata):
    return metadata.state_dict_metadata["w"].chunks[0]


def twice(metadata, sizes, offsets):
    """Two chunks of half of w each, which lie over each other."""
    shape, there = torch.Size(sizes), place(metadata)
    chunks = [ChunkStorageMetadata(torch.Size(at), shape) for at in ((0, 0), offsets)]
    metadata.state_dict_metadata["w"].chunks = chunks
    metadata.storage_data |= {MetadataIndex("w", each.offsets, number): there for number, each in enumerate(chunks)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(place(m), "relative_path", "../w"), "it names '../w', which is no file in the folder"),
        (lambda m: setattr(place(m), "relative_path", "/etc/passwd"), "it names '/etc/passwd', which is no file"),
        (lambda m: setattr(place(m), "relative_path", "a.distcp"), "lacks a.distcp, which its .metadata names"),
        (lambda m: setattr(place(m), "offset", -1), "it names bytes -1 to "),
        (lambda m: setattr(place(m), "length", 10**6), "__0_0.distcp: is cut short, 6377 bytes of at least 1000000"),
        (lambda m: setattr(place(m), "length", 50), "w cannot be read"),
        (lambda m: setattr(chunk(m), "sizes", torch.Size((39, 30))), "the chunks of w are not the whole of it"),
        (lambda m: twice(m, (20, 30), (19, 0)), "the chunks of w are not the whole of it, each element once"),
        (lambda m: twice(m, (40, 15), (0, 14)), "the chunks of w are not the whole of it, each element once"),
        (lambda m: twice(m, (40, 15), (0, 0)), "the chunks of w are not the whole of it, each element once"),
        (lambda m: setattr(chunk(m), "sizes", torch.Size((41, 30))), r"w of shape \[40, 30\] has a chunk beyond it"),
        (lambda m: setattr(chunk(m), "offsets", torch.Size((0, -1))), r"has a chunk beyond it"),
        (lambda m: m.storage_data.clear(), r"w has a chunk at \[0, 0\] that is stored nowhere"),
        (lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.Size()), "is no type of tensors"),
        (lambda m: setattr(place(m), "transform_descriptors", ["stream.rot13"]), "w cannot be read"),
    ],
)
def test_metadata_that_tells_lies_is_one_line(tmp_path, saved, change, message):
    put(tmp_path, edited(saved, change))
    with pytest.raises(UserError, match=message) as error:
        opened = dcp.open_folder(tmp_path)
        opened.read("w", 0, 40)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_file_that_is_cut_short_or_gone(tmp_path, saved):
    name = "__0_0.distcp"
    put(tmp_path, {**saved, name: saved[name][:-1]})
    with pytest.raises(UserError, match=rf"{tmp_path}/{name}: is cut short, \d+ bytes of at least \d+"):
        dcp.open_folder(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{tmp_path}: lacks {name}, which its .metadata names"):
        dcp.open_folder(tmp_path)
    (tmp_path / ".metadata").unlink()
    with pytest.raises(UserError, match=rf"{tmp_path}/.metadata: cannot be read \(No such file or directory\)"):
        dcp.open_folder(tmp_path)


def test_a_chunk_that_is_no_tensor_is_one_line_and_not_run(tmp_path, saved):
    name, touched = "__0_0.distcp", tmp_path / "touched"
    for content in (saved[name][:100] + bytes(len(saved[name]) - 100), torn(saved[name], touched)):
        put(tmp_path, {**saved, name: content})
        opened = dcp.open_folder(tmp_path)
        with pytest.raises(UserError, match=f"{tmp_path}: w cannot be read") as error:
            opened.read("w", 0, 40)
        assert "\n" not in str(error.value) and not touched.exists()


def torn(content, touched):
    """The chunk's archive with a pickle in it that calls."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(new, "w") as out:
        for entry in old.namelist():
            call = pickle.dumps(Calls(os.system, f"touch {touched}"), protocol=2)
            out.writestr(entry, call if entry.endswith("data.pkl") else old.read(entry))
    return new.getvalue().ljust(len(content), b"\0")[: max(len(content), len(new.getvalue()))]
