"""Runs that train a LoRA: its gradients, its checkpoints alone, what is resumed and drawn, and what memory it takes."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import flux_func as ff
from flux_func import cli, sample_main, tree
from flux_func.errors import UserError
from flux_func.interop import lora_files
from flux_func.models.layers import Ops
from flux_func.parallel import fold
from flux_func.parallel.mesh import ONE
from flux_func.parallel.sharding import ONE_PROCESS, Sharding
from flux_func.plan import trace
from flux_func.plan.meter import Meter
from flux_func.train import adapt, checkpoint, layout, metrics, optimizer, state
from flux_func.transforms import lora
from tests.helpers import tiny_batch, tiny_run
from tests.helpers.tiny_run import identical, losses, records, stored, train

CFG = ff.flavor("flux-tiny")
CPU = torch.device("cpu")
LORA = {"lora.rank": 3, "lora.alpha": 6.0, "optimizer.lr": 1e-2}


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Half of a tiny run's time is curves.png."""
    monkeypatch.setattr(metrics, "draw_curves", lambda records, path: None)


def trained(params, patterns, seed=0):
    rng = np.random.default_rng(seed)
    fresh = lora.init(params, patterns, 3, 6)
    return tree.map(lambda leaf: torch.from_numpy(0.1 * rng.standard_normal(leaf.shape)).to(leaf.dtype), fresh)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(
    "patterns", [("*",), ("*_blocks.*",), ("single_blocks.1.linear1", "double_blocks.1.*mlp*"), ("img_in",)]
)
def test_gradients_of_a_fold_over_the_lora(remat, patterns):
    params, batch = ff.init(CFG, scheme="nonzero", dtype=torch.float64), tiny_batch.batch(2)
    batch = tree.map(torch.Tensor.double, batch)
    adapter = trained(params, patterns)
    ops, vjp = adapt.Base(params, ONE_PROCESS, CFG).training()
    grads, loss = fold.grad_and_value(adapter, CFG, batch, ops, remat, vjp=vjp)
    expected, value = torch.func.grad_and_value(lora.apply(ff.loss), argnums=1)(params, adapter, CFG, batch)
    torch.testing.assert_close(loss, value, rtol=1e-12, atol=0)
    found, expected = tree.flatten(grads), tree.flatten(expected)
    assert list(found) == list(expected)
    for name in expected:
        assert (found[name] - expected[name]).norm() <= 1e-10 * expected[name].norm(), name


def test_base_is_kept_in_the_type_that_is_computed_in():
    """Cast once or before every stage: the same bits."""
    params, batch = ff.init(CFG, scheme="nonzero"), tiny_batch.batch(2)
    adapter, half = trained(params, ("*",)), Sharding(compute=torch.bfloat16)
    answers = []
    for kept in (params, tree.map(lambda leaf: leaf.to(torch.bfloat16), params)):
        ops, vjp = adapt.Base(kept, half, CFG).training()
        answers.append(fold.grad_and_value(adapter, CFG, batch, ops, vjp=vjp, sharding=half))
    assert identical(*(tree.flatten(grads) for grads, _ in answers)) and answers[0][1] == answers[1][1]


def test_memory_is_the_base_a_tenth_and_activations():
    """Of everything that a step makes or keeps, by counting; activations are those of training the weights."""
    cfg = dataclasses.replace(CFG, hidden_size=256, depth_single_blocks=4, axes_dim=(8, 12, 12))
    batch, chosen, drawn = tiny_batch.batch(1, text=8), optimizer.adamw(1e-4), ff.init(cfg)

    def measure(frozen: bool) -> tuple[int, int]:
        with Meter() as meter:
            base = tree.map(torch.clone, drawn)
            weights = state.size_in_bytes(base)
            inputs, ops, vjp = batch, Ops(), fold.autograd_vjp
            if frozen:
                params = lora.init(base, ("*_blocks.*",), 2, 2)
                ops, vjp = adapt.Base(base, ONE_PROCESS, cfg).training()
            else:
                params = base
            kept = chosen.init(params)
            grads, _ = fold.grad_and_value(params, cfg, inputs, ops, vjp=vjp)
            chosen.update(grads, kept, params)
        return meter.peak, weights

    with Meter() as alone:
        loss = ff.loss(tree.map(lambda leaf: leaf.clone().requires_grad_(), drawn), cfg, batch)
    del loss
    adapted, weights = measure(True)
    activations = alone.peak - weights
    assert adapted <= 1.1 * weights + activations
    assert measure(False)[0] >= 3.9 * weights  # gradients and two moments, as large as the weights each


