"""What is written appears whole or not at all, and replaces nothing unasked."""

import os
import resource
import shutil

import pytest

from flux_func.errors import UserError
from flux_func.interop import target


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fill(path, text="new"):
    path.mkdir()
    (path / "config.json").write_text(text)


def test_a_file_and_a_folder_appear_at_the_end(tmp_path):
    with target.beside(tmp_path / "new" / "x.safetensors") as partial:
        partial.write_text("whole")
        assert listing(tmp_path) == ["new", "new/.x.safetensors.partial"]
    with target.beside(tmp_path / "new" / "folder") as partial:
        fill(partial)
        assert not (tmp_path / "new" / "folder").exists()
    assert listing(tmp_path) == ["new", "new/folder", "new/folder/config.json", "new/x.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, UserError])
def test_an_interruption_leaves_all_as_it_was(tmp_path, error):
    fill(tmp_path / "folder", "old")
    with pytest.raises(error), target.beside(tmp_path / "folder", overwrite=True) as partial:
        fill(partial)
        raise error
    assert listing(tmp_path) == ["folder", "folder/config.json"]
    assert (tmp_path / "folder" / "config.json").read_text() == "old"


def test_what_a_killed_try_left_is_replaced(tmp_path):
    fill(tmp_path / ".folder.partial", "half")
    (tmp_path / ".folder.partial" / "other").write_text("")
    fill(tmp_path / ".folder.old")
    (tmp_path / "folder").mkdir()  # an empty folder is no obstacle
    with target.beside(tmp_path / "folder") as partial:
        fill(partial)
    assert listing(tmp_path) == ["folder", "folder/config.json"]


def test_nothing_is_overwritten_unasked(tmp_path):
    (tmp_path / "x.safetensors").write_text("old")
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    fill(tmp_path / "folder")
    for name in ("x.safetensors", "link.safetensors", "folder"):
        for attempt in (lambda path: target.check(path, 0), lambda path: target.beside(path).__enter__()):
            with pytest.raises(UserError, match="is there already"):
                attempt(tmp_path / name)
        target.check(tmp_path / name, 0, overwrite=True)
    assert (tmp_path / "x.safetensors").read_text() == "old"


def test_a_folder_with_anything_else_in_it_is_never_overwritten(tmp_path):
    fill(tmp_path / "home")
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds 'thesis.tex' beside weights"):
        target.check(tmp_path / "home", 0, overwrite=True)


def test_overwriting_replaces_the_whole(tmp_path):
    fill(tmp_path / "folder", "old")
    (tmp_path / "folder" / "shard.safetensors").write_text("old")
    with target.beside(tmp_path / "folder", overwrite=True) as partial:
        fill(partial)
    assert listing(tmp_path) == ["folder", "folder/config.json"]
    assert (tmp_path / "folder" / "config.json").read_text() == "new"


def test_a_link_into_a_cache_is_replaced_and_the_cache_left(tmp_path):
    (tmp_path / "blob").write_text("shared")
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "blob")
    with target.beside(tmp_path / "x.safetensors", overwrite=True) as partial:
        partial.write_text("mine")
    assert (tmp_path / "blob").read_text() == "shared" and (tmp_path / "x.safetensors").read_text() == "mine"


def test_room_is_asked_for_first(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    target.check(tmp_path / "deep" / "er" / "x", free // 2)
    with pytest.raises(UserError, match=r"x: needs 4000000\.00 GB, .* has .* GB free; make room"):
        target.check(tmp_path / "deep" / "er" / "x", 4 * 10**15)
    assert listing(tmp_path) == []


def test_a_read_only_target_is_refused_at_once(tmp_path, monkeypatch):
    # The superuser may write anywhere, so the system's answer is given here.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="is read-only"):
        target.check(tmp_path / "x", 0)


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is read-only or no folder"):
        target.check(tmp_path / "file" / "x", 0)
    with (
        pytest.raises(UserError, match="file/x: cannot be written .*; it is as it was"),
        target.beside(tmp_path / "file" / "x"),
    ):
        raise AssertionError("not reached")


def test_a_disk_that_fills_meanwhile_is_one_line(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with (
            pytest.raises(UserError, match=r"x.safetensors: cannot be written \(File too large\); it is as it was"),
            target.beside(path, overwrite=True) as partial,
            partial.open("wb") as file,
        ):
            file.write(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(tmp_path) == ["x.safetensors"] and path.read_text() == "old"
