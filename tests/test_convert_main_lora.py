"""LoRAs by convert_main: files of any form and runs that trained one, to files of any form, and into weights."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

import flux_func as ff
from flux_func import convert_main, tree
from flux_func.errors import UserError
from flux_func.interop import lora_files
from flux_func.train import adapt, metrics
from flux_func.transforms import lora
from tests.helpers import tiny_hub, tiny_run

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


# Into weights.


def trained(patterns, seed):
    params, generator = ff.abstract(CFG), torch.Generator().manual_seed(seed)
    fresh = lora.init(params, patterns, 3, 6.0)
    return tree.map(lambda leaf: 0.1 * torch.randn(leaf.shape, generator=generator), fresh)


@pytest.fixture
def base(tmp_path):
    params = ff.init(CFG, scheme="nonzero")
    ff.save(tmp_path / "base.safetensors", params, CFG)
    one, other = trained(("*",), 0), trained(("*.1.*",), 1)
    lora_files.save(tmp_path / "one.safetensors", one, "diffusers")
    lora_files.save(tmp_path / "other.safetensors", other, "kohya")
    files = [lora_files.load(tmp_path / f"{name}.safetensors", CFG) for name in ("one", "other")]
    return params, list(zip(files, (0.5, 1.0), strict=True))


def merge(tmp_path, to, format, *more):
    given = (f"--lora={tmp_path / 'one.safetensors'}:0.5", f"--lora={tmp_path / 'other.safetensors'}")
    return convert(tmp_path / "base.safetensors", to, format, *given, *more)


@pytest.mark.parametrize("format", ["bfl", "diffusers", "torchtitan", "orbax"])
def test_weights_with_loras_added(base, tmp_path, capfd, format):
    params, loras = base
    to = tmp_path / ("merged.safetensors" if format == "bfl" else "merged")
    assert merge(tmp_path, to, format) == 0
    out = capfd.readouterr().out
    assert "one.safetensors: LoRA of 34 linears, added times 0.5" in out and "written in format" in out
    found, cfg = ff.load(to)
    assert (cfg.in_channels, cfg.hidden_size) == (CFG.in_channels, CFG.hidden_size)
    found, expected = tree.flatten(found), tree.flatten(lora.merge(params, loras))
    assert list(found) == list(expected) and all(torch.equal(found[path], expected[path]) for path in expected)


def test_a_sample_of_them_is_that_of_the_base_with_the_loras(base, tmp_path):
    params, loras = base
    assert merge(tmp_path, tmp_path / "merged.safetensors", "bfl") == 0
    merged, cfg = ff.load(tmp_path / "merged.safetensors")
    generator = torch.Generator().manual_seed(0)
    given = {
        "noise": torch.randn(2, 16, 4, 4, generator=generator),
        "txt": torch.randn(2, 3, CFG.context_in_dim, generator=generator),
        "y": torch.randn(2, CFG.vec_in_dim, generator=generator),
        "steps": 4,
    }
    expected = lora.apply(ff.sample)(params, loras, CFG, **given)
    torch.testing.assert_close(ff.sample(merged, cfg, **given), expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert (ff.sample(params, CFG, **given) - expected).abs().max() > 1e-2


def test_a_run_s_lora_into_weights_and_the_run_itself(run, tmp_path):
    """The run's own base was drawn; `ff.load` draws it again."""
    params, adapter = ff.init(CFG, tiny_run.config().train.seed, scheme="nonzero"), adapt.of_run(run)
    ff.save(tmp_path / "base.safetensors", params, CFG)
    given = (tmp_path / "base.safetensors", tmp_path / "merged.safetensors", "bfl", f"--lora={run}")
    assert convert(*given) == 0
    expected = tree.flatten(lora.merge(params, adapter))
    loaded = ff.load(run)
    assert loaded[1] == CFG
    for found in (ff.load(tmp_path / "merged.safetensors")[0], loaded[0]):
        found = tree.flatten(found)
        assert list(found) == list(expected) and all(torch.equal(found[path], expected[path]) for path in expected)
    average, first = tree.flatten(ff.load(run, ema=True)[0]), tree.flatten(ff.load(run, step=1)[0])
    assert not torch.equal(average["single_blocks.1.linear1.weight"], expected["single_blocks.1.linear1.weight"])
    wanted = tree.flatten(lora.merge(params, adapt.of_run(run, 1)))
    assert all(torch.equal(first[path], wanted[path]) for path in wanted)


def test_a_run_over_weights_in_a_file(base, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "draw_curves", lambda records, path: None)
    file, folder = tmp_path / "base.safetensors", tmp_path / "run"
    fields = {"lora.rank": 2, "model.weights": str(file), "train.steps": 1, "numerics.compute": "bfloat16"}
    tiny_run.train(folder, {**fields, "model.init": "pretrain"})
    expected = tree.flatten(lora.merge(base[0], adapt.of_run(folder)))
    found, cfg = ff.load(folder)
    assert cfg == CFG and all(torch.equal(leaf, expected[path]) for path, leaf in tree.flatten(found).items())
    other = dataclasses.replace(CFG, depth=1)
    ff.save(file, ff.init(other), other, overwrite=True)
    with pytest.raises(UserError, match=r"run: adapts the weights of model.weights '.*', which are of another model"):
        ff.load(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"which cannot be read: there is no such file or folder$"):
        ff.load(folder)


