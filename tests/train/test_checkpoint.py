import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import config, tree
from flux_func.errors import UserError
from flux_func.interop import orbax
from flux_func.models import flux
from flux_func.train import checkpoint
from flux_func.train import workdir as workdirs
from flux_func.train.state import size_in_bytes

ROOT = Path(__file__).parents[2]
CFG = flux.flavor("flux-tiny")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


def random_bits(shape, dtype, seed):
    """Any bit pattern: infinities, negative zeros, every kind of nan."""
    raw = np.random.default_rng(seed).integers(0, 256, torch.Size(shape).numel() * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape).clone()


def params(seed=0, dtype=torch.float32, blocks=2):
    """A tree with all that FLUX's has: lists, dicts with the keys "0" and "2", a scalar."""
    block = {"img_mlp.0.weight": (5, 3), "img_mlp.2.weight": (3, 5), "norm.scale": (4,)}
    shapes = {f"double_blocks.{i}.{path}": shape for i in range(blocks) for path, shape in block.items()}
    shapes |= {"img_in.weight": (6, 2), "scale": ()}
    rng = torch.Generator().manual_seed(seed)
    return tree.unflatten({path: torch.randn(shape, generator=rng).to(dtype) for path, shape in shapes.items()})


def make_state(seed=0, ema=True):
    moments = {"exp_avg": params(seed + 1), "exp_avg_sq": params(seed + 2, torch.bfloat16)}
    state = {"params": params(seed), "opt": {**moments, "step": torch.tensor(2**40 + seed)}}
    return state | ({"ema": params(seed + 3)} if ema else {})


def clone(state):
    return tree.map(torch.clone, state)


def identical(a, b):
    """Whether two trees have the same structure, types, shapes and bits."""

    def same(x, y):
        return x.dtype == y.dtype and x.shape == y.shape and bytes(as_numpy(x)) == bytes(as_numpy(y))

    return all(tree.leaves(tree.map(same, a, b)))


