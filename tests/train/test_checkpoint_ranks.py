"""Checkpoints that several processes write and read together."""

import re

import numpy as np
import pytest
import torch

from flux_func import tree
from flux_func.interop import orbax
from flux_func.train import checkpoint
from tests.helpers import rank_checkpoint, ranks

FSDP = rank_checkpoint.FSDP
DDP = (("*", {}),)
# Rows are read across those that were written.
COLUMNS = (("*.weight", {"shard": 1, "context": 1}), ("*", {"shard": 0}))


def on_disk(workdir, step, suffix=""):
    folder = orbax.folder(workdir) / str(step)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_eight_write_and_any_number_reads(tmp_path):
    ranks.run(8, rank_checkpoint.save, str(tmp_path), (2, 2, 2), FSDP, (1,), False)
    state = rank_checkpoint.whole(1)
    restored = checkpoint.restore(tmp_path, 1, checkpoint.abstract(tmp_path, 1))
    assert rank_checkpoint.digest(restored) == rank_checkpoint.digest(state)
    assert ranks.run(4, rank_checkpoint.restore, str(tmp_path), 1, (1, 2, 2), FSDP) == [[]] * 4
    assert ranks.run(2, rank_checkpoint.restore, str(tmp_path), 1, (1, 1, 2), COLUMNS) == [[]] * 2
    # What two have is written once.
    assert on_disk(tmp_path, 1) < 1.05 * checkpoint.size_in_bytes(state)
    # The weights are weights to everything else that reads checkpoints, plain Orbax too.
    opened = orbax.open_checkpoint(tmp_path)
    assert opened.cfg == rank_checkpoint.CFG
    assert rank_checkpoint.digest(opened.params()) == rank_checkpoint.digest(state["params"])
    import orbax.checkpoint as ocp

    plain = ocp.PyTreeCheckpointer().restore(tmp_path / "checkpoints" / "1" / "params")
    for path, leaf in tree.flatten(state["params"]).items():
        np.testing.assert_array_equal(plain[path], leaf.numpy())


def test_one_writes_and_eight_read(tmp_path):
    rank_checkpoint_state = rank_checkpoint.whole(5)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, rank_checkpoint_state, rank_checkpoint.CFG, {}, wait=True)
    assert ranks.run(8, rank_checkpoint.restore, str(tmp_path), 5, (2, 2, 2), FSDP) == [[]] * 8


@pytest.mark.parametrize(("wait", "table", "sizes"), [(False, COLUMNS, (1, 2, 1)), (True, DDP, (2, 1, 1))])
def test_the_state_may_be_changed_right_after_save(tmp_path, wait, table, sizes):
    steps = (1, 2, 3, 4)
    ranks.run(2, rank_checkpoint.save, str(tmp_path), sizes, table, steps, wait, 3)
    assert checkpoint.steps(tmp_path) == [2, 3, 4]
    for step in (2, 3, 4):
        restored = checkpoint.restore(tmp_path, step, checkpoint.abstract(tmp_path, step))
        assert rank_checkpoint.digest(restored) == rank_checkpoint.digest(rank_checkpoint.whole(step))
        assert checkpoint.read_config(tmp_path, step) == {"step": step}


@pytest.mark.parametrize(
    ("case", "where", "line"),
    [
        ("quota", 1, "a checkpoint could not be written there .File too large.; the checkpoint of step 1 is whole"),
        ("room", 0, "checkpoints need 1 x 0.01 GB more, and its disk has 0.00 GB free"),
        ("read", 1, "its checkpoint of step 1 cannot be read .cut short.: remove .* to go on from the one before it"),
        ("export", 1, "checkpoint.export_dtype is float16: params.img_in.weight reaches 1e.06"),
    ],
)
def test_what_fails_on_one_is_one_line_on_all(tmp_path, case, where, line):
    (first, steps), second = ranks.run(2, rank_checkpoint.refused, str(tmp_path), case)
    assert second == (first, [1, 3]) and steps == [1, 3]
    for said in first:
        assert re.search(line + rf".* .on rank {where} of 2, which is on \S+\)$", said) and "\n" not in said
    restored = checkpoint.restore(tmp_path, 3, checkpoint.abstract(tmp_path, 3))
    assert rank_checkpoint.digest(restored) == rank_checkpoint.digest(rank_checkpoint.whole(3))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_in_a_save_leaves_whole_checkpoints(tmp_path, victim):
    with pytest.raises(AssertionError, match="1 of 2 ranks failed; the first one:\nthe process died"):
        ranks.run(2, rank_checkpoint.lose_one, str(tmp_path), victim, timeout=60)
    assert checkpoint.steps(tmp_path) == [1]
    restored = checkpoint.restore(tmp_path, 1, checkpoint.abstract(tmp_path, 1))
    assert rank_checkpoint.digest(restored) == rank_checkpoint.digest(rank_checkpoint.whole(1))
    # Those that come back clear away what was left, and write that step again.
    ranks.run(2, rank_checkpoint.save, str(tmp_path), (1, 2, 1), FSDP, (2,), True)
    assert sorted(path.name for path in orbax.folder(tmp_path).iterdir()) == ["1", "2"]