def test_gathered_weights_are_not_held_for_the_backward_pass():
    """Of 4 processes, each has a quarter of the weights, and for its activations no more than one that has all."""
    cfg = dataclasses.replace(CFG, hidden_size=256, depth_single_blocks=8, axes_dim=(8, 12, 12))
    batch, peaks, sizes = tiny_batch.batch(1), {}, {"replicate": 1, "shard": 4, "context": 1}
    with trace.processes(sizes) as mesh:
        for count, here in ((1, ONE), (4, mesh)):
            made = tiny_run.config({**LORA, "parallel.shard": count, "train.batch_size": 4})
            chosen = optimizer.adamw(1e-3)
            over, under = layout.build(made, cfg, chosen, here, CPU), layout.of_weights(made, cfg, here, CPU)
            base, params = (
                tree.map(lambda place, here=here: torch.zeros(place.local_shape(here)), each.params)
                for each in (under, over)
            )
            ops, vjp = adapt.Base(base, under, cfg).training()
            with Meter() as meter:
                fold.grad_and_value(params, cfg, batch, ops, vjp=vjp, sharding=over, denominator=1)
            peaks[count] = meter.peak, state.size_in_bytes(base)
    weights = peaks[1][1]
    assert peaks[4][1] < 0.26 * weights
    assert peaks[4][0] - peaks[1][0] < 0.35 * weights  # two of the largest stages, and not all


def test_checkpoints_hold_the_lora_alone(tmp_path):
    train(tmp_path, {**LORA, "ema.decay": 0.9})
    found = stored(tmp_path, 4)
    paths = {name for name in tree.flatten(lora.init(ff.abstract(CFG), ("*_blocks.*",), 3, 6))}
    moments = {f"opt.{kind}.{path}" for kind in ("exp_avg", "exp_avg_sq") for path in paths}
    assert found.keys() == {f"{of}.{path}" for of in ("params", "ema") for path in paths} | moments | {"opt.step"}
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*") if file.is_file())
    assert size < 0.3 * state.size_in_bytes(ff.abstract(CFG))
    assert all(found[f"params.{path}"].any() for path in paths)  # all of B has moved from zero


def test_first_loss_is_the_bases_and_then_it_falls(tmp_path):
    fields = {"train.steps": 8, "train.batch_size": 16, "data.prompt_dropout": 0.0}
    adapted = records(tmp_path / "lora") if train(tmp_path / "lora", {**LORA, **fields}) else []
    plain = train(tmp_path / "plain", {**fields, "train.steps": 1})
    assert adapted[0]["loss"] == plain[0]["loss"]
    assert adapted[-1]["loss"] < 0.8 * adapted[0]["loss"]


