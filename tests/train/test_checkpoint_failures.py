"""Checkpoints of several processes, of which one fails."""

import re

import pytest

from flux_func.interop import orbax
from flux_func.train import checkpoint
from tests.helpers import rank_checkpoint, ranks

FSDP = rank_checkpoint.FSDP
LINES = (
    (1, "its checkpoint of step 1 cannot be read .cut short.: remove .* to go on from the one before it"),
    (1, "checkpoint.export_dtype is float16: params.img_in.weight reaches 1e.06"),
    (0, "checkpoints need 1 x 0.01 GB more, and its disk has 0.00 GB free"),
    (1, "a checkpoint could not be written there .File too large.; the checkpoint of step 1 is whole"),
    (1, "a checkpoint could not be written there .File too large.; the checkpoint of step 1 is whole"),
)


def test_what_fails_on_one_is_one_line_on_all(tmp_path):
    (first, steps), second = ranks.run(2, rank_checkpoint.refused, str(tmp_path))
    assert second == (first, [1, 3]) and steps == [1, 3]
    for said, (rank, line) in zip(first, LINES, strict=True):
        assert re.search(line + rf".* .on rank {rank} of 2, which is on \S+\)$", said) and "\n" not in said
    restored = checkpoint.restore(tmp_path, 3, checkpoint.abstract(tmp_path, 3))
    assert rank_checkpoint.digest(restored) == rank_checkpoint.digest(rank_checkpoint.whole(3))


@pytest.mark.parametrize(("victim", "when"), [(0, "saving"), (1, "saving"), (0, "between")])
def test_a_process_that_is_killed_leaves_whole_checkpoints_and_takes_no_other_with_it(tmp_path, victim, when):
    workdir = tmp_path / "run"
    with pytest.raises(AssertionError, match="2 of 2 ranks failed"):
        ranks.run(2, rank_checkpoint.lose_one, str(workdir), victim, when, timeout=60)
    # What the other meets is torch's error, in Python.
    kind, seconds = re.fullmatch(r"(\w+) after (\d+) s", (tmp_path / "said").read_text()).groups()
    assert kind == "RuntimeError" and int(seconds) < 30
    assert checkpoint.steps(workdir) == [1]
    restored = checkpoint.restore(workdir, 1, checkpoint.abstract(workdir, 1))
    assert rank_checkpoint.digest(restored) == rank_checkpoint.digest(rank_checkpoint.whole(1))
    # Those that come back clear away what was left, and write that step again.
    ranks.run(2, rank_checkpoint.save, str(workdir), (1, 2, 1), FSDP, (2,), True)
    assert sorted(path.name for path in orbax.folder(workdir).iterdir()) == ["1", "2"]


def test_a_process_that_fails_still_takes_part_in_the_save_under_way(tmp_path):
    assert max(ranks.run(2, rank_checkpoint.fail_alone, str(tmp_path), timeout=60)) < checkpoint.GRACE_SECONDS
    restored = checkpoint.restore(tmp_path, 1, checkpoint.abstract(tmp_path, 1))
    assert rank_checkpoint.digest(restored) == rank_checkpoint.digest(rank_checkpoint.whole(1))
