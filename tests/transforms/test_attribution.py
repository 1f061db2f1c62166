"""Attribution against gradients and derivatives taken one by one, and attention against its definition."""

import functools

import pytest
import torch

from flux_func import tree
from flux_func.flow import losses, path
from flux_func.models import flux
from flux_func.models.layers import Ops
from flux_func.models.stages import bind
from flux_func.transforms import attribution, precision
from tests.helpers import tiny_model
from tests.helpers.tiny_model import DEEPER, NAIVE, either_attention

PARAMS = tiny_model.params(DEEPER)


def velocity(batch, **changed):
    """The model's velocity as patches, some of its inputs changed."""
    x, _ = tiny_model.on_path(batch)
    return flux.patchify(tiny_model.call(PARAMS, DEEPER, x, batch["timesteps"], {**batch, **changed}))


# Inputs.


def test_saliency_of_a_quadratic_is_known():
    x = torch.arange(6.0, dtype=torch.float64).view(3, 2)
    scale = torch.tensor([[1.0], [2.0], [-3.0]], dtype=torch.float64)

    def energy(inputs):
        return (scale * inputs["x"].square()).sum()

    # The gradient is 2 s x, and its product with x 2 s |x|^2.
    norms = attribution.saliency(energy, {"x": x})["x"]
    torch.testing.assert_close(norms, (2 * scale * x).norm(dim=-1))
    products = attribution.saliency(energy, {"x": x}, times_input=True)["x"]
    torch.testing.assert_close(products, 2 * (scale * x.square()).sum(dim=-1))
    # Of one output alone: its row of the Jacobian.
    row = attribution.saliency(lambda x: x.square().sum(dim=1), x, torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(row, torch.stack([torch.zeros(()), (2 * x[1]).norm(), torch.zeros(())]).double())


@either_attention
def test_token_saliency_is_the_gradient_of_each_samples_error(ops):
    batch = tiny_model.batch()
    marks = attribution.token_saliency(PARAMS, DEEPER, batch, ops)
    assert {name: tuple(mark.shape) for name, mark in marks.items()} == {"txt": (2, 3), "img": (2, 6), "y": (2,)}
    target = flux.patchify(batch["noise"] - batch["latents"])
    # One text token of one sample, by central differences of each of its elements.
    for sample, token in ((0, 1), (1, 2)):
        slopes = []
        for element in range(DEEPER.context_in_dim):
            step = torch.zeros_like(batch["txt"])
            step[sample, token, element] = 1e-5
            up, down = (
                (velocity(batch, txt=batch["txt"] + sign * step) - target).square().sum((1, 2)) for sign in (1, -1)
            )
            difference = (up - down) / 2e-5
            assert difference[1 - sample] == 0
            slopes.append(difference[sample])
        torch.testing.assert_close(marks["txt"][sample, token], torch.stack(slopes).norm(), rtol=1e-6, atol=1e-9)


def test_token_saliency_of_a_region_is_of_its_velocity_alone():
    batch, region = tiny_model.batch(), torch.zeros(2, 16, 4, 6, dtype=torch.float64)
    region[:, :, :2, :2] = 1  # The first patch.
    marks = attribution.token_saliency(PARAMS, DEEPER, batch, region=region, times_input=True)
    y = batch["y"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(velocity(batch, y=y)[:, 0].sum(), y)
    torch.testing.assert_close(marks["y"], (grad * batch["y"]).sum(dim=-1))


def test_saliency_of_what_is_no_scalar_is_refused():
    def spread(x):
        return x.square()

    with pytest.raises(ValueError, match=r"spread returned a tensor \[3\], it should be a scalar"):
        attribution.saliency(spread, torch.ones(3))
    with pytest.raises(ValueError, match=r"cotangent does not fit: 1 tensor: it is \[2\] and should be \[3\]"):
        attribution.saliency(spread, torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="<lambda> returned a tuple"):
        attribution.saliency(lambda x: (x, x), torch.ones(()))


@pytest.mark.parametrize("shape", [(4, 6), (2, 16, 2, 6), (1, 16, 4, 6)])
def test_a_region_of_another_shape_than_the_latents_is_refused(shape):
    with pytest.raises(ValueError) as error:
        attribution.token_saliency(PARAMS, DEEPER, tiny_model.batch(), region=torch.ones(shape))
    assert str(error.value) == f"region is {list(shape)}: should be [2, 16, 4, 6], as the latents"


def test_trees_are_paired_by_their_keys_whatever_their_order_and_types():
    ab, ba = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}, {"b": torch.tensor(5.0), "a": torch.tensor(7.0)}
    wide = tree.map(torch.Tensor.double, ab)
    # The derivative of a^2 b along (7, 5): 2 a b 7 + a^2 5.
    square = lambda q: q["a"].square() * q["b"]  # noqa: E731
    for at in (ab, wide):
        value, change = attribution.sensitivity(square, at, ba)
        assert (value.item(), change.item()) == (12, 104)
        samples = {"x": torch.arange(3, dtype=at["a"].dtype)}
        found = attribution.gradient_products(lambda q, samples: samples["x"] * square(q), at, ba, samples)
        assert found.tolist() == [0, 104, 208] and found.dtype == at["a"].dtype
        # The cotangent of a is 7 and of b 5.
        marks = attribution.saliency(
            lambda q: {"a": q["a"].sum(), "b": q["b"].sum()}, tree.map(lambda x: x[None], at), ba
        )
        assert (marks["a"].item(), marks["b"].item()) == (7, 5)


def test_trees_built_in_another_way_are_refused():
    nested, flat = {"a": {"b": torch.ones(2)}}, {"a.b": torch.ones(2)}
    with pytest.raises(
        ValueError, match=r"direction does not fit: the leaves are the same, but the top is {'a.b': \*}"
    ):
        attribution.sensitivity(lambda q: q["a"]["b"], nested, flat)


@either_attention
def test_prompt_sensitivity_is_the_difference_quotient(ops):
    batch, other = tiny_model.batch(), tiny_model.batch(seed=1)
    direction = {name: other[name] - batch[name] for name in ("txt", "y")}
    value, change = attribution.prompt_sensitivity(PARAMS, DEEPER, batch, direction, ops)
    up, down = (
        velocity(batch, **{name: batch[name] + h * direction[name] for name in direction}) for h in (1e-5, -1e-5)
    )
    torch.testing.assert_close(value, flux.unpatchify(velocity(batch), 4, 6))
    torch.testing.assert_close(change, flux.unpatchify((up - down) / 2e-5, 4, 6), rtol=1e-6, atol=1e-8)


def test_directions_that_do_not_fit_are_refused():
    batch = tiny_model.batch()
    deeper = {**PARAMS, "double_blocks": 2 * PARAMS["double_blocks"]}
    for call in (
        lambda: attribution.token_saliency(deeper, DEEPER, batch),
        lambda: attribution.prompt_sensitivity(deeper, DEEPER, batch, {"y": batch["y"]}),
        lambda: attribution.attention_maps(deeper, DEEPER, batch, "double_blocks.0"),
    ):
        with pytest.raises(ValueError, match="params are of a model whose depth is"):
            call()
    with pytest.raises(ValueError, match=r"direction is of \['img'\], it should be of 'txt', 'y' or both"):
        attribution.prompt_sensitivity(PARAMS, DEEPER, batch, {"img": batch["txt"]})
    with pytest.raises(ValueError, match=r"direction does not fit: 1 tensor: txt is \[2, 2, 16\]"):
        attribution.prompt_sensitivity(PARAMS, DEEPER, batch, {"txt": batch["txt"][:, 1:]})


# Training samples.


@either_attention
@pytest.mark.parametrize("chunk", [None, 2])
def test_influence_is_the_sum_of_gradient_products(ops, chunk):
    checkpoints = [tiny_model.params(DEEPER, seed) for seed in (0, 1)]
    samples, query, rates = tiny_model.batch(3), tiny_model.batch(2, seed=1), (0.5, 2.0)
    each = functools.partial(lambda ops, params, part: losses.flow_matching(params, DEEPER, part, ops), ops)
    shares = attribution.influence(each, checkpoints, rates, samples, query, chunk)
    expected = torch.zeros(3, dtype=torch.float64)
    for params, rate in zip(checkpoints, rates, strict=True):
        asked = torch.func.grad(path.loss)(params, DEEPER, query)
        for i in range(3):
            one = {name: value[i : i + 1] for name, value in samples.items()}
            grads = torch.func.grad(path.loss)(params, DEEPER, one)
            expected[i] += rate * sum((g * q).sum() for g, q in zip(*map(tree.leaves, (grads, asked)), strict=True))
    torch.testing.assert_close(shares, expected)


def test_influence_predicts_what_a_step_on_a_sample_does_to_the_query():
    samples, query, rate = tiny_model.batch(3), tiny_model.batch(1, seed=1), 1e-7

    def each(params, part):
        return losses.flow_matching(params, DEEPER, part, NAIVE)

    shares = attribution.influence(each, [PARAMS], [rate], samples, query)
    before = path.loss(PARAMS, DEEPER, query, NAIVE)
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in samples.items()}
        grads = torch.func.grad(path.loss)(PARAMS, DEEPER, one, NAIVE)
        after = path.loss(tree.map(lambda p, g: p - rate * g, PARAMS, grads), DEEPER, query, NAIVE)
        torch.testing.assert_close(before - after, shares[i], rtol=1e-3, atol=1e-13)


