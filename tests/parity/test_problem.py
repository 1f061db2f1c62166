import dataclasses
import json

import pytest
import torch

from flux_func import tree
from flux_func.models import autoencoder, flux
from flux_func.parity import problem
from flux_func.parity.problem import Problem

TINY = flux.flavor("flux-tiny")
SMALL = dataclasses.replace(TINY, context_in_dim=24, vec_in_dim=12)


def pose(cfg=SMALL, **fields):
    return Problem("bfl", cfg, {}, **{"height": 32, "width": 48, "text_tokens": 5, **fields})


def test_inputs_are_a_function_of_the_seed():
    one, same, other = (problem.transformer_inputs(pose(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in ("latents", "noise", "txt", "y"))


def test_inputs_are_exact_in_bfloat16_and_so_is_a_thousand_times_a_time():
    inputs = problem.transformer_inputs(pose(dataclasses.replace(SMALL, guidance_embed=True), batch=9))
    for name in ("latents", "noise", "txt", "y", "timesteps", "guidance"):
        assert torch.equal(inputs[name].bfloat16().float(), inputs[name]), name
    for name in ("timesteps", "guidance"):
        # As references compute it: rounded before, and after.
        assert torch.equal((inputs[name].bfloat16() * 1000).float(), inputs[name] * 1000), name


def test_inputs_have_the_shapes_of_the_model_and_of_the_image():
    cfg = dataclasses.replace(SMALL, in_channels=384, guidance_embed=True)
    shapes = {name: tuple(value.shape) for name, value in problem.transformer_inputs(pose(cfg, batch=3)).items()}
    assert shapes["latents"] == shapes["noise"] == (3, 16, 4, 6)
    assert shapes["img_cond"] == (3, 6, 320) and shapes["txt"] == (3, 5, 24) and shapes["y"] == (3, 12)
    assert shapes["timesteps"] == shapes["guidance"] == (3,)
    assert "guidance" not in problem.transformer_inputs(pose())


def test_the_sampler_is_told_what_it_is_given():
    txt, y = torch.randn(2, 7, 24), torch.randn(2, 12)
    inputs = problem.sampler_inputs(pose(conditioning=(txt, y), cfg_scale=5.0, batch=3))
    for i in range(3):
        assert torch.equal(inputs["txt"][i], txt[0]) and torch.equal(inputs["uncond_txt"][i], txt[1])
        assert torch.equal(inputs["y"][i], y[0]) and torch.equal(inputs["uncond_y"][i], y[1])
    assert inputs["noise"].shape == (3, 16, 4, 6)


@pytest.mark.parametrize("cfg_scale", [None, 5.0])
def test_the_sampler_draws_what_it_is_not_given(cfg_scale):
    inputs = problem.sampler_inputs(pose(cfg_scale=cfg_scale))
    assert inputs["txt"].shape == (2, 5, 24) and inputs["y"].shape == (2, 12)
    assert ("uncond_txt" in inputs, "uncond_y" in inputs) == (bool(cfg_scale),) * 2
    values = [value[i].flatten()[:12] for name, value in inputs.items() if name != "noise" for i in range(2)]
    assert len(torch.stack(values).unique(dim=0)) == len(values)


def test_schedules_are_of_the_run_and_of_others_shifted_and_not():
    cases = problem.schedules(pose(steps=3))
    assert cases[:2] == [(3, 6, True), (3, 6, False)] and len(cases) == 2 + 2 * len(problem.SCHEDULES)


def test_no_weight_of_the_autoencoder_leaves_its_input_as_it_is():
    cfg = autoencoder.AutoencoderConfig(kind="kl", ch=32, ch_mult=(1, 2), num_res_blocks=1)
    flat = tree.flatten(problem.autoencoder_weights(cfg, 0, "cpu"))
    assert {path: tuple(leaf.shape) for path, leaf in flat.items()} == autoencoder.shapes(cfg)
    assert all(leaf.std() > 0.01 for leaf in flat.values())
    image = torch.randn(1, 3, 32, 32).tanh()
    latents = autoencoder.encode(tree.unflatten(flat), cfg, image)
    assert 0.1 < latents.std() < 10


def test_tokens_are_of_the_vocabulary_and_clip_s_end_once():
    tokens = problem.text_inputs(pose(), (50, 40))
    assert tokens["t5"].shape == (2, 5) and tokens["clip"].shape == (2, problem.CLIP_LENGTH)
    assert tokens["t5"].min() >= 2 and tokens["t5"].max() < 50
    for row, end in zip(tokens["clip"], (9, 76), strict=True):
        assert row[:end].max() < 38 and (row[end:] == 39).all()


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_text_encoders_are_written_as_transformers_reads_them(part, tmp_path):
    problem.write_text_encoders(tmp_path, seed=0)
    config = json.loads((tmp_path / part / "config.json").read_text())
    assert config.get("d_model", config.get("hidden_size")) == {"text_encoder": 768, "text_encoder_2": 4096}[part]
    assert (tmp_path / part / "model.safetensors").is_file()
