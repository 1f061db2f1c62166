import dataclasses
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import random
from flux_func.flow import sampler
from flux_func.models import flux
from flux_func.models.layers import Ops
from flux_func.parallel.mesh import ONE, Mesh
from flux_func.train import generate
from flux_func.train.encoders import Encoders
from tests.helpers import rank_sampling, ranks

CFG = flux.flavor("flux-tiny")
GUIDED = dataclasses.replace(CFG, guidance_embed=True)
LENGTH = 3


def tokenize(captions):
    tokens = np.array([zlib.crc32(caption.encode()) for caption in captions], dtype=np.int64)
    return {"t5": np.tile(tokens[:, None], (1, LENGTH)), "clip": tokens[:, None]}


def encode_text(tokens):
    def normal(token, *shape):
        return torch.from_numpy(random.normal(int(token), "text", 0, shape))

    txt = torch.stack([normal(row[0], LENGTH, CFG.context_in_dim) for row in tokens["t5"]])
    return txt, torch.stack([normal(row[0], CFG.vec_in_dim) for row in tokens["clip"]])


def decode(latents):
    return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


ENCODERS = Encoders(tokenize, encode_text, lambda images, noise: images, decode, False)
PROMPTS = ["a three", "a four", "", "a three", "five"]


@pytest.fixture(scope="module")
def params():
    return {cfg: flux.init(cfg, seed=1, scheme="nonzero") for cfg in (CFG, GUIDED)}


def run(params, prompts=PROMPTS, cfg=CFG, **changes):
    settings = {"seed": 5, "height": 32, "width": 16, "steps": 2, **changes}
    return generate.generate(params[cfg], cfg, ENCODERS, prompts, **settings)


def test_each_image_is_the_sampler_on_its_own_counted_noise(params):
    images = run(params)
    assert images.shape == (5, 3, 32, 16) and images.dtype == torch.float32 and not images.requires_grad
    for i, prompt in enumerate(PROMPTS):
        txt, y = encode_text(tokenize([prompt]))
        noise = torch.from_numpy(random.normal(5, "sample", i, (16, 4, 2)))[None]
        expected = decode(sampler.sample(params[CFG], CFG, noise=noise, txt=txt, y=y, steps=2)).clamp(-1, 1)
        torch.testing.assert_close(images[i : i + 1], expected, rtol=1e-5, atol=1e-5)
    assert images.abs().max() == 1  # beyond it, decoders' values are clipped
    assert (images[0] - images[3]).abs().max() > 0.1  # one prompt twice is two images


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_the_batch_size_changes_nothing(params, batch_size):
    sizes = [
        len(batch)
        for batch in generate.batches(
            params[CFG], CFG, ENCODERS, PROMPTS, seed=5, height=32, width=16, steps=1, batch_size=batch_size
        )
    ]
    assert sum(sizes) == 5 and len(sizes) == generate.batch_count(5, batch_size) and max(sizes) == min(batch_size, 5)
    torch.testing.assert_close(run(params, batch_size=batch_size), run(params, batch_size=3), rtol=1e-5, atol=1e-5)


def test_the_seed_changes_the_noise(params):
    assert torch.equal(run(params), run(params))
    assert (run(params) - run(params, seed=6)).abs().max() > 0.1


def test_classifier_free_guidance_is_against_the_empty_prompt(params):
    images = run(params, PROMPTS[:2], cfg_scale=4.0, shift=False)
    (txt, y), (uncond_txt, uncond_y) = encode_text(tokenize(PROMPTS[:2])), encode_text(tokenize([""]))
    noise = torch.stack([torch.from_numpy(random.normal(5, "sample", i, (16, 4, 2))) for i in range(2)])
    latents = sampler.sample(
        params[CFG],
        CFG,
        noise=noise,
        txt=txt,
        y=y,
        steps=2,
        cfg_scale=4.0,
        uncond_txt=uncond_txt,
        uncond_y=uncond_y,
        shift=False,
    )
    torch.testing.assert_close(images, decode(latents).clamp(-1, 1), rtol=1e-5, atol=1e-5)
    # The empty prompt is its own guide.
    alone = run(params, [""], cfg_scale=4.0)
    torch.testing.assert_close(alone, run(params, [""]), rtol=1e-5, atol=1e-5)


def test_guidance_is_for_models_that_have_it(params):
    assert torch.equal(run(params, guidance=2.0), run(params))
    low, high = (run(params, cfg=GUIDED, guidance=value) for value in (1.0, 6.0))
    assert (low - high).abs().max() > 1e-3
    with pytest.raises(ValueError, match="guidance is None"):
        run(params, cfg=GUIDED)


def test_progress_is_told_of_every_euler_step_and_ops_are_kept(params):
    stages, ticks = [], []

    def wrap_stage(fn, stage):
        stages.append(stage.name)
        return fn

    images = run(params, steps=3, batch_size=2, ops=Ops(wrap_stage=wrap_stage), progress=lambda: ticks.append(1))
    passes = generate.batch_count(5, 2) * 3
    assert len(ticks) == passes == 9 and stages.count("double_blocks.1") == stages.count("head") == passes
    assert torch.equal(images, run(params, steps=3, batch_size=2))


AXES = ("replicate", "shard", "context")


def test_processes_of_any_mesh_draw_what_one_draws():
    """Also where prompts do not divide, and where there are fewer than processes."""
    cases = [
        ((1, 4, 1), 7, {"batch_size": 1, "cfg_scale": 3.0, "negative_prompt": "a six"}),
        ((2, 2, 1), 7, {}),
        ((1, 2, 2), 2, {}),
        ((4, 1, 1), 1, {}),
    ]
    meshes = [(dict(zip(AXES, sizes, strict=True)), *rest) for sizes, *rest in cases]
    first, *others = ranks.run(4, rank_sampling.drawings, meshes)
    assert others == [[None] * len(cases)] * 3
    for (_, count, changes), found in zip(meshes, first, strict=True):
        one = rank_sampling.images(ONE, rank_sampling.PROMPTS[:count], changes).numpy()
        assert found.shape == (count, 3, 32, 16) and found.std() > 0.1
        np.testing.assert_allclose(found, one, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_prompts_are_dealt_out_once_and_in_equal_passes(prompts, batch_size, count):
    sizes = {"replicate": count, "shard": 1, "context": 1}
    meshes = [Mesh(sizes, rank) for rank in range(count)]
    shares = [generate.share(prompts, mesh) for mesh in meshes]
    assert sorted(i for share in shares for i in share) == list(range(prompts))
    assert max(map(len, shares)) == generate.most(prompts, meshes[0]) <= min(map(len, shares)) + 1
    for mesh, share in zip(meshes, shares, strict=True):
        assert len(share) <= batch_size * generate.batch_count(prompts, batch_size, mesh)
        assert [*generate.stand_in(prompts, mesh)] == ([*share[:1]] or [0])
