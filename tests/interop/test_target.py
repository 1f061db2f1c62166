"""What is written appears whole or not at all, and replaces nothing unasked."""

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import signal

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
        assert listing(tmp_path) == [
            "new",
            "new/.x.safetensors.partial",
            "new/.x.safetensors.partial/lock",
            "new/.x.safetensors.partial/new",
        ]
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
    (tmp_path / ".folder.partial").mkdir()
    (tmp_path / ".folder.partial/lock").write_text("")
    for name in ("new", "old"):
        fill(tmp_path / ".folder.partial" / name, "half")
        (tmp_path / ".folder.partial" / name / "other").write_text("")
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


@pytest.mark.parametrize(
    "name", ["thesis.tex", "notes.txt", "transformer/train.py", "vae/a/results.json", "checkpoints/5/mine.ckpt"]
)
def test_a_folder_with_anything_else_in_it_is_never_overwritten(tmp_path, name):
    fill(tmp_path / "home")
    (tmp_path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "home" / name).write_text("precious")
    with pytest.raises(UserError, match=f"holds '{name}' beside weights"):
        target.check(tmp_path / "home", 0, overwrite=True)


def test_a_file_that_is_no_weights_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="thesis.txt: is no safetensors file and is not overwritten"):
        target.check(tmp_path / "thesis.txt", 0, overwrite=True)


def test_a_runs_folder_of_checkpoints_is_not_overwritten(tmp_path):
    """Below the folder of a run they are, as they are where weights were written in Orbax's format."""
    for step in ("5", "6"):
        (tmp_path / "run/checkpoints" / step / "params/d").mkdir(parents=True)
        (tmp_path / "run/checkpoints" / step / "params/d/a1b2").write_text("")
        (tmp_path / "run/checkpoints" / step / "commit_success.txt").write_text("")
    target.check(tmp_path / "run", 0, overwrite=True, folders=["checkpoints"])
    with pytest.raises(UserError, match="holds a folder 'checkpoints', which would be lost"):
        target.check(tmp_path / "run", 0, overwrite=True, folders=["transformer"])
    with pytest.raises(UserError, match="holds '5/commit_success.txt' beside weights"):
        target.check(tmp_path / "run/checkpoints", 0, overwrite=True)


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


def test_a_link_to_a_folder_is_replaced_and_the_folder_left(tmp_path):
    fill(tmp_path / "cache", "shared")
    (tmp_path / "folder").symlink_to("cache")
    with target.beside(tmp_path / "folder", overwrite=True) as partial:
        fill(partial)
    assert listing(tmp_path) == ["cache", "cache/config.json", "folder", "folder/config.json"]
    assert (tmp_path / "cache/config.json").read_text() == "shared"
    assert (tmp_path / "folder/config.json").read_text() == "new"


# Two at once.


def test_two_writers_of_one_path(tmp_path):
    path = tmp_path / "x.safetensors"
    with target.beside(path) as first:
        first.write_text("first")
        with pytest.raises(UserError, match="x.safetensors: is being written by another process"):
            target.beside(path).__enter__()
        with target.beside(tmp_path / "y.safetensors") as other:
            other.write_text("other")
    assert path.read_text() == "first" and listing(tmp_path) == ["x.safetensors", "y.safetensors"]


def test_a_lock_that_was_removed_in_the_meantime_is_none(tmp_path, monkeypatch):
    """The other process ends between the opening of its lock and the locking."""
    other, real = target.beside(tmp_path / "x.safetensors"), target._lock
    other.__enter__().write_text("other")

    def late(file):
        monkeypatch.setattr(target, "_lock", real)
        other.__exit__(None, None, None)
        real(file)

    monkeypatch.setattr(target, "_lock", late)
    with pytest.raises(UserError, match="is being written by another process"):
        target.beside(tmp_path / "x.safetensors").__enter__()
    assert (tmp_path / "x.safetensors").read_text() == "other" and listing(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSYS, None), (errno.EIO, "cannot be written")])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number, says):
    def refusing(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refusing)
    with (
        pytest.raises(UserError, match=says) if says else contextlib.nullcontext(),
        target.beside(tmp_path / "x.safetensors") as partial,
    ):
        partial.write_text("whole")
    assert (tmp_path / "x.safetensors").exists() == (says is None)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_is_not_replaced(tmp_path, overwrite):
    with (
        pytest.raises(UserError, match="holds 'thesis.tex'" if overwrite else "is there already"),
        target.beside(tmp_path / "folder", overwrite) as partial,
    ):
        fill(partial)
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder/thesis.tex").write_text("precious")
    assert listing(tmp_path) == ["folder", "folder/thesis.tex"]


# Between the renames.


def replace(path, text):
    with target.beside(path, overwrite=True) as partial:
        fill(partial, text)


@pytest.mark.parametrize("kill", range(6))
def test_killed_around_a_rename(tmp_path, kill):
    """Just before or after the n-th of the three renames: old away, new here, old to be removed."""
    path = tmp_path / "folder"
    fill(path, "old")
    child = os.fork()
    if not child:
        count = 0

        def killing(real):
            def rename(*paths):
                nonlocal count
                for call in (lambda: None, lambda: real(*paths)):
                    call()
                    if count == kill:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count += 1

            return rename

        os.rename, os.replace = killing(os.rename), killing(os.replace)
        replace(path, "new")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    # A next try that is refused, or fails, leaves what there was.
    with pytest.raises(UserError, match="is there already"):
        target.beside(path).__enter__()
    assert listing(tmp_path) == ["folder", "folder/config.json"]
    assert (path / "config.json").read_text() == ("old" if kill < 3 else "new")
    replace(path, "newer")
    assert listing(tmp_path) == ["folder", "folder/config.json"]
    assert (path / "config.json").read_text() == "newer"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_second_rename_that_fails(tmp_path, monkeypatch, error):
    fill(tmp_path / "folder", "old")

    def failing(*paths):
        raise error

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises((UserError, KeyboardInterrupt), match=None if isinstance(error, KeyboardInterrupt) else "as it"):
        replace(tmp_path / "folder", "new")
    assert listing(tmp_path) == ["folder", "folder/config.json"]
    assert (tmp_path / "folder/config.json").read_text() == "old"


def test_a_disk_that_refuses_every_rename_from_the_second_on(tmp_path, monkeypatch):
    fill(tmp_path / "folder", "old")
    real, calls = os.rename, []

    def failing(*paths):
        calls.append(paths)
        if len(calls) > 1:
            raise OSError(errno.EIO, "Input/output error")
        real(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        patch.setattr(os, "replace", failing)
        says = r"\(Input/output error\); what was there is .*/\.folder\.partial/old, and the next try puts it back"
        with pytest.raises(UserError, match=says):
            replace(tmp_path / "folder", "new")
    assert (tmp_path / ".folder.partial/old/config.json").read_text() == "old"
    with pytest.raises(UserError, match="is there already"):
        target.beside(tmp_path / "folder").__enter__()
    assert listing(tmp_path) == ["folder", "folder/config.json"]


@pytest.mark.parametrize("name", ["rmtree", "_sync_one"])
def test_what_fails_once_the_new_is_there_is_no_failure(tmp_path, monkeypatch, name):
    fill(tmp_path / "folder", "old")
    of = shutil if name == "rmtree" else target
    real = getattr(of, name)

    def failing(path, *rest):
        if name == "rmtree" or path == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(of, name, failing)
        replace(tmp_path / "folder", "new")
    assert (tmp_path / "folder/config.json").read_text() == "new"
    replace(tmp_path / "folder", "newer")
    assert listing(tmp_path) == ["folder", "folder/config.json"]


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
