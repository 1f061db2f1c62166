import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import dcp, torchtitan
from flux_func.models import flux

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.float8_e4m3fn, torch.bool)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def draw(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def raw(tensor):
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write(folder, tensors, **options):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dcp.write(folder, shapes, {name: tensor.dtype for name, tensor in tensors.items()}, tensors.__getitem__, **options)


def whole(opened, name):
    shape = opened.shapes[name]
    return opened.read(name, 0, shape[0] if shape else 1).reshape(shape)


def python(code, *args):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


tensors = st.builds(
    draw, st.lists(st.integers(0, 4), max_size=3).map(tuple), st.sampled_from(DTYPES), st.integers(0, 2**31)
)
named = st.dictionaries(
    st.sampled_from(["img_in.weight", "double_blocks.0.img_mlp.0.weight", "b", "b.c"]), tensors, min_size=1
)


@settings(max_examples=40, deadline=None)
@given(named)
def test_what_is_written_torch_loads_and_we_read(tensors):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, tensors)
        loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        torch_dcp.load(loaded, checkpoint_id=folder, no_dist=True)
        opened = dcp.open_folder(folder)
        assert opened.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert opened.dtypes == {name: tensor.dtype for name, tensor in tensors.items()}
        assert opened.metadata == {}
        for name, tensor in tensors.items():
            assert raw(loaded[name]) == raw(tensor) == raw(whole(opened, name))


def test_rows_are_memory_of_their_own(tmp_path):
    weight = draw((6, 3), torch.float32)
    write(tmp_path, {"w": weight, "other": weight})
    read = dcp.open_folder(tmp_path).read
    read("w", 2, 4).zero_()
    assert torch.equal(read("w", 0, 6), weight) and torch.equal(read("w", 5, 6), weight[5:])
    assert read("w", 1, 3).untyped_storage().nbytes() == 2 * 3 * 4


def test_what_torchtitan_saves(tmp_path):
    # The model's names without a prefix, beside the flattened states of the rest.
    cfg = flux.flavor("flux-tiny")
    params = {torchtitan.name(path): leaf for path, leaf in tree.flatten(flux.init(cfg, scheme="nonzero")).items()}
    state = {
        **params,
        "optimizer": {"state.img_in.weight.exp_avg": torch.ones(4), "param_groups.img_in.weight.lr": 1e-4},
        "lr_scheduler": {"last_epoch": 7},
        "train_state": {"step": torch.tensor(7)},
        "dataloader": {"dp_rank_0": b"..."},
    }
    torch_dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    opened = dcp.open_folder(tmp_path)
    assert opened.shapes == {
        **torchtitan.transformer(cfg).theirs,
        "optimizer.state.img_in.weight.exp_avg": (4,),
        "train_state.step": (),
    }
    others = ["optimizer.param_groups.img_in.weight.lr", "lr_scheduler.last_epoch", "dataloader.dp_rank_0"]
    assert dict(opened.metadata) == dict.fromkeys(others, "not a tensor")
    for name, leaf in params.items():
        assert torch.equal(whole(opened, name), leaf)


# Several ranks.


def save_ranks(folder, tensors, grids):
    """Saves tensors as ranks would that hold a block each: torch's planner and writer, without the processes.

    `grids` gives for each tensor the rows and columns that the cuts are at; block i is rank i % 2's.
    """
    plans = [[], []]
    for name, tensor in tensors.items():
        rows, columns = grids[name]
        edges = (0, *rows, tensor.shape[0]), (0, *columns, tensor.shape[1])
        blocks = itertools.product(*map(itertools.pairwise, edges))
        for number, ((top, bottom), (left, right)) in enumerate(blocks):
            chunk = ChunkStorageMetadata(torch.Size((top, left)), torch.Size((bottom - top, right - left)))
            data = TensorWriteData(chunk, TensorProperties(tensor.dtype), tensor.shape)
            plans[number % 2].append(
                WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)
            )

    class Blocks(torch_dcp.DefaultSavePlanner):
        def lookup_object(self, index):
            [chunk] = [item.tensor_data.chunk for plan in plans for item in plan if item.index == index]
            (top, left), (height, width) = chunk.offsets, chunk.sizes
            return tensors[index.fqn][top : top + height, left : left + width]

    planner, writer = Blocks(flatten_state_dict=False), torch_dcp.FileSystemWriter(folder)
    writer.set_up_storage_writer(True)
    writer.prepare_local_plan(SavePlan([]))
    saved, metadata = planner.create_global_plan([SavePlan(items) for items in plans])
    results = [writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(saved) if plan.items]
    writer.finish(metadata, results)


