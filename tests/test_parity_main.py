import json
import os
import re
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from flux_func import parity_main, tree
from flux_func.interop import weights
from flux_func.models import flux
from flux_func.parity import process
from tests.helpers import tiny_pipeline, tiny_run

TINY = ("--config.model.flavor=flux-tiny", "--height=32", "--width=48", "--text_tokens=5", "--steps=2", "--device=cpu")
QUICK = (*TINY, "--parts=transformer,sampler")
LEAF = "double_blocks.1.img_attn.qkv.weight"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that the program runs in, with another for what it writes and removes."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(parity_main.tempfile, "tempdir", str(scratch))
    # Diffusers imports torchao where there is one, and that torch's compiler, which makes a folder of its own.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    assert not list(scratch.iterdir())


@pytest.fixture
def in_this_process(monkeypatch):
    """A reference that answers here, which saves the seconds that its imports take."""
    monkeypatch.setattr(process, "answer", lambda name, python, folder, say: process.answer_here(name, folder, say))


def saved(path):
    return json.loads((path / "report.json").read_text())


@pytest.mark.parametrize("reference", ["bfl", "diffusers"])
def test_end_to_end(reference, folder, capfd):
    assert tiny_run.program(parity_main, f"--reference={reference}", *TINY) == 0
    out, err = capfd.readouterr()
    report = saved(folder / "parity" / f"{reference}_000")
    assert report["passed"] and report["verdict"] in out
    assert report["versions"][f"theirs: {process._MODULES[reference][0]}"]
    parts = {row["part"] for row in report["rows"]}
    assert parts == {"forward", "embeddings", "stages", "gradients", "sampler", "autoencoder", "image", "text"}
    assert len(re.findall(r"^\w+ +.* ok\b", out, re.MULTILINE)) == len(report["rows"])
    # What is going on is said while it goes on, on either side.
    assert re.search(rf"\[ +\d+ s\] {reference}: gradients\n(.|\n)*\[ +\d+ s\] ours: gradients\n", err)
    assert (folder / "parity" / f"{reference}_000" / "report.html").stat().st_size > 10_000


def test_a_damaged_row_is_reported_with_its_stage(folder, in_this_process, capfd):
    assert tiny_run.program(parity_main, "--reference=bfl", *QUICK, f"--corrupt={LEAF}", "--out=found") == 1
    out, _ = capfd.readouterr()
    assert "out of bounds; stages that differ by themselves: double_blocks.1\n" in out
    report = saved(folder / "found")
    failed = [row["stage"] for row in report["rows"] if row["part"] == "stages" and not row["passed"]]
    assert failed == ["double_blocks.1"] and report["settings"]["corrupted on our side"] == LEAF


def test_reports_are_numbered_and_never_overwritten(folder, in_this_process):
    for number in range(2):
        assert tiny_run.program(parity_main, "--reference=bfl", *TINY, "--parts=transformer") == 0
        assert [path.name for path in sorted((folder / "parity").iterdir())][number] == f"bfl_00{number}"


def test_weights_of_a_file(folder, in_this_process, tmp_path):
    # No flavor has this shape: it is the file's.
    cfg = flux.FluxConfig(hidden_size=64, num_heads=4, depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6))
    save_file(tree.flatten(flux.init(cfg, seed=1, scheme="nonzero")), tmp_path / "flux.safetensors")
    given = (*QUICK[1:], f"--weights={tmp_path}/flux.safetensors", "--out=out")
    assert tiny_run.program(parity_main, "--reference=diffusers", *given) == 0
    report = saved(folder / "out")
    assert report["model"]["hidden_size"] == 64 and report["settings"]["weights"].endswith("flux.safetensors")


@pytest.mark.parametrize("reference", ["bfl", "diffusers"])
def test_a_whole_pipeline_draws_the_prompt(reference, folder, in_this_process, tmp_path):
    pipeline = tiny_pipeline.whole(tmp_path / "pipeline", guidance=True, shift=False)
    given = (*TINY[1:], f"--weights={pipeline}", "--prompt=a red bird", "--guidance=2.5", "--out=out")
    assert tiny_run.program(parity_main, f"--reference={reference}", *given) == 0
    report = saved(folder / "out")
    assert report["settings"]["prompt"] == "a red bird" and report["settings"]["shift"] is False
    assert report["settings"]["guidance"] == 2.5 and report["model"]["guidance_embed"] is True
    assert "guidance" in [row["name"] for row in report["rows"] if row["part"] == "embeddings"]


def test_qk_norm_eps_is_the_reference_s():
    config = tiny_run.config()
    eps = {
        name: parity_main.choose_model(name, config, None).qk_norm_eps for name in ("bfl", "diffusers", "torchtitan")
    }
    assert eps == {"bfl": 1e-6, "diffusers": 1e-6, "torchtitan": 1e-5}