RUNS = {
    "average, accumulation": {"ema.decay": 0.9, "train.batch_size": 4, "train.accumulate": 2},
    "recomputation, bfloat16": {"remat.policy": "full", "numerics.compute": "bfloat16"},
    "some blocks, SGD": {"lora.patterns": ("*.1.*attn.proj",), "optimizer.name": "SGD",
                         "optimizer.options": "momentum=0.9", "optimizer.lr": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS.keys())
def test_resumes(tmp_path, fields):
    fields = {**LORA, "checkpoint.every": 2, **fields}
    if fields.get("optimizer.name"):
        fields |= {"optimizer.betas": (0.9, 0.95)}
    whole = train(tmp_path / "whole", fields)
    train(tmp_path / "parts", {**fields, "train.steps": 2})
    parts = train(tmp_path / "parts", fields)
    assert losses(parts) == losses(whole)
    assert identical(stored(tmp_path / "whole", 4), stored(tmp_path / "parts", 4))


def test_another_lora_is_not_gone_on_with(tmp_path):
    train(tmp_path, {**LORA, "train.steps": 1})
    with pytest.raises(UserError, match="lora.rank is 4, but the checkpoint in the workdir was written with 3"):
        train(tmp_path, {**LORA, "lora.rank": 4})


def base_file(folder, cfg=CFG, seed=1):
    ff.save(folder / "base.safetensors", ff.init(cfg, seed, scheme="nonzero"), cfg)
    return {"model.weights": str(folder / "base.safetensors"), "model.init": "pretrain"}


def test_weights_under_it_are_read_again(tmp_path):
    fields = {**LORA, **base_file(tmp_path)}
    whole = train(tmp_path / "whole", fields)
    train(tmp_path / "parts", {**fields, "train.steps": 2})
    assert losses(train(tmp_path / "parts", fields)) == losses(whole)
    # They are in no checkpoint, and have to be there.
    (tmp_path / "base.safetensors").unlink()
    with pytest.raises(UserError, match="model.weights is .*there is no such file"):
        train(tmp_path / "parts", {**fields, "train.steps": 6})
    base_file(tmp_path, dataclasses.replace(CFG, depth=1))
    with pytest.raises(UserError, match="model.weights is|model.flavor is"):
        train(tmp_path / "parts", {**fields, "train.steps": 6})


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def drawn(out, *flags):
    """Runs sample_main; returns its pictures."""
    given = ("--prompt=a handwritten three", "--prompt=a handwritten five", "--steps=2", f"--out={out}")
    assert tiny_run.program(sample_main, *flags, *given) == 0
    return pictures(out)


def furthest(one, other):
    assert one.keys() == other.keys()
    return max(np.abs(one[name] - other[name]).max() for name in one)


def test_sampling(tmp_path):
    """From the run's folder, from the base with the LoRA's file on top, and from what both are merged."""
    fields = {**base_file(tmp_path), "optimizer.lr": 3e-2, "ema.decay": 0.5, "sample.every": 4}
    train(tmp_path / "run", {**LORA, **fields})
    run = drawn(tmp_path / "of run", f"--workdir={tmp_path / 'run'}")
    adapter = adapt.of_run(tmp_path / "run", 4)
    lora_files.save(tmp_path / "lora.safetensors", adapter, "kohya")
    base, cfg = ff.load(tmp_path / "base.safetensors")
    for name, params in (("base", base), ("merged", lora.merge(base, [(adapter, 0.5)]))):
        saved = tiny_run.config({"model.flavor": "flux-tiny"})
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(saved.to_json())
        with checkpoint.Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(0, {"params": params}, cfg, {}, wait=True)
    file = f"--lora={tmp_path / 'lora.safetensors'}"
    assert furthest(drawn(tmp_path / "on top", f"--workdir={tmp_path / 'base'}", file), run) <= 1
    half = drawn(tmp_path / "half", f"--workdir={tmp_path / 'base'}", f"{file}:0.25", f"{file}:0.25")
    assert furthest(half, drawn(tmp_path / "merged half", f"--workdir={tmp_path / 'merged'}")) <= 1
    assert furthest(half, run) > 3 and furthest(drawn(tmp_path / "plain", f"--workdir={tmp_path / 'base'}"), run) > 3
    average = drawn(tmp_path / "average", f"--workdir={tmp_path / 'run'}", "--ema")
    assert furthest(average, run) > 0
    about = Image.open(next((tmp_path / "half").glob("000*.png"))).text
    assert about["lora"] == f'[["{tmp_path / "lora.safetensors"}", 0.25], ["{tmp_path / "lora.safetensors"}", 0.25]]'
    assert (tmp_path / "run/samples/step_000004.png").is_file()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{tmp}/absent.safetensors", "no such file"),
        ("{tmp}/absent.safetensors:much", "with a number, such as FILE:0.8"),
        ("{tmp}/absent.safetensors:nan", "with a number, such as FILE:0.8"),
        ("{tmp}/other.safetensors:2", r"whose weight is \[384, 128\] in the base"),
    ],
)
def test_loras_that_cannot_be(tmp_path, given, says):
    narrow = dataclasses.replace(CFG, hidden_size=64, num_heads=4)
    lora_files.save(
        tmp_path / "other.safetensors", trained(ff.abstract(narrow), ("double_blocks.0.img_attn.qkv",)), "bfl"
    )
    source = sample_main.Origin("it", None, CFG, None, None, {})
    text = given.format(tmp=tmp_path)
    with pytest.raises(UserError, match=rf"--lora is '{text}': .*{says}"):
        sample_main.choose_loras(source, [text])


