"""Programs under torchrun that validate, draw and average: what they leave is what one process leaves."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from flux_func import sample_main
from tests.helpers import launch, tiny_pipeline, tiny_run

CAPTIONS = ["a handwritten three", "a handwritten five", "Two people walk along the beach"]
# An average, validation on 5 samples and the pictures of 3, and grids of 3 prompts: none of it divides by 2.
FIELDS = {
    "model.init": "nonzero",
    "train.steps": 4,
    "train.batch_size": 4,
    "ema.decay": 0.9,
    "validate.every": 2,
    "validate.samples": 5,
    "validate.batch_size": 2,
    "validate.images": 3,
    "sample.every": 4,
    "sample.steps": 2,
    "sample.prompts": tuple(CAPTIONS),
    "checkpoint.last_weights_only": True,
}


def run(logs: pathlib.Path, program: str, *flags: str) -> launch.Ended:
    command = [*launch.options(logs), "-m", f"flux_func.{program}", *flags, "--device=cpu"]
    return launch.end(launch.begin(command), logs)


def pictures(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def same(one: pathlib.Path, other: pathlib.Path) -> None:
    found, expected = pictures(one), pictures(other)
    assert found.keys() == expected.keys() and expected
    for name, picture in expected.items():
        assert picture.std() > 10 and np.abs(found[name] - picture).max() <= 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of a run in two processes and of the same in one."""
    root = tmp_path_factory.mktemp("runs")
    done = run(root / "logs", "train_main", *tiny_run.arguments(root / "two", FIELDS))
    assert done.code == 0, done
    tiny_run.train(root / "one", FIELDS)
    return root / "two", root / "one"


def test_a_run_validates_and_draws_as_one_process_does(folders):
    two, one = folders
    found, expected = (tiny_run.records(folder, "validation_loss") for folder in folders)
    assert [record["step"] for record in found] == [record["step"] for record in expected] == [2, 4]
    for record, wanted in zip(found, expected, strict=True):
        assert record["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=1e-5)
    same(two / "samples", one / "samples")
    assert set(pictures(two / "samples")) == {"step_000004.png", "validation_000002.png", "validation_000004.png"}
    average, whole = (
        {path: leaf for path, leaf in tiny_run.stored(folder, 4).items() if path.startswith("ema.")}
        for folder in folders
    )
    for path, leaf in whole.items():
        assert (average[path] - leaf).norm() <= 1e-5 * leaf.norm()


def test_a_prompts_file_is_drawn_by_two(folders, tmp_path):
    two, one = folders
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS), encoding="utf-8")
    flags = [f"--workdir={two}", "--ema", f"--prompts_file={prompts}", "--batch_size=1"]
    done = run(tmp_path / "logs", "sample_main", *flags)
    assert done.code == 0, done
    out = two / "samples" / "sample_main_000"
    assert done.out == [f"3 images and grid.png are in {out}\n", ""]
    assert "sampling" in done.err[0] and "sampling" not in done.err[1]
    assert tiny_run.program(sample_main, *flags, f"--out={tmp_path / 'one'}") == 0
    same(out, tmp_path / "one")


def test_one_prompt_of_a_pipeline_is_enough_for_two(tmp_path):
    folder = tiny_pipeline.whole(tmp_path / "pipe")
    flags = [f"--weights={folder}", "--prompt=a red bird", "--height=32", "--width=32", "--steps=1", "--max_length=8"]
    done = run(tmp_path / "logs", "sample_main", *flags, f"--out={tmp_path / 'two'}")
    assert done.code == 0, done
    assert tiny_run.program(sample_main, *flags, f"--out={tmp_path / 'one'}") == 0
    same(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--shard=3", "--shard is 3: should be -1 or divide the 2 processes: 1, 2"),
        ("--steps=0", "--steps is 0: should be at least 1"),
    ],
)
def test_a_wrong_flag_is_one_line(folders, tmp_path, flag, line):
    done = run(
        tmp_path / "logs", "sample_main", f"--workdir={folders[0]}", "--prompt=x", flag, f"--out={tmp_path / 'x'}"
    )
    assert done.code == 1 and not (tmp_path / "x").exists()
    assert [said for said in "".join(done.err).splitlines() if "rror" in said] == [f"sample_main.py: error: {line}"]