def test_losses_that_are_not_one_a_sample_are_refused():
    def mean(params, part):
        return (params["w"] * part["x"]).mean()

    samples, params = {"x": torch.ones(3)}, {"w": torch.ones(())}
    with pytest.raises(ValueError, match=r"mean returned a tensor \[\], it should be a loss for each sample, \[3\]"):
        attribution.gradient_products(mean, params, params, samples)
    with pytest.raises(ValueError, match="1 rates for 2 checkpoints"):
        attribution.influence(mean, [params, params], [0.1], samples, samples)
    with pytest.raises(ValueError, match="direction does not fit: .*missing w"):
        attribution.gradient_products(mean, params, {"v": torch.ones(())}, samples)


def test_samples_and_chunks_that_cannot_be_are_refused():
    def each(params, part):
        return params["w"] * part["x"]

    some, none, params = {"x": torch.ones(3)}, {"x": torch.ones(0)}, {"w": torch.ones(())}
    for chunk in (0, -1):
        with pytest.raises(ValueError, match=f"chunk is {chunk}: should be a whole number from 1 on"):
            attribution.gradient_products(each, params, params, some, chunk)
        with pytest.raises(ValueError, match=f"chunk is {chunk}: should be a whole number from 1 on"):
            attribution.influence(each, [params], [1.0], some, some, chunk)
    for empty in (none, {}):
        with pytest.raises(ValueError, match="samples has the first dimensions"):
            attribution.gradient_products(each, params, params, empty)
        with pytest.raises(ValueError, match="samples has the first dimensions"):
            attribution.influence(each, [params], [1.0], empty, some)
        with pytest.raises(ValueError, match="query has the first dimensions"):
            attribution.influence(each, [params], [1.0], some, empty)