def as_numpy(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def written(workdir, *steps, state=None, **options):
    with checkpoint.Checkpoints(workdir, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state or make_state(step), CFG, {"step": step}, wait=True)


def python(code, *args):
    """Runs code in a process of its own; returns (exit code, standard output, standard error)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=environment
    )
    return done.returncode, done.stdout, done.stderr


leaves = st.builds(
    random_bits,
    shape=st.lists(st.integers(1, 4), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
layers = st.dictionaries(st.sampled_from(["0", "2", "weight", "bias"]), leaves, min_size=1, max_size=3)
members = st.fixed_dictionaries(
    {"img_in": layers, "double_blocks": st.lists(st.fixed_dictionaries({"img_mlp": layers}), min_size=1, max_size=11)}
)


@settings(max_examples=6, deadline=None)
@given(state=st.fixed_dictionaries({"params": members, "opt": members}), wait=st.booleans())
def test_any_tree_comes_back_bit_for_bit(state, wait):
    with tempfile.TemporaryDirectory() as workdir:
        with checkpoint.Checkpoints(workdir) as checkpoints:
            checkpoints.save(3, state, CFG, {}, wait=wait)
        assert identical(checkpoint.restore(workdir, 3, state), state)
        described = checkpoint.abstract(workdir, 3)
        assert tree.map(lambda leaf: (leaf.dtype, leaf.shape), described) == tree.map(
            lambda leaf: (leaf.dtype, leaf.shape), state
        )
        assert identical(checkpoint.restore(workdir, 3, described), state)


def test_what_is_restored_is_memory_of_its_own(tmp_path, monkeypatch):
    state = make_state()
    written(tmp_path, 1, state=state)
    for limit in (checkpoint.GROUP_BYTES, 64, 0):
        monkeypatch.setattr(checkpoint, "GROUP_BYTES", limit)
        restored = checkpoint.restore(tmp_path, 1, state)
        assert identical(restored, state)
        storages = {leaf.untyped_storage().data_ptr() for leaf in tree.leaves(restored)}
        assert len(storages) == len(tree.leaves(state))
        for leaf in tree.leaves(restored):
            assert leaf.is_contiguous() and leaf.data_ptr() % 64 == 0 and not leaf.requires_grad
            assert leaf.untyped_storage().nbytes() == size_in_bytes(leaf)
            leaf.add_(1)


def test_state_may_be_changed_in_place_right_after_save(tmp_path):
    # Large enough to be under way still when save returns, often enough to be no accident.
    state = {
        "params": {"double_blocks": [{"weight": torch.randn(256, 257)} for _ in range(12)]},
        "opt": {"step": torch.tensor(0), "m": torch.randn(300, 200).bfloat16()},
    }
    old = {}
    with checkpoint.Checkpoints(tmp_path, keep_last=0) as checkpoints:
        for step in range(1, 7):
            old[step] = clone(state)
            checkpoints.save(step, state, CFG, {})
            for leaf in tree.leaves(state):
                leaf.mul_(-3).add_(step)
    assert checkpoint.steps(tmp_path) == list(old)
    for step, expected in old.items():
        assert identical(checkpoint.restore(tmp_path, step, state), expected)


def test_parameters_that_require_gradients_and_views_are_saved(tmp_path):
    base = torch.arange(60.0)
    state = {"params": {"a": torch.randn(3, requires_grad=True), "b": base[1:31].view(5, 6).t()}, "opt": {"c": base[3]}}
    with checkpoint.Checkpoints(tmp_path, keep_last=0) as checkpoints:
        checkpoints.save(1, state, CFG, {})
        checkpoints.save(2, state, CFG, {}, wait=True)
    for step in (1, 2):
        assert identical(checkpoint.restore(tmp_path, step, state), tree.map(torch.Tensor.detach, state))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [
        (1, 0, [5]),
        (2, 0, [4, 5]),
        (1, 2, [2, 4, 5]),
        (0, 3, [1, 2, 3, 4, 5]),
    ],
)
def test_keeps_the_last_and_every_multiple(tmp_path, keep_last, keep_every, expected):
    # In two runs: the policy counts what is on the disk.
    state = {"params": {"w": torch.ones(2)}}
    written(tmp_path, 1, 2, 3, state=state, keep_last=keep_last, keep_every=keep_every)
    written(tmp_path, 4, 5, state=state, keep_last=keep_last, keep_every=keep_every)
    assert checkpoint.steps(tmp_path) == expected
    assert checkpoint.latest(tmp_path) == 5
    assert [checkpoint.read_config(tmp_path, step) for step in expected] == [{"step": step} for step in expected]


def test_nothing_is_there_before_the_first_save(tmp_path):
    workdir = tmp_path / "run"
    assert checkpoint.steps(workdir) == [] and checkpoint.latest(workdir) is None
    assert checkpoint.resume_point(workdir) is None
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.wait()
    assert not workdir.exists()


def test_a_step_already_there_is_left_as_it_is(tmp_path):
    written(tmp_path, 4)
    written(tmp_path, 4, state=make_state(9))
    assert identical(checkpoint.restore(tmp_path, 4, make_state()), make_state(4))


def test_leftovers_are_no_checkpoints_and_are_removed(tmp_path):
    written(tmp_path, 2, 4)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "4", folder / "6")
    (folder / "6" / orbax.MARKER).unlink()
    shutil.copytree(folder / "6", folder / "8.orbax-checkpoint-tmp")
    (folder / "notes").mkdir()
    (folder / "notes" / orbax.MARKER).touch()
    assert checkpoint.steps(tmp_path) == [2, 4]
    assert checkpoint.resume_point(tmp_path) == (4, {"step": 4})
    with pytest.raises(UserError, match="step is 6: .* it has those of steps 2, 4"):
        checkpoint.restore(tmp_path, 6, make_state())
    with checkpoint.Checkpoints(tmp_path):
        assert sorted(os.listdir(folder)) == ["2", "4", "notes"]
    written(tmp_path, 6)
    assert sorted(os.listdir(folder)) == ["4", "6", "notes"]
    assert identical(checkpoint.restore(tmp_path, 6, make_state()), make_state(6))


def test_kill_in_the_middle_of_a_save_leaves_whole_checkpoints(tmp_path):
    code = """
import os, signal, sys, torch
from flux_func.models.flux import FLAVORS
from flux_func.train import checkpoint
from flux_func.train import workdir as workdirs
CFG = FLAVORS["flux-tiny"]
state = lambda step: {"params": {"w": torch.full((8, 1 << 20), float(step))}, "opt": {"step": torch.tensor(step)}}
checkpoints = checkpoint.Checkpoints(sys.argv[1])
checkpoints.save(1, state(1), CFG, {}, wait=True)
checkpoints.save(2, state(2), CFG, {})
while len(os.listdir(sys.argv[1] + "/checkpoints")) == 1:
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(code, tmp_path)[0] == -signal.SIGKILL
    like = {"params": {"w": torch.empty(8, 1 << 20)}, "opt": {"step": torch.tensor(0)}}
    for step in checkpoint.steps(tmp_path):
        restored = checkpoint.restore(tmp_path, step, like)
        assert restored["params"]["w"].eq(step).all() and restored["opt"]["step"] == step
    assert checkpoint.latest(tmp_path) in (1, 2)
    written(tmp_path, 3)
    assert checkpoint.latest(tmp_path) == 3 and len(os.listdir(tmp_path / "checkpoints")) == 2


def test_a_write_that_fails_is_one_line_and_leaves_the_last_whole(tmp_path):
    # A limit on the size of files stands for a quota: the write fails when part of it is done.
    code = """
import resource, signal, sys, torch
from flux_func.errors import UserError
from flux_func.models.flux import FLAVORS
from flux_func.train import checkpoint
from flux_func.train import workdir as workdirs
CFG = FLAVORS["flux-tiny"]
state = lambda n: {"params": {"double_blocks": [{"w": torch.ones(256, 1024)} for _ in range(n)]}}
checkpoints = checkpoint.Checkpoints(sys.argv[1], keep_last=1)
checkpoints.save(1, state(1), CFG, {}, wait=True)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
for wait in (True, False):
    try:
        checkpoints.save(2, state(20), CFG, {}, wait=wait)
        checkpoints.wait()
    except UserError as error:
        print(error)
checkpoints.save(3, state(1), CFG, {})
checkpoints.close()
"""
    code, out, err = python(code, tmp_path)
    message = (
        f"workdir is '{tmp_path}': a checkpoint could not be written there (File too large); "
        f"the checkpoint of step 1 is whole: free some room or name another --workdir"
    )
    assert (code, out.splitlines(), err) == (0, [message, message], "")
    assert checkpoint.steps(tmp_path) == [3]


def test_no_room_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    state = make_state()
    workdir = tmp_path / "run"
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    free = size_in_bytes(state) + workdirs.MARGIN_BYTES - 1
    with checkpoint.Checkpoints(workdir) as checkpoints:
        with pytest.raises(UserError) as error:
            checkpoints.save(1, state, CFG, {})
        assert "\n" not in str(error.value)
        assert f"workdir is '{workdir}': checkpoints need 1 x 0.00 GB more, and its disk has 0.07 GB free" in str(
            error.value
        )
        assert not workdir.exists() and asked == [tmp_path]
        free += 1
        checkpoints.save(1, state, CFG, {}, wait=True)
    assert checkpoint.steps(workdir) == [1]


def test_check_room_counts_what_will_be_there(tmp_path, monkeypatch):
    written(tmp_path, 1, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 10**9))
    checkpoint.check_room(tmp_path, 4 * 10**9, upcoming=[3, 4, 5], keep_last=2)
    checkpoint.check_room(tmp_path, 6 * 10**9, upcoming=[2])
    with pytest.raises(UserError, match=r"checkpoints need 3 x 4\.00 GB more, and its disk has 5\.00 GB free"):
        checkpoint.check_room(tmp_path, 4 * 10**9, upcoming=[2, 3, 4, 5])


