import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import orbax
from flux_func.models import autoencoder, flux
from flux_func.train import checkpoint

ROOT = Path(__file__).parents[2]
TINY = dataclasses.replace(
    flux.flavor("flux-tiny"),
    hidden_size=32,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    vec_in_dim=8,
    context_in_dim=8,
)
VAE = autoencoder.AutoencoderConfig(kind="kl", ch=32, ch_mult=(1, 2), num_res_blocks=1)


def weights(seed=0, cfg=TINY, dtype=torch.float32):
    module = flux if isinstance(cfg, flux.FluxConfig) else autoencoder
    options = {"scheme": "nonzero"} if module is flux else {}
    return tree.map(lambda leaf: leaf.to(dtype), module.init(cfg, seed=seed, **options))


def write(folder, params, cfg=TINY, **options):
    flat = tree.flatten(params)
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    dtypes = {path: leaf.dtype for path, leaf in flat.items()}
    orbax.write(folder, cfg, shapes, dtypes, flat.__getitem__, **options)


def identical(one, other):
    same = tree.map(lambda a, b: a.dtype == b.dtype and torch.equal(a, b), one, other)
    return all(tree.leaves(same))


def python(code, *args):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


configs = st.builds(
    dataclasses.replace,
    st.just(TINY),
    depth=st.integers(1, 2),
    guidance_embed=st.booleans(),
    qkv_bias=st.booleans(),
    mlp_ratio=st.sampled_from([1.5, 4.0]),
    qk_norm_eps=st.sampled_from([1e-6, 1e-5]),
    in_channels=st.sampled_from([64, 384]),
)


@settings(max_examples=5, deadline=None)
@given(cfg=configs, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]))
def test_what_is_written_is_read_and_says_its_model(cfg, dtype):
    params = weights(1, cfg, dtype)
    with tempfile.TemporaryDirectory() as folder:
        write(folder, params, cfg)
        opened = orbax.open_checkpoint(folder)
        assert (opened.cfg, opened.format, opened.left_out) == (cfg, "orbax", ())
        assert set(opened.dtypes.values()) == {dtype}
        assert identical(opened.params(), params)
        assert checkpoint.read_model(folder, 0) == cfg
        assert identical(checkpoint.restore(folder, 0, {"params": params})["params"], params)


def test_the_autoencoders_too(tmp_path):
    params = weights(2, VAE)
    write(tmp_path, params, VAE)
    opened = orbax.open_checkpoint(tmp_path)
    assert opened.cfg == VAE and identical(opened.params(), params)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_plain_orbax_reads_what_is_written(tmp_path):
    import orbax.checkpoint as ocp

    params = weights(3)
    write(tmp_path, params)
    found = ocp.PyTreeCheckpointer().restore(tmp_path / "checkpoints" / "0" / "params")
    assert {path: array.tolist() for path, array in found.items()} == {
        path: leaf.tolist() for path, leaf in tree.flatten(params).items()
    }