def test_another_qk_norm_eps_of_the_weights_is_said(folder, in_this_process, tmp_path, capfd):
    cfg = flux.FluxConfig(
        hidden_size=64, num_heads=4, depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6), qk_norm_eps=1e-5
    )
    weights.save(tmp_path / "flux.safetensors", flux.init(cfg, scheme="nonzero"), cfg)
    given = ("--reference=bfl", *TINY[1:], "--parts=transformer", f"--weights={tmp_path}/flux.safetensors", "--out=out")
    assert tiny_run.program(parity_main, *given) == 0
    assert "qk_norm_eps is 1e-05 with these weights: both sides take bfl's, 1e-06\n" in capfd.readouterr().err
    report = saved(folder / "out")
    assert report["model"]["qk_norm_eps"] == 1e-6
    assert report["settings"]["qk_norm_eps"] == "1e-06, the reference's; 1e-05 with these weights"


def test_classifier_free_guidance(folder, in_this_process, tmp_path):
    pipeline = tiny_pipeline.whole(tmp_path / "pipeline", guidance=True, shift=False)
    given = (*QUICK[1:], f"--weights={pipeline}", "--prompt=a red bird", "--cfg_scale=5", "--out=out")
    assert tiny_run.program(parity_main, "--reference=diffusers", *given) == 0
    settings = saved(folder / "out")["settings"]
    assert settings["cfg_scale"] == 5 and "qk_norm_eps" not in settings


BAD = [
    (["--reference=bfl", "--height=40"], "--height is 40: should be a multiple of 16, such as 32"),
    (["--reference=bfl", "--batch_size=0"], "--batch_size is 0: should be at least 1"),
    (["--reference=bfl", "--parts=sampler"], "--parts is 'sampler': sampler needs transformer beside it"),
    (["--reference=bfl", "--parts="], "--parts is '': should be some of transformer, sampler, autoencoder, text"),
    (["--reference=bfl", "--parts=transfromer"], "--parts is 'transfromer': did you mean 'transformer'?"),
    (
        ["--reference=bfl", f"--corrupt={LEAF}", "--parts=text"],
        f"--corrupt is '{LEAF}': is a weight of the transformer",
    ),
    (["--reference=bfl", f"--corrupt={LEAF[:-1]}"], f"--corrupt is '{LEAF[:-1]}': did you mean '{LEAF}'?"),
    (["--reference=bfl", "--guidance=3"], "--guidance is 3.0: this model has no guidance embedding; leave it out"),
    (["--reference=diffusers", "--cfg_scale=1"], "--cfg_scale is 1.0: should be more than 1; leave it out"),
    (["--reference=bfl", "--cfg_scale=5"], "--cfg_scale is 5.0: bfl's sampler has no such guidance; use diffusers or"),
    (["--reference=bfl", "--prompt=x"], "--prompt is 'x': is read only where --weights is a whole pipeline"),
    (["--reference=bfl", "--out=full"], "full: is there already; choose another path"),
    (["--reference=bfl", "--weights=nowhere"], "nowhere: there is no such file or folder"),
    (
        ["--reference=bfl", "--config.model.flavr=x"],
        "model.flavr is no field of the config: did you mean 'model.flavor'?",
    ),
    (["--reference=bfl", "--config.model.qk_norm_eps=1e-5"], "model.qk_norm_eps is 1e-05: bfl computes with 1e-06"),
    (["--reference=bfl", "--reference_python=/no/python"], "--reference_python is '/no/python': cannot be run"),
    (["--reference=torchtitan"], "has no module 'torchtitan'; in an environment of its own, pip install torch=="),
    (["--reference=bfi"], "flag --reference=bfi: value should be one of <bfl|diffusers|torchtitan>"),
    ([], "--reference is not given: <bfl|diffusers|torchtitan>"),
]


@pytest.mark.parametrize(("flags", "line"), BAD, ids=[" ".join(flags[-1:]) for flags, _ in BAD])
def test_what_a_user_can_put_right_is_one_line_before_anything_is_done(flags, line, folder, capfd):
    if "--reference=torchtitan" in flags and process.importlib.util.find_spec("torchtitan"):
        pytest.skip("torchtitan is installed here")
    (folder / "full").mkdir()
    (folder / "full" / "mine").write_text("kept")
    assert line in tiny_run.refused(capfd, folder, parity_main, TINY[0], *flags)


def test_torchtitan_has_neither_guidance_nor_an_unshifted_sampler(folder, capfd, monkeypatch):
    monkeypatch.setattr(process, "check", lambda reference, python: None)
    titan = ("--reference=torchtitan", TINY[0])
    line = tiny_run.refused(capfd, folder, parity_main, *titan, "--config.model.guidance_embed=True")
    assert "--reference is 'torchtitan': it has no guidance embedding" in line
    line = tiny_run.refused(capfd, folder, parity_main, *titan, "--noshift")
    assert "--shift is False: torchtitan's sampler always shifts" in line


def test_help_answers_from_the_command_line(folder):
    root = os.path.dirname(os.path.dirname(parity_main.__file__))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "flux_func.parity_main", "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, env=env)
    assert answer.returncode == 0 and "--reference: <bfl|diffusers|torchtitan>" in answer.stdout
