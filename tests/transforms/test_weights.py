"""Arithmetic on models against closed forms, ensembles and frozen parts against the models by themselves."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import tree
from flux_func.flow import path
from flux_func.models import flux
from flux_func.train import optimizer
from flux_func.transforms import ema, lora, weights
from tests.helpers import tiny_model
from tests.helpers.tiny_model import DEEPER


def draw(seed, dtype=torch.float64):
    """A tree with lists of another name than FLUX's, and an empty one."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    return {"layers": [{"w": normal(3, 2), "b": normal(3)}, {"w": normal(2, 3)}], "empty": [], "scale": normal()}


def assert_same(ours, theirs, **bounds):
    ours, theirs = tree.flatten(ours), tree.flatten(theirs)
    assert list(ours) == list(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], **bounds)


# Between checkpoints.


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_soup_is_the_weighted_mean(shares):
    trees = [draw(seed) for seed in range(len(shares))]
    soup = weights.soup(trees, shares)
    stacked = [np.stack([leaf.numpy() for leaf in leaves]) for leaves in zip(*map(tree.leaves, trees), strict=True)]
    for leaf, values in zip(tree.leaves(soup), stacked, strict=True):
        np.testing.assert_allclose(leaf.numpy(), np.average(values, axis=0, weights=shares), rtol=1e-12, atol=1e-12)
    assert soup["empty"] == []


def test_soup_without_weights_is_the_mean_in_the_leafs_type_summed_in_float32():
    trees = [{"w": torch.full((2,), value, dtype=torch.bfloat16)} for value in (1.0, 2.0**-8, 2.0**-8)]
    # In bfloat16 the small ones would be lost one by one.
    expected = torch.tensor((1 + 2.0**-7) / 3).to(torch.bfloat16).expand(2)
    assert torch.equal(weights.soup(trees)["w"], expected)


def test_a_soup_is_differentiable_in_its_weights():
    trees, shares = [draw(seed) for seed in range(3)], torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)

    def value(shares):
        return sum(leaf.square().sum() for leaf in tree.leaves(weights.soup(trees, shares)))

    grad = torch.func.grad(value)(shares)
    for i in range(3):
        h = torch.eye(3, dtype=torch.float64)[i] * 1e-6
        assert grad[i].item() == pytest.approx(((value(shares + h) - value(shares - h)) / 2e-6).item(), rel=1e-7)


@given(st.floats(-1, 2))
@settings(max_examples=15, deadline=None)
def test_lerp_is_on_the_line(weight):
    start, end = draw(0), draw(1)
    expected = tree.map(lambda a, b: a + weight * (b - a), start, end)
    assert_same(weights.lerp(start, end, weight), expected, rtol=1e-12, atol=1e-12)


def test_lerp_has_both_ends_exactly():
    start, end = draw(0, torch.float32), draw(1, torch.float32)
    assert_same(weights.lerp(start, end, 0), start, rtol=0, atol=0)
    assert_same(weights.lerp(start, end, 1), end, rtol=0, atol=0)


@given(st.floats(0, 1), st.floats(1e-9, 3.0))
@settings(max_examples=25, deadline=None)
def test_slerp_turns_by_its_share_of_the_angle(weight, angle):
    start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    end = torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=torch.float64)
    turned = weights.slerp({"w": 2 * start}, {"w": 2 * end}, weight)["w"]
    expected = [2 * math.cos(weight * angle), 2 * math.sin(weight * angle), 0.0]
    np.testing.assert_allclose(turned.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["zero", "opposite", "same"])
def test_slerp_is_lerp_where_there_is_no_plane_to_turn_in(case):
    start = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    end = {"w": {"zero": torch.zeros(2, 2), "opposite": -start["w"], "same": start["w"].clone()}[case]}
    assert_same(weights.slerp(start, end, 0.25), weights.lerp(start, end, 0.25))


# Task arithmetic.


def test_a_task_added_is_the_finetuned_model_and_taken_away_the_base():
    base, tuned, other = draw(0), draw(1), draw(2)
    vector, second = weights.task_vector(tuned, base), weights.task_vector(other, base)
    assert_same(weights.add_tasks(base, [vector]), tuned)
    assert_same(weights.add_tasks(tuned, [weights.negate(vector)]), base)
    both = weights.add_tasks(base, [vector, second], [0.5, -2.0])
    assert_same(both, tree.map(lambda b, x, y: b + 0.5 * (x - b) - 2 * (y - b), base, tuned, other))
    assert_same(weights.add_tasks(base, []), base)


