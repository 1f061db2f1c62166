"""Validation losses against a computation of their own: one sample and one timestep at a time, in float64."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from flux_func import tree
from flux_func.data import pipeline, sources
from flux_func.models import autoencoder, flux, text
from flux_func.parallel.mesh import ONE, Mesh
from flux_func.parallel.sharding import Sharding
from flux_func.train import encoders, state, validate
from tests.helpers import rank_sampling, ranks, tiny_run
from tests.helpers.tiny_run import CPU

CFG = flux.flavor("flux-tiny")
GUIDED = dataclasses.replace(CFG, guidance_embed=True)
MLPERF = [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]
TORCHTITAN = [0.0625, 0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375]


@pytest.fixture(scope="module")
def params():
    return {cfg: flux.init(cfg, seed=1, scheme="nonzero") for cfg in (CFG, GUIDED)}


def read(config, codecs, batch_size, count):
    source = sources.build(config, "validation")
    return pipeline.batches(config, source, codecs.tokenize, batch_size=batch_size, training=False, limit=count)


def run(params, fields=None, batch_size=4, count=10):
    config = tiny_run.config(fields)
    cfg = state.model_config(config)
    codecs = encoders.build(config, cfg, CPU)
    data = read(config, codecs, batch_size, count)
    sharding = Sharding(compute=state.DTYPES[config.numerics.compute])
    return validate.run(params[cfg], cfg, data, config=config, encoders=codecs, device=CPU, sharding=sharding)


def expected(params, cfg, times, count, all_timesteps):
    """{timestep: its losses}, from the definition."""
    config = tiny_run.config()
    codecs = encoders.build(config, cfg, CPU)
    wide, losses = tree.map(lambda leaf: leaf.double(), params[cfg]), {i: [] for i in range(8)}
    for p, batch in enumerate(read(config, codecs, 1, count)):
        x = autoencoder.encode({}, autoencoder.AutoencoderConfig(), torch.from_numpy(batch["image"])).double()
        noise = torch.from_numpy(batch["noise"]).double()
        txt, y = text.encode({}, text.TextConfig(), {"t5": batch["t5_tokens"], "clip": batch["clip_tokens"]})
        for i in range(8) if all_timesteps else [p % 8]:
            velocity = flux.apply(
                wide,
                cfg,
                img=flux.patchify((1 - times[i]) * x + times[i] * noise),
                img_ids=flux.image_ids(*x.shape[2:]),
                txt=txt.double(),
                txt_ids=flux.text_ids(txt.shape[1]),
                timesteps=torch.tensor([times[i]], dtype=torch.float64),
                y=y.double(),
                guidance=torch.tensor([6.0], dtype=torch.float64) if cfg.guidance_embed else None,
            )
            losses[i].append(float((flux.unpatchify(velocity, *x.shape[2:]) - (noise - x)).square().mean()))
    return losses


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("all_timesteps", [False, True])
@pytest.mark.parametrize(("convention", "times"), [("start", MLPERF), ("middle", TORCHTITAN)])
def test_losses_are_their_definition(params, convention, times, all_timesteps, guided):
    fields = {"validate.convention": convention, "validate.all_timesteps": all_timesteps, "train.guidance": 6.0}
    found = run(params, {**fields, "model.guidance_embed": guided})
    losses = expected(params, GUIDED if guided else CFG, times, 10, all_timesteps)
    means = [np.mean(losses[i]) for i in range(8)]
    np.testing.assert_allclose(found["validation_loss_by_timestep"], means, rtol=1e-5)
    assert found["validation_loss"] == pytest.approx(np.mean(means), rel=1e-5)
    assert len(set(np.round(means, 4))) == 8  # no timestep could stand for another


def test_mlperf_and_torchtitan_count_timesteps_their_own_way():
    assert validate.timestep(torch.arange(8), "start").tolist() == MLPERF
    assert validate.timestep(torch.arange(8), "middle").tolist() == TORCHTITAN


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_the_batch_size_changes_nothing_but_rounding(params, batch_size):
    one, other = run(params), run(params, batch_size=batch_size)
    np.testing.assert_allclose(*(found["validation_loss_by_timestep"] for found in (one, other)), rtol=1e-5)


def test_timesteps_that_no_sample_had_are_left_out(params):
    found = run(params, count=3)
    by_timestep = found["validation_loss_by_timestep"]
    assert by_timestep[3:] == [None] * 5
    assert found["validation_loss"] == pytest.approx(sum(by_timestep[:3]) / 3)


@given(st.lists(st.tuples(st.integers(0, 7), st.floats(0, 1e3)), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_average_is_the_mean_of_the_means(pairs):
    index, losses = torch.tensor([i for i, _ in pairs]), torch.tensor([x for _, x in pairs], dtype=torch.float64)
    found = validate.average(losses, index)
    means = [np.mean([x for j, x in pairs if j == i]) if any(j == i for j, _ in pairs) else None for i in range(8)]
    assert found["validation_loss_by_timestep"] == pytest.approx(means)
    assert found["validation_loss"] == pytest.approx(np.mean([mean for mean in means if mean is not None]))


def test_every_validation_sees_the_same_and_leaves_no_trace(params):
    before = [leaf.clone() for leaf in tree.leaves(params[CFG])]
    rng = torch.get_rng_state()
    assert run(params) == run(params)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, tree.leaves(params[CFG]), strict=True))


def test_it_computes_in_the_type_asked_for_and_keeps_no_graph(params):
    seen = []

    class Linears(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is F.linear:
                assert args[0].dtype == args[1].dtype == out.dtype and not out.requires_grad
                seen.append((out.dtype, args[1].shape))
            return out

    with Linears():
        rough = run(params, {"numerics.compute": "bfloat16"})["validation_loss"]
    # What conditions a sample is embedded in float32: the timestep and CLIP's vector, by two linears each.
    width = (CFG.hidden_size, CFG.hidden_size)
    embedders = [(CFG.hidden_size, 256), width, (CFG.hidden_size, CFG.vec_in_dim), width]
    dtypes = {dtype: [tuple(shape) for kind, shape in seen if kind == dtype] for dtype in dict(seen)}
    assert set(dtypes) == {torch.float32, torch.bfloat16}
    assert set(dtypes[torch.float32]) == set(embedders) and len(dtypes[torch.float32]) % len(embedders) == 0
    assert len(dtypes[torch.bfloat16]) > len(dtypes[torch.float32])
    assert rough == pytest.approx(run(params)["validation_loss"], rel=0.05)


AXES = ("replicate", "shard", "context")
EVERY = {"validate.all_timesteps": True}


def test_processes_of_any_mesh_find_what_one_finds():
    """Also where samples do not divide, where most processes have none, and in a model kept in parts."""
    cases = [
        ((1, 4, 1), {}, 10, 2),
        ((2, 2, 1), {}, 64, 4),
        ((1, 2, 2), EVERY, 3, 8),
        ((4, 1, 1), EVERY, 5, 1),
        ((1, 4, 1), {}, 1, 8),
        ((1, 4, 1), {"numerics.compute": "bfloat16"}, 9, 2),
    ]
    meshes = [(dict(zip(AXES, sizes, strict=True)), *rest) for sizes, *rest in cases]
    by_rank = ranks.run(4, rank_sampling.validations, meshes)
    for (sizes, fields, count, batch_size), *every in zip(meshes, *by_rank, strict=True):
        one = rank_sampling.validation(tiny_run.config(fields), ONE, count, batch_size)
        found, sent = every[0]
        assert all(other == (found, sent) for other in every)  # bit for bit, and in as many passes
        tolerance = 1e-2 if fields.get("numerics.compute") else 1e-6
        assert found["validation_loss"] == pytest.approx(one["validation_loss"], rel=tolerance)
        by_timestep = zip(*(side["validation_loss_by_timestep"] for side in (found, one)), strict=True)
        assert all(a == b or a == pytest.approx(b, rel=tolerance) for a, b in by_timestep)
        assert bool(sent) == (sizes["shard"] * sizes["context"] > 1)


def test_data_that_fail_one_process_end_them_all():
    one, other = ranks.run(2, rank_sampling.interrupted)
    assert one == other and one.startswith("data.path is 'there': is gone (on rank 1 of 2, which is on ")


@given(st.integers(1, 200), st.integers(1, 16), st.integers(1, 32))
@settings(max_examples=60, deadline=None)
def test_a_pass_has_no_more_samples_than_asked_for_and_all_processes_some_where_they_can(samples, batch_size, count):
    each = validate.samples_per_pass(samples, batch_size, Mesh({"replicate": 1, "shard": count, "context": 1}))
    assert 1 <= each <= batch_size
    positions = [pipeline.Positions(each * count, rank, count, limit=samples) for rank in range(count)]
    assert sum(len(of_rank) for of_rank in positions) == samples
    passes = [-(-len(of_rank) // each) for of_rank in positions]
    assert max(passes) == -(-samples // (each * count))