def test_a_file_with_a_colon_in_its_name(tmp_path):
    (tmp_path / "a:1").write_bytes(b"")
    assert cli.split_weight(str(tmp_path / "a:1")) == (str(tmp_path / "a:1"), 1.0)
    assert cli.split_weight("x/y.safetensors:-0.5") == ("x/y.safetensors", -0.5)
    assert cli.split_weight("hf://owner/name") == ("hf://owner/name", 1.0)
    assert cli.split_weight("hf://owner/name:0.5") == ("hf://owner/name", 0.5)


def test_weights_only_at_the_end(tmp_path):
    fields = {"checkpoint.last_weights_only": True, "checkpoint.export_dtype": "bfloat16"}
    train(tmp_path, {**LORA, **fields, "lora.patterns": ("*.1.*attn.proj",)})
    found = adapt.of_run(tmp_path)
    assert {update.alpha for update in lora.updates(found).values()} == {6.0}
    assert {leaf.dtype for leaf in tree.leaves(found)} == {torch.float32}
    with pytest.raises(UserError, match="has no checkpoint of step 3, but 4"):
        adapt.of_run(tmp_path, 3)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"lora.alpha": 4.0}, "lora.alpha is 4.0: is read only where lora.rank is above 0"),
        ({"lora.patterns": ("*",)}, "lora.patterns is .*: is read only where lora.rank is above 0"),
        ({"lora.rank": -1}, "lora.rank is -1: should not be negative"),
        ({"lora.rank": 2, "model.init": "pretrain"}, "lora.rank is 2: needs model.weights to adapt"),
        ({"lora.rank": 2, "lora.patterns": ()}, "lora.patterns is .*: should be patterns of linears"),
        ({"lora.rank": 2, "lora.patterns": ("*.attn.qkv",)}, r"'\*\.attn\.qkv' fits no path of the tree; the nearest"),
        (
            {"lora.rank": 2, "parallel.moments": (("*", {"shard": 0}),)},
            "parallel.moments is .*: is not read where lora",
        ),
        ({"lora.rank": 2, "parallel.lora": (("img_out*", {}),)}, r"parallel\.lora has the row .* fits nothing"),
    ],
)
def test_settings_that_cannot_be_honoured(tmp_path, fields, says):
    with pytest.raises(UserError, match=says):
        train(tmp_path / "run", fields)
    assert not (tmp_path / "run").exists()


def test_where_it_is():
    made = tiny_run.config({**LORA, "numerics.compute": "bfloat16"})
    placed = layout.build(made, CFG, optimizer.adamw(1e-3), ONE, CPU)
    assert {place.dtype for place in tree.leaves(placed.params)} == {torch.float32}
    under = layout.of_weights(made, CFG, ONE, CPU)
    assert {place.dtype for place in tree.leaves(under.params)} == {torch.bfloat16}