@pytest.mark.parametrize(
    "merge",
    [
        lambda one, other: weights.soup([one, other]),
        lambda one, other: weights.lerp(one, other, 0.5),
        lambda one, other: weights.slerp(one, other, 0.5),
        lambda one, other: weights.task_vector(other, one),
        lambda one, other: weights.add_tasks(one, [other]),
        lambda one, other: weights.stack([one, other]),
    ],
)
def test_models_that_differ_are_refused_by_name(merge):
    one = flux.abstract(DEEPER)
    with pytest.raises(ValueError, match=r"tree 1 is not like tree 0: .*missing single_blocks.1.linear1.bias"):
        merge(one, flux.abstract(dataclasses.replace(DEEPER, depth_single_blocks=1)))
    with pytest.raises(ValueError, match=r"txt_in.weight is \[32, 20\] and should be \[32, 16\]"):
        merge(one, flux.abstract(dataclasses.replace(DEEPER, context_in_dim=20)))


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="soup: 1 weights for 2 trees"):
        weights.soup([draw(0), draw(1)], [1.0])
    with pytest.raises(ValueError, match=r"weights \[1.0, -1.0\] add up to 0"):
        weights.soup([draw(0), draw(1)], [1.0, -1.0])
    with pytest.raises(ValueError, match="soup: no trees"):
        weights.soup([])
    with pytest.raises(ValueError, match="add_tasks: 2 weights for 1 trees"):
        weights.add_tasks(draw(0), [draw(1)], [1.0, 1.0])


@pytest.mark.parametrize("merge", [weights.lerp, weights.slerp])
def test_one_weight_is_no_more_than_a_number(merge):
    with pytest.raises(ValueError, match=r"weight is a tensor \[2\]: should be a number or a scalar tensor"):
        merge(draw(0), draw(1), torch.ones(2))


def test_weights_of_other_shapes_are_refused():
    trees = [{"w": torch.ones(2, 2)}, {"w": torch.zeros(2, 2)}]
    for merge in (weights.soup, lambda trees, shares: weights.add_tasks(trees[0], trees, shares)):
        with pytest.raises(ValueError, match=r"weights is \[2, 2\], it should be \[2\]: one for each tree"):
            merge(trees, torch.ones(2, 2))
        with pytest.raises(ValueError, match=r"weight 1 is a tensor \[2\]: should be a number or a scalar"):
            merge(trees, [1.0, torch.ones(2)])


def test_one_tree_in_the_place_of_a_list_is_refused():
    one = draw(0)
    for merge in (weights.soup, weights.stack, lambda vector: weights.add_tasks(one, vector)):
        with pytest.raises(ValueError, match="the trees are a dict, they should be in a list"):
            merge(one)


def test_trees_of_the_same_leaves_built_in_another_way_are_refused():
    nested, flat = {"a": {"b": torch.ones(2)}}, {"a.b": torch.ones(2)}
    with pytest.raises(ValueError, match=r"tree 1 is not like tree 0: .* the top is \{'a.b': \*\} and should be"):
        weights.soup([nested, flat])
    adapters = [lora.init({"layer": {"weight": torch.ones(3, 2)}}, ["*"], rank=1, alpha=alpha) for alpha in (2, 3)]
    with pytest.raises(ValueError, match=r"layer is \S*LowRank\[3.0\], .* and should be \S*LowRank\[2.0\]"):
        weights.soup(adapters)


# Ensembles.


def test_an_ensemble_under_vmap_is_its_models_one_by_one():
    models = [tiny_model.params(DEEPER, seed) for seed in range(3)]
    batch, stacked = tiny_model.batch(), weights.stack(models)
    grads, values = torch.func.vmap(torch.func.grad_and_value(path.loss), in_dims=(0, None, None))(
        stacked, DEEPER, batch
    )
    for model, grad, value in zip(models, weights.unstack(grads), values, strict=True):
        expected, loss = torch.func.grad_and_value(path.loss)(model, DEEPER, batch)
        torch.testing.assert_close(value, loss)
        assert_same(grad, expected)


def test_unstack_undoes_stack():
    trees = [draw(seed) for seed in range(3)]
    for one, again in zip(trees, weights.unstack(weights.stack(trees)), strict=True):
        assert_same(again, one, rtol=0, atol=0)
        assert again["empty"] == []


