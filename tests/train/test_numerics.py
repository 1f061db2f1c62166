"""Every combination of what a run may compute by, against plain float32: gradients, and the losses of 50 steps."""

import dataclasses
import functools

import pytest
import torch

from flux_func import config as configs
from flux_func import tree
from flux_func.models import flux
from flux_func.parallel.mesh import ONE
from flux_func.train import layout, optimizer, state
from flux_func.train import step as steps

# Small: a CPU without instructions for bfloat16 takes a hundred times as long for a product.
CFG = dataclasses.replace(
    flux.flavor("flux-tiny"),
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    axes_dim=(16, 24, 24),
    context_in_dim=32,
    vec_in_dim=16,
)
COMPILED = {"compile.enabled": True, "compile.backend": "aot_eager"}


@pytest.fixture(autouse=True)
def afresh():
    yield
    torch.compiler.reset()


def draw(position):
    draws = torch.Generator().manual_seed(position)
    shapes = {"latents": (4, 16, 8, 8), "noise": (4, 16, 8, 8), "txt": (4, 16, CFG.context_in_dim)}
    shapes["y"] = (4, CFG.vec_in_dim)
    batch = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    return {**batch, "timesteps": torch.rand(4, generator=draws)}


@functools.cache
def take(**given):
    """Returns the losses of 50 steps of two micro-batches each, and the gradients of the first by path."""
    config = configs.default()
    config.update_from_flattened_dict(
        {
            **given,
            "train.batch_size": 4,
            "train.accumulate": 2,
            "data.image_size": 64,
            "text.max_length": 16,
            "optimizer.clip_norm": 0.0,
        }
    )
    configs.validate(config)
    chosen = optimizer.from_config(config)
    sharding = layout.build(config, CFG, chosen, ONE, torch.device("cpu"))
    params = flux.init(CFG, dtype=state.DTYPES[config.numerics.param], scheme="nonzero")
    here, losses, grads = {"params": params, "opt": chosen.init(params)}, [], {}
    run = dict(cfg=CFG, config=config, optimizer=chosen, sharding=sharding, ops=layout.ops(config, CFG, sharding))
    for step in range(50):
        halves = {name: value.chunk(2) for name, value in draw(step).items()}
        micro = [{name: parts[i] for name, parts in halves.items()} for i in range(2)]
        losses.append(steps.advance(here, micro, step, **run)["loss"].item())
        # The first moments begin as the gradients but for a factor.
        grads = grads or {path: leaf.clone() for path, leaf in tree.flatten(here["opt"]["exp_avg"]).items()}
    return losses, grads


def apart(losses):
    return max(abs(a / b - 1) for a, b in zip(losses, take()[0], strict=True))


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", ["none", "full", "selective"])
@pytest.mark.parametrize("more", [{}, {"numerics.reduce": "bfloat16"}, COMPILED], ids=["eager", "reduce", "compiled"])
def test_gradients_and_losses_are_those_of_float32(compute, remat, more):
    losses, grads = take(**{"numerics.compute": compute, "remat.policy": remat, **more})
    exact = compute == "float32" and "numerics.reduce" not in more
    for path, expected in take()[1].items():
        assert (grads[path] - expected).norm() <= (1e-5 if exact else 2e-2) * expected.norm(), path
    assert apart(losses) <= (1e-5 if exact else 1e-2)


def test_parameters_and_moments_in_fewer_bits_learn_as_float32_does():
    kept = {"numerics.param": "bfloat16", "numerics.compute": "bfloat16", "numerics.reduce": "bfloat16"}
    losses, _ = take(**kept, **{"optimizer.moments": "8bit"})
    assert apart(losses) <= 2e-2