def test_a_type_takes_the_sum_unrounded(base, tmp_path):
    params, loras = base
    ff.save(tmp_path / "base.safetensors", params, CFG, dtype=torch.bfloat16, overwrite=True)
    assert merge(tmp_path, tmp_path / "merged.safetensors", "bfl", "--dtype=float32") == 0
    rounded = tree.map(lambda leaf: leaf.bfloat16().float(), params)
    expected = tree.flatten(lora.merge(rounded, loras))
    found = tree.flatten(ff.load(tmp_path / "merged.safetensors")[0])
    assert all(torch.equal(found[path], expected[path]) for path in expected)


@pytest.fixture
def pipeline(base, tmp_path):
    """A pipeline's folder, which has a scheduler beside its transformer."""
    folder = tmp_path / "pipeline"
    folder.mkdir()
    ff.save(folder / "transformer", base[0], CFG, format="diffusers")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "AnyScheduler"]}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    return folder


def test_a_pipeline_stays_one(base, pipeline, tmp_path):
    params, loras = base
    flags = (f"--lora={tmp_path / 'one.safetensors'}:0.5", f"--lora={tmp_path / 'other.safetensors'}")
    assert convert(pipeline, tmp_path / "merged", "diffusers", *flags) == 0
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "merged" / name).read_text() == (pipeline / name).read_text()
    found, expected = tree.flatten(ff.load(tmp_path / "merged")[0]), tree.flatten(lora.merge(params, loras))
    assert all(torch.equal(found[path], expected[path]) for path in expected)


def test_a_lora_for_twice_the_channels_makes_a_model_of_them(base, pipeline, tmp_path, capfd):
    wide = dataclasses.replace(CFG, in_channels=128)
    control = tmp_path / "control.safetensors"
    lora_files.save(control, lora.init(ff.abstract(wide), ["*"], 2, 2), "bfl")
    given = (f"--from={pipeline}", f"--to={tmp_path / 'wide'}", "--format=diffusers", f"--lora={control}")
    says = tiny_run.refused(capfd, tmp_path, convert_main, *given)
    assert "makes a transformer of 128 channels" in says and says.endswith("add --part=transformer")
    assert tiny_run.program(convert_main, *given, "--part=transformer") == 0
    assert ff.load(tmp_path / "wide")[1].in_channels == 128


def test_from_the_hub(base, tmp_path, monkeypatch):
    from huggingface_hub import constants, utils

    for name in ("base", "one"):
        folder = tmp_path / "repos/owner" / name
        folder.mkdir(parents=True)
        (folder / f"{name}.safetensors").write_bytes((tmp_path / f"{name}.safetensors").read_bytes())
    utils.disable_progress_bars()
    with tiny_hub.serve(tmp_path / "repos") as served:
        tiny_hub.use(monkeypatch, served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        assert convert("hf://owner/one", tmp_path / "form.safetensors", "kohya") == 0
        flags = ("--lora=hf://owner/one:0.5", f"--lora={tmp_path / 'other.safetensors'}")
        assert convert("hf://owner/base", tmp_path / "merged.safetensors", "bfl", *flags) == 0
    params, loras = base
    assert_same(lora_files.load(tmp_path / "form.safetensors", CFG), loras[0][0])
    found, expected = tree.flatten(ff.load(tmp_path / "merged.safetensors")[0]), tree.flatten(lora.merge(params, loras))
    assert all(torch.equal(found[path], expected[path]) for path in expected)


def test_merges_that_are_refused(base, run, tmp_path, capfd):
    narrow = ff.FluxConfig(hidden_size=64, num_heads=4, depth=2, depth_single_blocks=2, axes_dim=(4, 6, 6))
    other = lora.init(ff.abstract(narrow), ["double_blocks.0.img_attn.qkv"], 2, 2)
    lora_files.save(tmp_path / "narrow.safetensors", other, "bfl")
    model, to = tmp_path / "base.safetensors", f"--to={tmp_path / 'new.safetensors'}"

    def refused(*arguments):
        return tiny_run.refused(capfd, tmp_path, convert_main, "--format=bfl", *arguments)

    def lora_of(name):
        return f"--lora={tmp_path / name}"

    assert "whose weight is [384, 128] in the base" in refused(f"--from={model}", to, lora_of("narrow.safetensors"))
    assert "no such file" in refused(f"--from={model}", to, lora_of("absent.safetensors:0.5"))
    assert "with a number, such as FILE:0.8" in refused(f"--from={model}", to, lora_of("one.safetensors:much"))
    assert "--lora is '': should be a file" in refused(f"--from={model}", to, "--lora=")
    assert "is no LoRA" in refused(f"--from={model}", to, f"--lora={model}")
    says = refused(f"--from={tmp_path / 'one.safetensors'}", to, lora_of("other.safetensors"))
    assert "is added to weights, and" in says and says.endswith("is a LoRA; leave it out")
    says = refused(f"--from={model}", f"--to={tmp_path / 'one.safetensors'}", lora_of("one.safetensors"), "--overwrite")
    assert "holds what is read" in says