def test_what_is_no_stack_is_refused():
    with pytest.raises(ValueError, match="b has a first axis of 3, it should have a first axis of 2 as a"):
        weights.unstack({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match="b has no axis, it should have a first axis of 2 as a"):
        weights.unstack({"a": torch.zeros(2), "b": torch.zeros(())})


# Freezing.


def test_a_loss_of_the_trained_part_has_the_gradients_of_the_whole():
    params, batch = tiny_model.params(DEEPER), tiny_model.batch()
    patterns = ("double_blocks.*_mod.*", "single_blocks.1.*")
    trained, frozen = weights.partition(params, patterns)
    assert list(tree.flatten(trained)) == list(tree.select(params, patterns))
    assert not set(tree.flatten(trained)) & set(tree.flatten(frozen))

    def loss(part):
        return path.loss(weights.combine(part, frozen), DEEPER, batch)

    assert_same(weights.combine(trained, frozen), params, rtol=0, atol=0)
    expected = tree.select(torch.func.grad(path.loss)(params, DEEPER, batch), patterns)
    grads = torch.func.grad(loss)(trained)
    assert_same(grads, expected)
    # Forward over reverse, and per sample: holes are no obstacle to any of torch.func.
    product = torch.func.jvp(torch.func.grad(loss), (trained,), (grads,))[1]
    assert list(tree.flatten(product)) == list(expected)


def test_an_optimizer_and_an_average_of_the_trained_part_are_of_it_alone():
    params = flux.init(DEEPER, scheme="nonzero")
    before = tree.map(torch.clone, params)
    trained, frozen = weights.partition(params, ["single_blocks.*"])
    adamw = optimizer.adamw(lr=0.1)
    state, average = adamw.init(trained), tree.map(torch.clone, trained)
    assert not any("img_in" in name for name in tree.flatten(state))
    trained, state = adamw.update(tree.map(torch.ones_like, trained), state, trained)
    ema.update(average, trained, 0.5)
    after = tree.flatten(weights.combine(trained, frozen))
    for name, leaf in tree.flatten(before).items():
        assert torch.equal(after[name], leaf) == (not name.startswith("single_blocks")), name


def test_partition_keeps_any_structure():
    params = draw(0)
    trained, frozen = weights.partition(params, ["layers.*.w"])
    assert tree.flatten(trained).keys() == {"layers.0.w", "layers.1.w"}
    assert weights.combine(frozen, trained)["empty"] == []
    assert_same(weights.combine(frozen, trained), params, rtol=0, atol=0)


def test_parts_that_are_none_are_refused():
    params = draw(0)
    trained, frozen = weights.partition(params, ["scale"])
    with pytest.raises(ValueError, match="scale is in both parts"):
        weights.combine(trained, params)
    with pytest.raises(ValueError, match="layers.0.b is in neither part"):
        weights.combine(trained, trained)
    with pytest.raises(ValueError, match="pattern 'scales' fits no path of the tree; the nearest are scale"):
        weights.partition(params, ["scales"])
    with pytest.raises(ValueError, match="patterns is empty"):
        weights.partition(params, [])
    _, other = weights.partition({**params, "layers": params["layers"][:1]}, ["scale"])
    with pytest.raises(ValueError) as error:
        weights.combine(trained, other)
    assert str(error.value).startswith("combine: frozen is not like trained: 1 tensor: missing layers.1.w")
    with pytest.raises(ValueError, match="frozen is not like trained: the leaves are the same, but the top is"):
        weights.combine(trained, {**frozen, "more": []})


# Summaries.


def test_summary_is_numpys_of_all_leaves_of_a_group():
    params = flux.init(DEEPER, scheme="nonzero")
    params["img_in"]["bias"] = torch.tensor([0.0] * 8 + [3.0] * 22 + [math.inf, math.nan])
    rows = {row.name: row for row in weights.summarize(params)}
    one = rows["double_blocks.*.img_mlp.0.weight"]
    values = np.stack([block["img_mlp"]["0"]["weight"].numpy().astype(np.float64) for block in params["double_blocks"]])
    assert (one.shape, one.leaves, one.count) == ((128, 32), 2, values.size)
    expected = (values.mean(), values.std(), np.sqrt((values**2).mean()), np.abs(values).max())
    np.testing.assert_allclose((one.mean, one.std, one.rms, one.max_abs), expected, rtol=1e-12)
    bias = rows["img_in.bias"]
    assert (bias.zeros, bias.nonfinite) == (8 / 32, 2 / 32)
    assert (bias.mean, bias.max_abs) == (pytest.approx(66 / 30), 3.0)
    flat = tree.flatten(params)
    assert rows["*"].count == sum(leaf.numel() for leaf in flat.values()) and rows["*"].leaves == len(flat)
    apart = weights.summarize(params, group=False)
    assert [row.name for row in apart] == [*flat, "*"]


def test_a_summarys_names_are_patterns_of_their_leaves():
    params = flux.init(DEEPER)
    for row in weights.summarize(params)[:-1]:
        chosen = tree.select(params, [row.name])
        assert len(chosen) == row.leaves and sum(leaf.numel() for leaf in chosen.values()) == row.count


def test_table_is_aligned():
    params = {"a": torch.zeros(1000, 3), "long_name": torch.ones(2, dtype=torch.bfloat16), "none": torch.zeros(0)}
    lines = weights.table(weights.summarize(params)).splitlines()
    assert len({len(line) for line in lines}) == 1
    words = [" ".join(line.split()) for line in lines]
    assert words[:4] == [
        "leaves shape count mean std rms max|x| zeros nonfinite",
        "a [1000, 3] 3,000 0 0 0 0 100.0% 0.0%",
        "long_name [2] 2 1 0 1 1 0.0% 0.0%",
        "none [0] 0 nan nan nan 0 0.0% 0.0%",
    ]
    assert words[4].startswith("* (x3) 3,002 ")


def test_a_summary_of_no_values_is_refused():
    with pytest.raises(ValueError, match="double_blocks.0.img_attn.norm.key_norm.scale is on the meta device"):
        weights.summarize(flux.abstract(DEEPER))
    with pytest.raises(ValueError, match="no leaves"):
        weights.summarize({})