def test_a_member_is_read_without_the_others(tmp_path):
    state = make_state(5)
    written(tmp_path, 7, state=state)
    for member in ("opt", "ema"):
        shutil.rmtree(tmp_path / "checkpoints" / "7" / member)
    restored = checkpoint.restore(tmp_path, 7, {"params": state["params"]})
    assert identical(restored, {"params": state["params"]})
    with pytest.raises(UserError, match="its checkpoint of step 7 holds no ema"):
        checkpoint.restore(tmp_path, 7, {"ema": state["ema"]})


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_plain_orbax_reads_it(tmp_path):
    import orbax.checkpoint as ocp

    state = make_state(5)
    written(tmp_path, 7, state=state)
    arrays = ocp.PyTreeCheckpointer().restore(tmp_path / "checkpoints" / "7" / "params")
    assert list(arrays) == sorted(tree.flatten(state["params"]))
    for path, leaf in tree.flatten(state["params"]).items():
        np.testing.assert_array_equal(np.asarray(arrays[path]), leaf.numpy())


@pytest.mark.parametrize("dtype", ["", "bfloat16", "float16"])
def test_weights_only_in_a_chosen_type(tmp_path, dtype):
    state = make_state(5)
    weights = checkpoint.weights(state, dtype)
    written(tmp_path, 7, state=weights)
    assert sorted(weights) == ["ema", "params"]
    expected = tree.map(lambda leaf: leaf.to(getattr(torch, dtype or "float32")), {"params": state["params"]})
    like = {"params": state["params"]}
    assert identical(checkpoint.restore(tmp_path, 7, {"params": weights["params"]}), expected)
    widened = checkpoint.restore(tmp_path, 7, like, cast=True)
    assert identical(widened, tree.map(torch.Tensor.float, expected))
    if dtype:
        with pytest.raises(
            UserError, match=rf"has params\.double_blocks\.0.* as {dtype} \[5, 3\], this run as float32"
        ):
            checkpoint.restore(tmp_path, 7, like)