cuts = st.lists(st.integers(1, 6), max_size=3, unique=True).map(sorted)


@settings(max_examples=40, deadline=None)
@given(grid=st.tuples(cuts, cuts), dtype=st.sampled_from(DTYPES[:3]), first=st.integers(0, 6), count=st.integers(0, 7))
def test_chunks_of_any_ranks_come_together(grid, dtype, first, count):
    tensors = {"w": draw((7, 7), dtype), "v": draw((7, 9), torch.float32, 1)}
    with tempfile.TemporaryDirectory() as folder:
        save_ranks(folder, tensors, {"w": grid, "v": ([], [4])})
        opened = dcp.open_folder(folder)
        assert raw(opened.read("w", first, min(7, first + count))) == raw(tensors["w"][first : first + count])
        assert torch.equal(whole(opened, "v"), tensors["v"])


RANK = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(folder + ".store", 2), rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
tensor = torch.arange(15.0).view(5, 3)
placed = {str(place): distribute_tensor(tensor, mesh, [place]) for place in (Shard(0), Shard(1), Replicate())}
dcp.save({**placed, "plain": tensor}, checkpoint_id=folder)
dist.barrier()  # or the first to leave may abort the other
dist.destroy_process_group()
"""


def test_what_two_processes_save_of_dtensors(tmp_path):
    folder = tmp_path / "step-1"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), folder], env=environment) for rank in (0, 1)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    opened = dcp.open_folder(folder)
    assert sorted(opened.shapes) == ["R", "S(0)", "S(1)", "plain"]
    assert {path.name for path in folder.iterdir()} >= {"__0_0.distcp", "__1_0.distcp"}
    for name in opened.shapes:
        assert torch.equal(whole(opened, name), torch.arange(15.0).view(5, 3))


# The disk and memory.


def test_the_disks_own_error_comes_through(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        write(tmp_path / "file" / "folder", {"w": torch.ones(2)})
    code = """
import resource, signal, sys, torch
from flux_func.interop import dcp
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    dcp.write(sys.argv[1], {"w": (1 << 20,)}, {"w": torch.float32}, lambda name: torch.ones(1 << 20))
except OSError as error:
    print(error.strerror)
"""
    assert python(code, tmp_path / "full") == "File too large\n"
    assert not (tmp_path / "full" / ".metadata").exists()


def test_a_readers_error_and_progress_come_through(tmp_path):
    def read(name):
        raise UserError(f"{name}: is cut short") from OSError("the disk's")

    with pytest.raises(UserError, match="^w: is cut short$"):
        dcp.write(tmp_path, {"w": (2,)}, {"w": torch.float32}, read)
    seen = []
    write(tmp_path, {"a": torch.ones(3), "b": torch.ones(2, 2).half()}, progress=seen.append)
    assert seen == [12, 8]


def test_memory_does_not_grow_with_the_folder(tmp_path):
    code = """
import resource, sys, torch
from flux_func.interop import dcp
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
shapes = {f"w{i}": (1 << 10, 1 << 11) for i in range(32)}
make = lambda name: torch.full(shapes[name], float(name[1:]))
dcp.write(sys.argv[1] + "/small", {"w0": (1, 1)}, {"w0": torch.float32}, lambda name: torch.ones(1, 1))
before = peak()
dcp.write(sys.argv[1], shapes, dict.fromkeys(shapes, torch.float32), make)
opened = dcp.open_folder(sys.argv[1])
for name in shapes:
    for first in (0, 512):
        assert opened.read(name, first, first + 512).eq(float(name[1:])).all()
print(peak() - before)
"""
    assert float(python(code, tmp_path)) < 64  # MiB, of 256 in 32 tensors


def test_importing_it_does_not_import_torch_dcp():
    code = "import sys; from flux_func.interop import dcp; print('torch.distributed.checkpoint' in sys.modules)"
    assert python(code) == "False\n"
