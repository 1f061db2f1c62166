"""Parity with fluxbfl and diffusers at shapes that trip assumptions, and faults of ours that it must find."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from flux_func import tree
from flux_func.flow import sampler, timesteps
from flux_func.models import flux, layers
from flux_func.parallel import fold
from flux_func.parity import compare, exchange
from flux_func.parity.problem import PARTS
from flux_func.transforms import precision
from tests.helpers import tiny_parity

TINY = flux.flavor("flux-tiny")
SMALL = dataclasses.replace(TINY, depth=1, depth_single_blocks=1, context_in_dim=24, vec_in_dim=12)
# Three heads of 20, of which rows and columns have unequal shares.
ODD = dataclasses.replace(SMALL, hidden_size=60, num_heads=3, axes_dim=(4, 6, 10))
FILL = dataclasses.replace(SMALL, in_channels=384, guidance_embed=True)
SHAPES = {
    "one text token": (SMALL, {"text_tokens": 1}),
    "one image token": (SMALL, {"height": 16, "width": 16}),
    "one token of each": (SMALL, {"height": 16, "width": 16, "text_tokens": 1}),
    "wide": (SMALL, {"height": 32, "width": 160}),
    "tall": (SMALL, {"height": 160, "width": 32}),
    "batch of three": (SMALL, {"batch": 3}),
    "heads of 20": (ODD, {}),
    "two blocks of each, heads of 16": (TINY, {}),
    "blocks in plenty": (dataclasses.replace(SMALL, depth=4, depth_single_blocks=11), {}),
    "384 input channels": (FILL, {}),
    "128 input channels": (dataclasses.replace(FILL, in_channels=128), {}),
    "guidance of each sample its own": (dataclasses.replace(SMALL, guidance_embed=True), {"batch": 3}),
}


def failed(comparison):
    return [row for row in comparison.rows if not row.passed]


@pytest.mark.parametrize("reference", ["bfl", "diffusers"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_gradients_and_stages_at_shapes_that_trip_assumptions(reference, shape, tmp_path):
    cfg, sizes = SHAPES[shape]
    comparison = tiny_parity.solve(tiny_parity.pose(reference, cfg, **sizes), tmp_path)
    assert not failed(comparison)
    stages = [stage.name for stage in flux.chain(cfg)]
    assert [row.name for row in comparison.rows if row.part == "stages"] == stages
    assert comparison.gradients.keys() == tree.flatten(flux.abstract(cfg)).keys()
    worst = {row.stage: row.value for row in comparison.rows if row.part == "gradients" and row.stage}
    assert list(worst) == [stage for stage in stages if stage != "join"]
    for stage, value in worst.items():
        errors = [e for leaf, e in comparison.gradients.items() if compare.stage_of(leaf) == stage]
        assert value == max(errors)


def test_guidance_differs_between_samples(tmp_path):
    posed = tiny_parity.pose("bfl", dataclasses.replace(SMALL, guidance_embed=True), batch=3)
    exchange.ask(posed, tmp_path)
    assert exchange.inputs(tmp_path, "transformer", "cpu")["guidance"].unique().numel() == 3


@pytest.mark.parametrize("reference", ["bfl", "diffusers"])
@pytest.mark.parametrize("cfg", [SMALL, dataclasses.replace(SMALL, guidance_embed=True)], ids=["plain", "guided"])
@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "unshifted"])
def test_every_part(reference, cfg, shift, tmp_path):
    # T5 and CLIP have FLUX's own widths, whatever the model's: once for each reference is enough.
    parts = PARTS if shift and not cfg.guidance_embed else PARTS[:3]
    posed = tiny_parity.pose(reference, cfg, parts=parts, shift=shift, steps=3, height=48, width=80)
    comparison = tiny_parity.solve(posed, tmp_path)
    assert not failed(comparison)
    found = {row.part for row in comparison.rows}
    expected = {"forward", "embeddings", "stages", "gradients", "sampler", "autoencoder", "image"}
    assert found == expected | ({"text"} if "text" in parts else set())
    assert [row.name for row in comparison.rows if row.name.startswith("after")] == [
        f"after step {i}" for i in (1, 2, 3)
    ]
    assert {image.shape for image in comparison.images.values()} == {(3, 48, 80)}


@pytest.mark.parametrize(
    ("leaf", "stage"),
    [
        ("img_in.bias", "stem"),
        ("double_blocks.1.img_attn.qkv.weight", "double_blocks.1"),
        ("double_blocks.0.txt_mlp.2.bias", "double_blocks.0"),
        ("single_blocks.0.norm.key_norm.scale", "single_blocks.0"),
        ("final_layer.adaLN_modulation.1.weight", "head"),
    ],
)
def test_a_damaged_row_is_found_in_its_stage_alone(leaf, stage, tmp_path):
    comparison = tiny_parity.solve(tiny_parity.pose("bfl", TINY), tmp_path, corrupt=leaf)
    assert compare.failed_stages(comparison.rows) == [stage]
    assert "float32" in [row.name for row in failed(comparison)]


def test_damage_is_one_row_of_one_leaf():
    params = flux.init(SMALL, scheme="nonzero")
    before, after = tree.flatten(params), tree.flatten(compare.damaged(params, "img_in.weight"))
    assert [leaf for leaf in before if not torch.equal(before[leaf], after[leaf])] == ["img_in.weight"]
    rows = (before["img_in.weight"] != after["img_in.weight"]).any(dim=1)
    assert rows.nonzero().flatten().tolist() == [0]


ROPE = layers.rope
FAULTS = {
    # Rows and columns exchanged: in the table, not in a stage, which is given the reference's own.
    "rope": ("rope", lambda ids, *rest: ROPE(ids[..., [0, 2, 1]], *rest), [], "rope, cosines"),
    "time": ("timestep_embedding", lambda t, dim: torch.zeros(len(t), dim), ["stem"], "timestep"),
    "norm": (
        "layer_norm",
        lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-3),
        ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1", "head"],
        "float32",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_code_is_found_where_it_is(fault, tmp_path, monkeypatch):
    name, wrong, stages, row = FAULTS[fault]
    posed = tiny_parity.pose("bfl", TINY)
    tiny_parity.ask(posed, tmp_path)
    monkeypatch.setattr(layers, name, wrong)
    comparison = compare.compare(posed, posed.params, tmp_path)
    assert compare.failed_stages(comparison.rows) == stages
    assert row in [row.name for row in failed(comparison)]


def test_qk_norm_eps_is_told_apart(tmp_path):
    # torchtitan's: what it would be to hold its weights against BFL's code.
    posed = tiny_parity.pose("bfl", dataclasses.replace(TINY, qk_norm_eps=1e-5))
    assert compare.failed_stages(tiny_parity.solve(posed, tmp_path).rows)


def test_bfloat16_that_is_not_used_is_found(tmp_path, monkeypatch):
    posed = tiny_parity.pose("bfl", SMALL)
    tiny_parity.ask(posed, tmp_path)
    compute_in = precision.compute_in
    monkeypatch.setattr(precision, "compute_in", lambda dtype: compute_in(torch.float32))
    assert [row.name for row in failed(compare.compare(posed, posed.params, tmp_path))] == ["bfloat16 is used"]


# What is not a number, and is not the first of what its row is the worst of.


def test_a_gradient_that_is_no_number_is_found(tmp_path, monkeypatch):
    posed, leaf = tiny_parity.pose("bfl", SMALL), "double_blocks.0.img_mlp.2.bias"
    tiny_parity.ask(posed, tmp_path)
    grad_and_value = fold.grad_and_value

    def broken(*args):
        grads, loss = grad_and_value(*args)
        tree.flatten(grads)[leaf][0] = torch.nan
        return grads, loss

    monkeypatch.setattr(fold, "grad_and_value", broken)
    (row,) = failed(compare.compare(posed, posed.params, tmp_path))
    assert (row.part, row.stage, row.where) == ("gradients", "double_blocks.0", leaf)


def test_an_output_of_a_stage_that_is_no_number_is_found(tmp_path, monkeypatch):
    posed = tiny_parity.pose("bfl", SMALL)
    tiny_parity.ask(posed, tmp_path)
    bind = compare.bind

    def broken(stage, ops):
        run = bind(stage, ops)
        return run if stage.name != "stem" else lambda *args: {**(out := run(*args)), "vec": out["vec"] * torch.nan}

    monkeypatch.setattr(compare, "bind", broken)
    stages = [row for row in failed(compare.compare(posed, posed.params, tmp_path)) if row.part == "stages"]
    assert [(row.stage, row.where) for row in stages] == [("stem", "vec")]


def test_a_schedule_that_is_no_number_is_found(tmp_path, monkeypatch):
    posed = tiny_parity.pose("bfl", SMALL, parts=PARTS[:2])
    tiny_parity.ask(posed, tmp_path)
    schedule = timesteps.schedule
    broken = lambda steps, tokens: schedule(steps, tokens) * (torch.nan if steps == 50 else 1)  # noqa: E731
    monkeypatch.setattr(timesteps, "schedule", broken)
    found = failed(compare.compare(posed, posed.params, tmp_path))
    assert [row.name for row in found] == ["schedule, shifted", "schedule, unshifted"]


# The sampler.


@pytest.mark.parametrize("cfg", [SMALL, dataclasses.replace(SMALL, guidance_embed=True)], ids=["plain", "guided"])
def test_classifier_free_guidance(cfg, tmp_path):
    posed = tiny_parity.pose("diffusers", cfg, parts=PARTS[:3], steps=3, cfg_scale=5.0, batch=3)
    comparison = tiny_parity.solve(posed, tmp_path)
    assert not failed(comparison)
    assert exchange.answers(tmp_path, "sampler", "cpu")["x.3"].shape == (3, 6, 64)
    names = [row.name for row in comparison.rows if row.part == "sampler"]
    assert names[-5:] == ["times told to the model", "noise in patches", *(f"after step {i}" for i in (1, 2, 3))]


OTHER_GUIDANCE = {"none": {"cfg_scale": None, "uncond_txt": None, "uncond_y": None}, "4.999": {"cfg_scale": 4.999}}


@pytest.mark.parametrize("other", OTHER_GUIDANCE.values(), ids=OTHER_GUIDANCE)
def test_classifier_free_guidance_by_another_scale_is_found(other, tmp_path):
    posed = tiny_parity.pose("diffusers", SMALL, parts=PARTS[:2], steps=3, cfg_scale=5.0)
    tiny_parity.ask(posed, tmp_path)
    sample = compare.sampler.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.sampler, "sample", lambda *args, **rest: sample(*args, **{**rest, **other}))
        comparison = compare.compare(posed, posed.params, tmp_path)
    assert [row.name for row in failed(comparison)] == ["after step 1", "after step 2", "after step 3"]


def test_a_sampler_that_goes_by_other_times_is_found(tmp_path):
    posed = tiny_parity.pose("bfl", SMALL, parts=PARTS[:2], steps=3)
    tiny_parity.ask(posed, tmp_path)
    comparison = compare.compare(dataclasses.replace(posed, shift=False), posed.params, tmp_path)
    names = ["times told to the model", "after step 1", "after step 2", "after step 3"]
    assert [row.name for row in failed(comparison)] == names


@pytest.mark.parametrize(("reference", "cfg_scale"), [("bfl", None), ("diffusers", None), ("diffusers", 5.0)])
def test_a_sampler_that_tells_the_model_another_time_is_found(reference, cfg_scale, tmp_path, monkeypatch):
    def euler(velocity, x, schedule):
        for t, after in pairwise(schedule):
            x = x + (after - t) * velocity(x, after)
        return x

    posed = tiny_parity.pose(reference, SMALL, parts=PARTS[:2], steps=3, cfg_scale=cfg_scale)
    tiny_parity.ask(posed, tmp_path)
    monkeypatch.setattr(sampler, "euler", euler)
    (row,) = failed(compare.compare(posed, posed.params, tmp_path))
    times = exchange.answers(tmp_path, "sampler", "cpu")["times"][:, 0].tolist()
    assert row.name == "times told to the model"
    assert row.value == pytest.approx(max(t - after for t, after in pairwise([*times, 0])), abs=1e-6)
