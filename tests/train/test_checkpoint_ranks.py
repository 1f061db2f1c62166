"""Checkpoints that several processes write and read together."""

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


def on_disk(workdir, step):
    folder = orbax.folder(workdir) / str(step)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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
    state = rank_checkpoint.whole(5)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, rank_checkpoint.CFG, {}, wait=True)
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


def test_no_process_holds_a_whole_large_leaf(tmp_path):
    state = {"params": {"w": torch.full((1 << 14, 1 << 12), 7.0)}}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, rank_checkpoint.CFG, {}, wait=True)
    like = checkpoint.abstract(tmp_path, 1)
    peaks = ranks.run(2, rank_checkpoint.peak_of_restore, str(tmp_path), like)
    # MiB: 128 that it gets, as many that are read, and pieces; whole, the leaf alone has 256.
    assert max(peaks) < 128 + 128 + 100
