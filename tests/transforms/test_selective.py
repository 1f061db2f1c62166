"""What a recorded stage keeps is what its replay does not compute again."""

import dataclasses
import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flux_func.flow import path
from flux_func.models import flux
from flux_func.models.attention import attention
from flux_func.models.layers import Ops
from flux_func.models.stages import bind
from flux_func.parallel import fold
from flux_func.transforms import lora, selective
from flux_func.transforms.remat import keep

CFG = dataclasses.replace(flux.flavor("flux-tiny"), context_in_dim=16, vec_in_dim=8)
TEXT, TOKENS = 3, 3 + 6


def draw():
    draws = torch.Generator().manual_seed(0)
    shapes = {"latents": (2, 16, 4, 6), "noise": (2, 16, 4, 6), "txt": (2, 3, 16), "y": (2, 8)}
    drawn = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    return {**drawn, "timesteps": torch.rand(2, generator=draws)}


def operations(remat):
    params, batch = flux.init(CFG, scheme="nonzero"), draw()
    with FlopCounterMode(display=False) as counter:
        fold.grad_and_value(params, CFG, batch, remat=remat)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("kept", "ins", "outs"),
    [
        ("single_blocks.linear1", 1, 7),
        ("single_blocks.linear2", 5, 1),
        ("double_blocks.*_mlp.0", 1, 4),
        ("double_blocks.*_attn.qkv", 1, 3),
    ],
)
def test_a_kept_product_is_computed_once(kept, ins, outs):
    # Of text and image together: what there are for each alone are of as many tokens. Of the last block's second linear
    # there is the image's alone.
    width, depth = CFG.hidden_size, CFG.depth_single_blocks if "single" in kept else CFG.depth
    rows = depth * TOKENS - (TEXT if kept == "single_blocks.linear2" else 0)
    product = 2 * 2 * rows * ins * width * outs * width
    assert operations("full") - operations(keep(kept)) == product


def test_what_attention_keeps_is_its_output_and_the_sum():
    params, batch = flux.init(CFG, scheme="nonzero"), draw()
    carry, const = path.inputs(CFG, batch, None)
    ops, [stem, block] = selective.recording(Ops(), keep("attention")), path.chain(CFG)[:2]
    carry = bind(stem, ops)(stem.select(params), carry, const)
    assert carry.pop("kept") == []
    out = bind(block, ops)(block.select(params), carry, const)
    [(attended, total)] = out["kept"]
    assert attended.shape == (2, CFG.num_heads, TOKENS, CFG.hidden_size // CFG.num_heads)
    assert total.shape == (2, CFG.num_heads, TOKENS)
    doubled = {"kept": [(2 * attended, total)]}
    again = bind(block, selective.replaying(Ops(), keep("attention")))
    replayed = again(block.select(params), carry, const | doubled)
    assert (replayed["img"] - out["img"]).norm() > 0.01 * out["img"].norm()
    same = again(block.select(params), carry, const | {"kept": out["kept"]})
    assert all(torch.equal(same[name], out[name]) for name in carry)


def test_products_of_another_kind_are_refused_and_attention_is_not():
    ops = lora.with_updates()
    with pytest.raises(ValueError, match="remat keeps '\\*.linear1': of linears that are not plain"):
        selective.recording(ops, keep("attention", "*.linear1"))
    selective.recording(ops, keep("attention"))


def test_a_step_is_differentiated_through_by_torch_func_or_refused():
    params, batch = flux.init(CFG, scheme="nonzero", dtype=torch.float64), draw()
    batch = {name: value.double() for name, value in batch.items()}

    def norm(scale, remat):
        moved = {**params, "img_in": {name: scale * leaf for name, leaf in params["img_in"].items()}}
        grads, _ = fold.grad_and_value(moved, CFG, batch, remat=remat, vjp=torch.func.vjp)
        return grads["img_in"]["weight"].square().sum()

    slope = functools.partial(torch.func.grad(norm), torch.ones((), dtype=torch.float64))
    for remat in ("full", keep("*.linear1", "*_attn.proj")):
        torch.testing.assert_close(slope(remat), slope("none"), rtol=1e-12, atol=0)
    with pytest.raises(NotImplementedError, match="given its result has no second derivative"):
        slope("selective")


def test_attention_that_takes_no_tape_is_refused_where_it_is_to_be_kept():
    params, batch = flux.init(CFG, scheme="nonzero"), draw()

    def own(q, k, v):
        return attention(q, k, v)

    with pytest.raises(ValueError, match="remat keeps 'attention': own should take a tape"):
        fold.grad_and_value(params, CFG, batch, ops=Ops(attention=own), remat="selective")
    fold.grad_and_value(params, CFG, batch, ops=Ops(attention=own), remat=keep("*.linear1"))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("linear", "single_blocks.linear"),
        ("double_blocks.0.img_attn.qkv", "double_blocks.img_attn.qkv"),
        ("attn", "att"),
    ],
)
def test_what_no_stage_runs_is_refused_and_the_nearest_named(name, near):
    params, batch = flux.init(CFG, scheme="nonzero"), draw()
    with pytest.raises(ValueError, match=f"remat keeps '{name}', which fits nothing .* nearest are .*{near}"):
        fold.grad_and_value(params, CFG, batch, remat=keep("attention", name))
