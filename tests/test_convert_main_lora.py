"""LoRAs by convert_main: files of any form and runs that trained one, to files of any form."""

import pytest
import torch
from safetensors.torch import load_file

import flux_func as ff
from flux_func import convert_main, tree
from flux_func.interop import lora_files
from flux_func.train import adapt, metrics
from flux_func.transforms import lora
from tests.helpers import tiny_run

CFG = ff.flavor("flux-tiny")


def convert(source, to, format, *more):
    return tiny_run.program(convert_main, f"--from={source}", f"--to={to}", f"--format={format}", *more)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, whose LoRA is of some blocks alone and whose scale is 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "draw_curves", lambda records, path: None)
        folder = tmp_path_factory.mktemp("runs") / "run"
        fields = {"lora.rank": 2, "lora.alpha": 4.0, "lora.patterns": ("*.1.*",), "ema.decay": 0.5}
        tiny_run.train(folder, {**fields, "train.steps": 2, "checkpoint.every": 1, "optimizer.lr": 1e-2})
    return folder


def changes(updates):
    return {path: tree.map(torch.Tensor.double, each).weight() for path, each in lora.updates(updates).items()}


def assert_same(found, expected):
    found, expected = changes(found), changes(expected)
    assert found.keys() == expected.keys()
    assert all((found[path] - expected[path]).norm() <= 1e-6 * expected[path].norm() > 0 for path in found)


@pytest.mark.parametrize("format", lora_files.FORMATS)
def test_a_run_to_any_form_and_on_to_any_other(run, tmp_path, capfd, format):
    capfd.readouterr()
    assert convert(run, tmp_path / "one.safetensors", format) == 0
    out = capfd.readouterr().out
    assert f"{run}: LoRA of 13 linears, " in out and f"written in format {format}" in out
    expected = adapt.of_run(run)
    assert_same(lora_files.load(tmp_path / "one.safetensors", CFG), expected)
    for other in lora_files.FORMATS:
        assert convert(tmp_path / "one.safetensors", tmp_path / f"{other}.safetensors", other) == 0
        assert_same(lora_files.load(tmp_path / f"{other}.safetensors", CFG), expected)


def test_a_step_an_average_and_a_type(run, tmp_path):
    for name, flags, expected in (
        ("step", ("--step=1",), adapt.of_run(run, 1)),
        ("ema", ("--ema",), adapt.of_run(run, ema=True)),
    ):
        assert convert(run, tmp_path / f"{name}.safetensors", "kohya", *flags) == 0
        assert_same(lora_files.load(tmp_path / f"{name}.safetensors", CFG), expected)
    assert convert(run, tmp_path / "half.safetensors", "diffusers", "--dtype=bfloat16") == 0
    assert {leaf.dtype for leaf in load_file(tmp_path / "half.safetensors").values()} == {torch.bfloat16}


def test_what_is_refused(run, tmp_path, capfd):
    model, file = tmp_path / "model.safetensors", tmp_path / "lora.safetensors"
    ff.save(model, ff.init(CFG, scheme="nonzero"), CFG)
    assert convert(run, file, "kohya") == 0
    to = f"--to={tmp_path / 'new.safetensors'}"

    def refused(*arguments):
        return tiny_run.refused(capfd, tmp_path, convert_main, *arguments)

    assert "--format is 'kohya': is for LoRAs, and" in refused(f"--from={model}", to, "--format=kohya")
    assert "format is 'torchtitan': a LoRA's should be" in refused(f"--from={file}", to, "--format=torchtitan")
    assert "--part is 'autoencoder'" in refused(f"--from={file}", to, "--format=bfl", "--part=autoencoder")
    assert "should end in .safetensors" in refused(f"--from={run}", f"--to={tmp_path / 'new'}", "--format=bfl")
    assert "no checkpoint of step 7, but 1, 2" in refused(f"--from={run}", to, "--format=bfl", "--step=7")
    assert "is there already" in refused(f"--from={file}", f"--to={model}", "--format=bfl")