# Attention.


@pytest.mark.parametrize("stage", ["double_blocks.1", "single_blocks.0"])
def test_attention_maps_are_those_that_the_stage_computes_with(stage):
    batch, seen = tiny_model.batch(), []

    def attention(q, k, v):
        seen.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1))
        return tiny_model.attention(q, k, v)

    path.loss(PARAMS, DEEPER, batch, Ops(attention=attention))
    place = [found.name for found in flux.chain(DEEPER) if "blocks" in found.name].index(stage)
    maps = attribution.attention_maps(PARAMS, DEEPER, batch, stage)
    shapes = {(i, j): tuple(maps[i][j].shape) for i in maps for j in maps[i]}
    text, image = 3, 6
    assert shapes == {
        ("txt", "txt"): (2, 2, text, text),
        ("txt", "img"): (2, 2, text, image),
        ("img", "txt"): (2, 2, image, text),
        ("img", "img"): (2, 2, image, image),
    }
    whole = torch.cat([torch.cat(list(maps[i].values()), dim=3) for i in ("txt", "img")], dim=2)
    torch.testing.assert_close(whole, seen[place])
    torch.testing.assert_close(whole.sum(dim=-1), torch.ones(2, 2, text + image, dtype=torch.float64))


def test_stages_after_the_one_asked_are_not_computed():
    names = []

    def wrap_stage(fn, stage):
        names.append(stage.name)
        return fn

    attribution.attention_maps(PARAMS, DEEPER, tiny_model.batch(), "double_blocks.1", Ops(wrap_stage=wrap_stage))
    assert names == ["stem", "double_blocks.0", "double_blocks.1"]


def test_asking_a_stage_changes_nothing_else_of_it():
    stem, block, *_ = flux.chain(DEEPER)
    carry, const = path.inputs(DEEPER, tiny_model.batch())
    carry = bind(stem, Ops())(stem.select(PARAMS), carry, const)
    plain = bind(block, Ops())(block.select(PARAMS), carry, const)
    asked = bind(attribution.with_attention(block), Ops())(block.select(PARAMS), carry, const)
    assert set(asked) == {*plain, "attention"}
    for name, value in plain.items():
        assert torch.equal(asked[name], value)


def test_maps_come_out_of_wrapped_stages_and_can_be_differentiated():
    batch, params = tiny_model.batch(), tree.map(torch.Tensor.float, PARAMS)
    batch = {name: value.float() for name, value in batch.items()}
    half = attribution.attention_maps(
        params, DEEPER, batch, "double_blocks.0", Ops(wrap_stage=precision.compute_in(torch.bfloat16))
    )
    assert half["img"]["txt"].dtype == torch.float32
    whole = attribution.attention_maps(params, DEEPER, batch, "double_blocks.0")
    torch.testing.assert_close(half["img"]["txt"], whole["img"]["txt"], rtol=0, atol=2e-2)
    assert not torch.equal(half["img"]["txt"], whole["img"]["txt"])

    def on_text(txt):
        return attribution.attention_maps(PARAMS, DEEPER, {**tiny_model.batch(), "txt": txt}, "single_blocks.0")["img"][
            "txt"
        ].sum()

    txt, h = tiny_model.batch()["txt"], 1e-5
    direction = tiny_model.batch(seed=1)["txt"]
    slope = (torch.func.grad(on_text)(txt) * direction).sum()
    numeric = (on_text(txt + h * direction) - on_text(txt - h * direction)) / (2 * h)
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-8)


def test_a_stage_without_attention_lists_those_that_have_it():
    known = "double_blocks.0, double_blocks.1, single_blocks.0, single_blocks.1"
    for stage in ("head", "double_blocks.2"):
        with pytest.raises(ValueError, match=f"stage '{stage}' has no attention, it should be one of {known}"):
            attribution.attention_maps(PARAMS, DEEPER, tiny_model.batch(), stage)