def test_a_weight_beyond_the_chosen_type_is_an_error_not_infinity():
    state = make_state(5)
    state["params"]["double_blocks"][0]["a"] = torch.tensor([1e5])
    said = "checkpoint.export_dtype is float16: params.double_blocks.0.a reaches 1e.05, beyond 6.55e.04; use bfloat16"
    with pytest.raises(UserError, match=said):
        checkpoint.weights(state, "float16")
    assert checkpoint.weights(state, "bfloat16")["params"]["double_blocks"][0]["a"].isfinite()


def test_weights_only_cannot_be_resumed_from(tmp_path):
    state = make_state()
    written(tmp_path, 5)
    assert checkpoint.resume_point(tmp_path) == (5, {"step": 5})
    written(tmp_path, 7, state=checkpoint.weights(state))
    for resume in (
        lambda: checkpoint.resume_point(tmp_path),
        lambda: checkpoint.restore(tmp_path, 7, state),
    ):
        with pytest.raises(UserError, match="step 7 holds weights only .checkpoint.last_weights_only. and cannot"):
            resume()


@pytest.mark.parametrize(
    ("path", "leaf", "message"),
    [
        (
            "params.img_in.weight",
            torch.empty(6, 3),
            r"has params.img_in.weight as float32 \[6, 2\], this run as float32 \[6, 3\]",
        ),
        ("params.img_in.weight", torch.empty(6, 2).half(), r"as float32 \[6, 2\], this run as float16 \[6, 2\]"),
        ("params.extra.bias", torch.empty(2), r"has params.extra.bias as absent, this run as float32 \[2\]"),
        ("opt.extra", torch.empty(2), r"has opt.extra as absent"),
    ],
)
def test_other_leaves_are_named(tmp_path, path, leaf, message):
    state = make_state()
    written(tmp_path, 1, state=state)
    with pytest.raises(UserError, match=message):
        checkpoint.restore(tmp_path, 1, tree.unflatten({**tree.flatten(state), path: leaf}))


def test_a_leaf_that_this_run_lacks_is_named(tmp_path):
    state = make_state()
    written(tmp_path, 1, state=state)
    flat = tree.flatten(state)
    del flat["params.double_blocks.1.norm.scale"]
    with pytest.raises(UserError, match=r"has params.double_blocks.1.norm.scale as float32 \[4\], this run as absent"):
        checkpoint.restore(tmp_path, 1, tree.unflatten(flat))


@pytest.mark.parametrize(
    "damage", ["data", "params/_METADATA", "config/metadata", "model/metadata", "_CHECKPOINT_METADATA"]
)
def test_a_damaged_checkpoint_is_an_error_that_names_the_remedy(tmp_path, damage):
    state = {"params": {"w": torch.randn(100, 100)}, "opt": {"step": torch.tensor(1)}}
    written(tmp_path, 1, state=state)
    folder = tmp_path / "checkpoints" / "1"
    files = [path for path in folder.glob("params/**/*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size) if damage == "data" else folder / damage
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"step 1 cannot be read .*: remove {folder} to go on") as error:
        checkpoint.resume_point(tmp_path)
        checkpoint.read_model(tmp_path, 1)
        checkpoint.restore(tmp_path, 1, state)
    assert "\n" not in str(error.value)


def test_the_configuration_is_kept(tmp_path):
    ours = config.default()
    ours.sample.prompts = ("a three", "a four")
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), CFG, ours.to_dict())
    saved = checkpoint.read_config(tmp_path, 1)
    assert saved == json.loads(json.dumps(ours.to_dict()))
    assert checkpoint.resume_point(tmp_path) == (1, saved)
    config.check_resume(saved, ours)
    ours.optimizer.lr = 2e-4
    with pytest.raises(UserError, match="optimizer.lr is 0.0002"):
        config.check_resume(saved, ours)


def test_the_model_is_kept(tmp_path):
    cfg = dataclasses.replace(CFG, guidance_embed=True, qk_norm_eps=1e-5, mlp_ratio=2.5)
    with checkpoint.Checkpoints(tmp_path, keep_last=0) as checkpoints:
        checkpoints.save(1, make_state(), cfg, {})
        checkpoints.save(2, checkpoint.weights(make_state()), CFG, {}, wait=True)
    assert [checkpoint.read_model(tmp_path, step) for step in (1, 2)] == [cfg, CFG]


def test_importing_it_imports_neither_jax_nor_orbax():
    code = "import sys; from flux_func.train import checkpoint; print({'jax', 'orbax'} & set(sys.modules))"
    assert python(code)[:2] == (0, "set()\n")
