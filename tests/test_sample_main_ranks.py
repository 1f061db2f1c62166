"""sample_main in several processes at once: the pictures of one process, each written by one of them."""

import json
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

from flux_func import sample_main, tree
from flux_func.errors import UserError
from flux_func.interop import lora_files
from flux_func.models import flux
from flux_func.parallel.mesh import Mesh
from flux_func.train import checkpoint
from flux_func.transforms import lora
from tests.helpers import rank_sampling, ranks, tiny_pipeline, tiny_run

CFG = flux.flavor("flux-tiny")
PROMPTS = rank_sampling.PROMPTS
FLAGS = {
    **dict.fromkeys(sample_main.ALIKE),
    "prompt": [],
    "lora": [],
    "ema": False,
    "overwrite": False,
    "batch_size": 2,
    "shard": -1,
    "steps": 2,
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run's folder with a checkpoint and its average."""
    folder = tmp_path_factory.mktemp("run")
    config = json.loads(json.dumps(tiny_run.config({"sample.seed": 11}).to_dict()))
    (folder / "config.json").write_text(json.dumps(config))
    with checkpoint.Checkpoints(folder) as checkpoints:
        trees = {name: flux.init(CFG, seed=seed, scheme="nonzero") for seed, name in enumerate(("params", "ema"))}
        checkpoints.save(3, trees, CFG, config, wait=True)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline of dev's kind, whose 3 heads of 16 divide by 2 and by 4 processes."""
    return tiny_pipeline.whole(tmp_path_factory.mktemp("pipelines") / "dev")


def prompts_file(folder: pathlib.Path, count: int) -> str:
    path = folder / f"{count}.txt"
    path.write_text("\n".join(PROMPTS[:count]), encoding="utf-8")
    return str(path)


def drawn_lora() -> lora.Lora:
    """A LoRA of every linear, large enough to be seen."""
    rng = np.random.default_rng(0)
    fresh = lora.init(flux.abstract(CFG), ["*"], rank=2, alpha=2)
    return tree.map(lambda leaf: torch.from_numpy(0.1 * rng.standard_normal(leaf.shape)).float(), fresh)


def everything(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.iterdir())}


def same(one: pathlib.Path, other: pathlib.Path) -> None:
    found, expected = everything(one), everything(other)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].std() > 10 and np.abs(found[name] - expected[name]).max() <= 1  # batches round differently


def test_pictures_are_those_of_one_process(workdir, pipeline, tmp_path, monkeypatch):
    """Of a run and its average, and of a pipeline whose T5 is in parts; of fewer prompts than processes, too."""
    run, pipe = {"workdir": str(workdir)}, {"weights": str(pipeline), "height": 32, "width": 48, "max_length": 16}
    lora_files.save(tmp_path / "lora.safetensors", drawn_lora(), "kohya")
    runs = [
        {**run, "prompts_file": prompts_file(tmp_path, 7), "ema": True},
        {**run, "prompts_file": prompts_file(tmp_path, 3), "lora": [f"{tmp_path / 'lora.safetensors'}:0.7"]},
        {**run, "prompts_file": prompts_file(tmp_path, 2), "cfg_scale": 3.0, "shard": 2},
        {**pipe, "prompts_file": prompts_file(tmp_path, 5)},
        {**pipe, "prompt": PROMPTS[:1], "shard": 1, "cfg_scale": 2.0, "negative_prompt": "fog", "dtype": "float32"},
    ]
    flags = [{**FLAGS, **given, "out": str(tmp_path / f"many {i}")} for i, given in enumerate(runs)]
    assert ranks.run(4, rank_sampling.program, flags) == [[""] * len(runs)] * 4
    for i, given in enumerate(flags):
        rank_sampling.program(0, [{**given, "out": str(tmp_path / f"one {i}"), "shard": -1}])
        same(tmp_path / f"many {i}", tmp_path / f"one {i}")
    text = Image.open(tmp_path / "many 0" / "005_a-handwritten-five.png").text
    assert text["prompt"] == PROMPTS[5] and json.loads(text["index"]) == 5


def test_very_many_prompts_are_encoded_as_they_come_and_folders_are_numbered_once(pipeline, tmp_path, monkeypatch):
    given = {**FLAGS, "weights": str(pipeline), "height": 32, "width": 32, "max_length": 16, "batch_size": 1}
    given |= {"prompts_file": prompts_file(tmp_path, 3), "steps": 1, "seed": 2}
    # The folder of a run: it is numbered below the current one without.
    assert ranks.run(2, rank_sampling.along, str(tmp_path), [given, given]) == [["", ""]] * 2
    rank_sampling.program(0, [{**given, "out": str(tmp_path / "one")}])
    for number in range(2):
        same(tmp_path / "samples" / f"sample_main_{number:03d}", tmp_path / "one")
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_what_is_wrong_is_raised_by_all_and_nothing_is_written(workdir, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "of.txt").write_text("things")
    before = tiny_run.snapshot(tmp_path)
    good = {**FLAGS, "workdir": str(workdir), "prompt": PROMPTS[:3], "out": str(tmp_path / "out")}
    runs = [
        {**good, "shard": 3},
        {**good, "height": 40},
        {**good, "prompt": [], "prompts_file": str(tmp_path / "none.txt")},
        {**good, "out": str(full)},
        {**good, "out": str(full / "of.txt" / "x")},
    ]
    one, other = ranks.run(2, rank_sampling.program, runs)
    expected = [
        "--shard is 3: should be -1 or divide the 2 processes: 1, 2",
        "--height is 40: should be a multiple of 16, such as 32",
        "--prompts_file is ",
        f"--out is {str(full)!r}: it is not empty; name another folder, or add --overwrite",
        "--out is ",
    ]
    assert one == other and all(line.startswith(said) for line, said in zip(one, expected, strict=True)), one
    assert tiny_run.snapshot(tmp_path) == before


def test_processes_that_were_told_different_things_are_refused(workdir, tmp_path):
    good = {**FLAGS, "workdir": str(workdir), "prompt": PROMPTS[:3], "out": str(tmp_path / "out")}
    answers = ranks.run(2, rank_sampling.apart, [{**good, "seed": 3}, {**good, "seed": 4}])
    said = "--seed is 3 on rank 0 and 4 on rank 1: every rank should be started by the same command"
    assert answers[0] == answers[1] and answers[0][0].startswith(said) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shard", "count", "sizes"), [(-1, 6, (1, 6)), (2, 6, (3, 2)), (1, 6, (6, 1)), (-1, 1, (1, 1))]
)
def test_weights_are_split_as_asked_and_repeated_over_the_rest(shard, count, sizes):
    found = sample_main.choose_mesh(shard, count)
    assert (found["replicate"], found["shard"], found["context"]) == (*sizes, 1)


@pytest.mark.parametrize("shard", [0, -2, 4, 12])
def test_a_split_that_does_not_divide_is_refused(shard):
    with pytest.raises(UserError, match=rf"--shard is {shard}: should be -1 or divide the 6 processes: 1, 2, 3, 6"):
        sample_main.choose_mesh(shard, 6)


def test_weights_that_do_not_divide_are_refused(monkeypatch):
    planned = Mesh({"replicate": 1, "shard": 7, "context": 1})
    monkeypatch.setattr(sample_main.meshes, "build", lambda sizes, device_type, limit: planned)
    with pytest.raises(UserError, match=r"--shard splits over shard=7: .*; sizes of shard that would: 1, 2, 4, 8"):
        sample_main.lay_out(CFG, planned.sizes, torch.float32, tiny_run.CPU)