def test_what_is_written_cannot_be_resumed_from(tmp_path):
    write(tmp_path, weights())
    with pytest.raises(UserError, match="its checkpoint of step 0 holds weights only"):
        checkpoint.resume_point(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with checkpoints of the steps 2 and 4 (this one with an average)."""
    workdir = tmp_path_factory.mktemp("run")
    with checkpoint.Checkpoints(workdir, keep_last=0) as checkpoints:
        moments = {"exp_avg": weights(9), "step": torch.tensor(4)}
        checkpoints.save(2, {"params": weights(2), "opt": moments}, TINY, {}, wait=True)
        checkpoints.save(4, {"params": weights(4), "opt": moments, "ema": weights(5)}, TINY, {}, wait=True)
    return workdir


def test_a_runs_checkpoints(run):
    count = len(tree.leaves(weights()))
    for path, options, seed, left_out in (
        (run, {}, 4, (f"ema ({count} tensors)", f"opt ({count + 1} tensors)")),
        (str(run), {"ema": True}, 5, (f"opt ({count + 1} tensors)", f"params ({count} tensors)")),
        (run, {"step": 2}, 2, (f"opt ({count + 1} tensors)",)),
        (run / "checkpoints" / "2", {}, 2, (f"opt ({count + 1} tensors)",)),
    ):
        opened = orbax.open_checkpoint(path, **options)
        assert opened.cfg == TINY and opened.left_out == left_out
        assert identical(opened.params(), weights(seed))


def test_a_checkpoints_folder_may_stand_alone(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "2", tmp_path / "my_model")
    assert identical(orbax.open_checkpoint(tmp_path / "my_model").params(), weights(2))


def test_rows_are_memory_of_their_own(run):
    opened, leaf = orbax.open_checkpoint(run, step=2), weights(2)["img_in"]["weight"]
    opened.read("img_in.weight", 3, 9).zero_()
    assert torch.equal(opened.rows("img_in.weight", 3, 9), leaf[3:9])


def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy", tmp_path / "copy" / "checkpoints" / "4"


def test_what_is_not_there(run, tmp_path):
    for path, options, message in (
        (tmp_path, {}, f"{tmp_path}: there is no checkpoint in it; train_main writes them"),
        (run, {"step": 3}, "step is 3: .* has no such checkpoint; it has those of steps 2, 4"),
        (
            run,
            {"step": 2, "ema": True},
            f"{run}/checkpoints/2: holds no ema, but opt, params; a run keeps it where ema.decay is set",
        ),
        (
            run / "checkpoints/2",
            {"step": 4},
            "2: is one checkpoint, and step 4 is asked for; name the folder of its run",
        ),
    ):
        with pytest.raises(UserError, match=message):
            orbax.open_checkpoint(path, **options)


@pytest.mark.parametrize("damage", ["data", "params/_METADATA", "model/metadata"])
def test_damage_is_one_line(run, tmp_path, damage):
    workdir, folder = copy(run, tmp_path)
    files = [path for path in folder.glob("params/**/*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size) if damage == "data" else folder / damage
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{folder}: this checkpoint cannot be read .*: name another one") as error:
        orbax.open_checkpoint(workdir).params()
    assert "\n" not in str(error.value)


def test_a_model_that_the_weights_are_not_of(tmp_path):
    write(tmp_path, weights(), dataclasses.replace(TINY, guidance_embed=True, out_channels=32))
    with pytest.raises(UserError, match="its params are not those of the model it is of: 6 tensors: .*guidance_in"):
        orbax.open_checkpoint(tmp_path)


def test_progress_and_a_readers_error_come_through(tmp_path):
    flat, seen = tree.flatten(weights()), []
    write(tmp_path / "whole", weights(), progress=seen.append)
    assert sorted(seen) == sorted(leaf.nbytes for leaf in flat.values())

    def read(path):
        raise UserError(f"{path}: is cut short")

    with pytest.raises(UserError, match=": is cut short$"):
        orbax.write(tmp_path / "broken", TINY, {"w": (2,)}, {"w": torch.float32}, read)
    assert orbax.steps(tmp_path / "broken") == []


def test_the_disks_own_error_comes_through(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        write(tmp_path / "file" / "folder", weights())
    code = """
import resource, signal, sys, torch
from flux_func.interop import orbax
from flux_func.models.flux import FLAVORS
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
shapes, dtypes = {"w": (1 << 20,)}, {"w": torch.float32}
try:
    orbax.write(sys.argv[1], FLAVORS["flux-tiny"], shapes, dtypes, lambda name: torch.ones(1 << 20))
except OSError as error:
    print(error.strerror)
"""
    assert python(code, tmp_path / "full") == "File too large\n"
    assert orbax.steps(tmp_path / "full") == []


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    code = """
import resource, sys, torch
from flux_func.interop import orbax
from flux_func.models.flux import FLAVORS
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
shapes = {f"w{i}": (1 << 10, 1 << 11) for i in range(32)}
make = lambda name: torch.full(shapes[name], float(name[1:]))
write = lambda folder, names: orbax.write(
    folder, FLAVORS["flux-tiny"], {name: shapes[name] for name in names}, dict.fromkeys(names, torch.float32), make
)
write(sys.argv[1] + "/small", ["w0"])
before = peak()
write(sys.argv[1] + "/large", list(shapes))
print(peak() - before)
"""
    assert float(python(code, tmp_path)) < 64  # MiB, of 256 in 32 leaves


def test_importing_it_imports_neither_jax_nor_orbax():
    code = "import sys; from flux_func.interop import orbax; print({'jax', 'orbax'} & set(sys.modules))"
    assert python(code) == "set()\n"
