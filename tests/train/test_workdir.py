"""A run's folder is one run's at a time, and room is asked for before it is needed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func.errors import UserError
from flux_func.train import workdir as workdirs


def test_one_run_at_a_time_writes(tmp_path):
    folder = tmp_path / "a" / "b"
    with workdirs.keeping_others_out(folder):
        with pytest.raises(UserError, match="another run is writing there"), workdirs.keeping_others_out(folder):
            pass
        with workdirs.keeping_others_out(tmp_path / "a" / "c"):
            pass
        assert list(folder.iterdir()) == []
    with workdirs.keeping_others_out(folder):
        pass


def test_what_goes_wrong_inside_is_not_the_locks(tmp_path):
    with pytest.raises(BlockingIOError), workdirs.keeping_others_out(tmp_path):
        raise BlockingIOError
    with workdirs.keeping_others_out(tmp_path):
        pass


def test_a_file_system_without_locks_is_used_as_it_is(tmp_path, monkeypatch):
    asked = []

    def none(folder, operation):
        asked.append(operation)
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(workdirs.fcntl, "flock", none)
    with workdirs.keeping_others_out(tmp_path), workdirs.keeping_others_out(tmp_path):
        assert len(asked) == 2


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_a_workdir_that_is_no_folder(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder; name another --workdir"):
        workdirs.check_workdir(str(tmp_path / below))


@settings(max_examples=200, deadline=None)
@given(
    there=st.lists(st.integers(1, 30), max_size=6, unique=True).map(sorted),
    more=st.lists(st.integers(31, 60), min_size=1, max_size=12, unique=True).map(sorted),
    keep_last=st.integers(0, 4),
    keep_every=st.integers(0, 7),
)
def test_room_is_asked_for_the_most_that_is_ever_held(there, more, keep_last, keep_every):
    def prune(steps):
        last = steps[-keep_last:] if keep_last else steps
        return [step for step in steps if step in last or (keep_every and step % keep_every == 0)]

    held, most = prune(there), 0
    start = len(held)
    for step in more:
        held.append(step)
        most = max(most, len(held) - start)
        held = prune(held)
    assert max(1, workdirs._most_held(prune(there) + more, keep_last, keep_every) - start) == most
