"""Compiled stages give the numbers of eager ones, and are compiled once a kind."""

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

from flux_func import tree
from flux_func.models import flux
from flux_func.models.layers import Ops
from flux_func.parallel import fold
from flux_func.transforms import compiled
from flux_func.transforms.remat import keep

CFG = dataclasses.replace(flux.flavor("flux-tiny"), context_in_dim=16, vec_in_dim=8)


@pytest.fixture(autouse=True)
def afresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def draw(cfg, height=4, width=6, text=3):
    draws = torch.Generator().manual_seed(0)
    shapes = {"latents": (2, 16, height, width), "noise": (2, 16, height, width), "txt": (2, text, 16), "y": (2, 8)}
    drawn = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    return {**drawn, "timesteps": torch.rand(2, generator=draws)}


def error(params, cfg, ops, batch, remat="none"):
    expected, loss = fold.grad_and_value(params, cfg, batch, remat=remat)
    grads, value = fold.grad_and_value(params, cfg, batch, ops=ops, remat=remat)
    torch.testing.assert_close(value, loss, rtol=1e-6, atol=0)
    pairs = zip(tree.leaves(grads), tree.leaves(expected), strict=True)
    return max(((found - grad).norm() / grad.norm()).item() for found, grad in pairs)


@pytest.mark.parametrize("remat", [*fold.REMAT, keep("attention", "*_attn.qkv")])
def test_gradients_are_those_of_eager_mode(remat):
    params, ops = flux.init(CFG, scheme="nonzero"), Ops(wrap_stage=compiled.stages(backend="aot_eager"))
    assert error(params, CFG, ops, draw(CFG), remat) < 1e-6


@pytest.mark.parametrize(("depths", "remat"), [((1, 1), "none"), ((3, 5), "none"), ((2, 3), "selective")])
def test_a_kind_is_compiled_once_however_deep_the_model_and_for_any_resolution_after_the_second(depths, remat):
    cfg = dataclasses.replace(CFG, depth=depths[0], depth_single_blocks=depths[1])
    params, ops, counts = flux.init(cfg, scheme="nonzero"), Ops(wrap_stage=compiled.stages(backend="aot_eager")), []
    for height, width in ((4, 6), (4, 6), (6, 6), (8, 6), (4, 12)):
        assert error(params, cfg, ops, draw(cfg, height, width), remat) < 1e-6
        counts.append(counters["stats"]["unique_graphs"])
    # Stem, double block, single block, the last of those, head. Where each stage runs twice, that is two ways; and
    # without gradients what the stem gives is a view, what a block gives is none, which makes two of the double blocks'
    # second one.
    once, more = 4 + (depths[1] > 1), 0
    if remat != "none":
        once, more = 2 * once, 1
    assert counts == [once, once, *[2 * once + more] * 3]


def test_two_models_and_two_ways_of_doing_linears_do_not_meet():
    small = dataclasses.replace(CFG, depth=0, depth_single_blocks=1)
    other = dataclasses.replace(small, num_heads=4, axes_dim=(8, 12, 12))
    wrap_stage = compiled.stages(backend="aot_eager")

    def twice(params, x, path):
        del path
        return 2 * torch.nn.functional.linear(x, params["weight"], params["bias"])

    for cfg in (small, other):
        params, batch = flux.init(cfg, scheme="nonzero"), draw(cfg)
        for linear in (Ops.linear, twice):
            ops = Ops(linear=linear)
            expected, _ = fold.grad_and_value(params, cfg, batch, ops=ops)
            found, _ = fold.grad_and_value(params, cfg, batch, ops=dataclasses.replace(ops, wrap_stage=wrap_stage))
            for one, grad in zip(tree.leaves(found), tree.leaves(expected), strict=True):
                assert (one - grad).norm() <= 1e-6 * grad.norm()


def test_inductor_gives_the_same_to_rounding():
    cfg = dataclasses.replace(CFG, depth=0, depth_single_blocks=1, hidden_size=32, num_heads=2, axes_dim=(4, 6, 6))
    params = tree.map(torch.Tensor.double, flux.init(cfg, scheme="nonzero"))
    batch = {name: value.double() for name, value in draw(cfg).items()}
    # One kind alone: each takes its half minute.
    wrap_stage = compiled.stages()
    ops = Ops(wrap_stage=lambda fn, stage: wrap_stage(fn, stage) if stage.kind == "last_block" else fn)
    assert error(params, cfg, ops, batch) < 1e-12


def test_what_cannot_be_compiled_whole_is_an_error():
    def printing(params, x, path):
        torch._dynamo.graph_break()
        return Ops.linear(params, x, path)

    params, ops = flux.init(CFG), Ops(linear=printing, wrap_stage=compiled.stages(backend="aot_eager"))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        fold.grad_and_value(params, CFG, draw(CFG), ops=ops)
