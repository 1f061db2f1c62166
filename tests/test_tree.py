"""Dotted paths: flatten and unflatten are inverse, patterns match whole paths, misuse is named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import tree

KEYS = st.text("abcxyz_012", min_size=1, max_size=5)
LEAVES = st.integers()
SUBTREES = st.recursive(LEAVES, lambda children: st.dictionaries(KEYS, children, min_size=1, max_size=3), max_leaves=6)
TREES = st.dictionaries(KEYS, SUBTREES, min_size=1, max_size=3).flatmap(
    lambda rest: st.lists(st.dictionaries(KEYS, LEAVES, min_size=1, max_size=2), min_size=1, max_size=12).map(
        lambda blocks: {**rest, "double_blocks": blocks}
    )
)


@given(TREES)
@settings(max_examples=50, deadline=None)
def test_unflatten_is_the_inverse_of_flatten(nested):
    flat = tree.flatten(nested)
    assert tree.unflatten(flat) == nested
    assert tree.unflatten(dict(reversed(flat.items()))) == nested
    assert list(flat.values()) == tree.leaves(nested)


def test_paths_are_keys_joined_by_dots():
    nested = {"double_blocks": [{"img_mlp": {"0": 1, "2": 2}}], "img_in": {"bias": 3}}
    assert tree.flatten(nested) == {
        "double_blocks.0.img_mlp.0": 1,
        "double_blocks.0.img_mlp.2": 2,
        "img_in.bias": 3,
    }


def test_map_takes_leaves_of_the_same_place():
    assert tree.map(lambda a, b: a - b, {"a": [3, 4]}, {"a": [1, 1]}) == {"a": [2, 3]}
    with pytest.raises(ValueError):
        tree.map(lambda a, b: a, {"a": 1}, {"b": 1})


@pytest.mark.parametrize("flat", [{"a": 1, "a.b": 2}, {"a.b": 1, "a": 2}, {"double_blocks.0": 1, "double_blocks.2": 1}])
def test_unflatten_refuses_what_is_no_tree(flat):
    with pytest.raises(ValueError, match="tree path"):
        tree.unflatten(flat)


def test_first_matching_pattern_wins():
    assert tree.match(["*.bias", "img_in.*"], "img_in.bias") == "*.bias"
    assert tree.match(["*.bias", "img_in.*"], "img_in.weight") == "img_in.*"
    assert tree.match(["img_in"], "img_in.weight") is None


def test_select_lists_the_nearest_paths_of_a_pattern_that_fits_none():
    nested = {"img_in": {"weight": 1, "bias": 2}, "txt_in": {"weight": 3}}
    assert tree.select(nested, ["*.weight"]) == {"img_in.weight": 1, "txt_in.weight": 3}
    with pytest.raises(ValueError, match="img_in.weight"):
        tree.select(nested, ["img_inn.weight"])


FLUX = tree.unflatten(
    {
        **{f"double_blocks.{i}.{s}_attn.qkv.weight": 0 for i in range(2) for s in ("img", "txt")},
        **{f"single_blocks.{i}.linear{j}.weight": 0 for i in range(2) for j in (1, 2)},
        **{f"{name}_in.{leaf}": 0 for name in ("img", "txt") for leaf in ("weight", "bias")},
    }
)


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*_atn.*", ["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.txt_attn.qkv.weight"]),
        ("transformer_blocks.*", ["single_blocks.0.linear1.weight", "double_blocks.0.img_attn.qkv.weight"]),
        ("double_block.1.txt_attn*", ["double_blocks.1.txt_attn.qkv.weight"]),
        ("*.linear3.weight", ["single_blocks.0.linear1.weight", "single_blocks.0.linear2.weight"]),
        ("img_in.wieght", ["img_in.weight"]),
    ],
)
def test_the_nearest_paths_are_those_with_the_patterns_words(pattern, near):
    with pytest.raises(ValueError) as error:
        tree.select(FLUX, ["*", pattern])
    said = str(error.value)
    assert said.startswith(f"pattern {pattern!r} fits no path of the tree; the nearest are {', '.join(near)}")
    assert said.count(", ") <= 2


def test_no_pattern_and_no_path_are_said():
    for patterns in ([], (), iter(())):
        with pytest.raises(ValueError, match="patterns is empty, it should be a list of patterns"):
            tree.select(FLUX, patterns)
    with pytest.raises(ValueError) as error:
        tree.select({"double_blocks": []}, ["*"], " (of a note)")
    assert str(error.value) == "pattern '*' fits no path of the tree, there is none (of a note)"


def test_replaced_leaves_are_those_of_the_paths():
    nested = {"b": 1, "a": [2, {"c": 3}]}
    found = tree.replace(nested, {"a.1.c": 4, "b": 5})
    assert found == {"b": 5, "a": [2, {"c": 4}]} and list(found) == ["b", "a"]
    assert nested == {"b": 1, "a": [2, {"c": 3}]}


def test_one_pattern_is_given_in_a_list():
    with pytest.raises(ValueError, match=r"patterns is '\*.weight', it should be a list of patterns: \['\*.weight'\]"):
        tree.select({"img_in": {"weight": 1}}, "*.weight")


def test_differences_are_listed_with_the_nearest_name():
    expected = {"img_in.weight": (4, 2), "img_in.bias": (4,), "txt_in.weight": (4, 3)}
    assert tree.differences(expected, expected) == ""
    found = {"img_in.weight": (2, 4), "img_in.bais": (4,), "txt_in.weight": (4, 3)}
    assert tree.differences(found, expected) == (
        "3 tensors: missing img_in.bias (nearest: img_in.bais); not expected img_in.bais (nearest: img_in.bias); "
        "img_in.weight is [2, 4] and should be [4, 2]"
    )
    assert tree.differences({"img_in.weight": [4, 2], "img_in.bias": (4,)}, expected) == (
        "1 tensor: missing txt_in.weight (nearest: img_in.weight)"
    )


class Leaf:
    """Something with a shape."""

    def __init__(self, *shape):
        self.shape = shape


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"b": Leaf(), "a": {"c": [Leaf(2)]}}, ""),
        ({"b": Leaf(), "a": {"c": [Leaf(3)]}}, "1 tensor: a.c.0 is [3] and should be [2]"),
        ({"b": Leaf(), "a": {"c": []}}, "1 tensor: missing a.c.0"),
        (
            {"b": Leaf(), "a": {"c": (Leaf(2),)}},
            "the leaves are the same, but a.c is (*,) and should be [*]",
        ),
        (
            {"b": Leaf(), "a": {"c": [Leaf(2)], "d": {}}},
            "the leaves are the same, but a is {'c': *, 'd': *} and should be {'c': *}",
        ),
        (
            {"b": Leaf(), "a.c": [Leaf(2)]},
            "the leaves are the same, but the top is {'a.c': *, 'b': *} and should be {'a': *, 'b': *}",
        ),
    ],
)
def test_a_misfit_is_told_in_paths_and_shapes_or_else_in_structure(found, says):
    assert tree.misfit(found, {"a": {"c": [Leaf(2)]}, "b": Leaf()}) == says


def test_a_misfit_of_a_single_leaf_has_a_name_and_of_many_keys_is_short():
    assert tree.misfit(Leaf(2), Leaf(3)) == "1 tensor: it is [2] and should be [3]"
    nested = {"top": {f"key_{i}": Leaf() for i in range(100)}}
    said = tree.misfit(tree.flatten(nested), nested)
    assert said.startswith("the leaves are the same, but the top is {'top.key_0': *, ") and len(said) < 250


@given(st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=20, deadline=None)
def test_differences_are_all_counted_and_twenty_listed(missing, surplus):
    found, expected = {f"a{i}": () for i in range(surplus)}, {f"b{i}": () for i in range(missing)}
    said = tree.differences(found | {"same": (1,)}, expected | {"same": (1,)})
    if missing + surplus == 0:
        assert said == ""
    else:
        assert said.startswith(f"{missing + surplus} tensor") and said.count("; ") < 21
        assert (f"and {missing + surplus - 20} more" in said) == (missing + surplus > 20)


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [({}, []), ({"a": 100}, [["a"]]), ({"a": 4, "b": 6, "c": 1, "d": 30, "e": 2}, [["a", "b"], ["c"], ["d"], ["e"]])],
)
def test_bundles_hold_the_limit_or_one_leaf(sizes, groups):
    assert tree.bundles(sizes, 10) == groups


@given(st.lists(st.integers(0, 12), max_size=12), st.integers(1, 20))
def test_bundles_hold_every_path_once_in_order_and_no_more_than_they_may(sizes, most):
    named = {f"leaf.{i}": size for i, size in enumerate(sizes)}
    found = tree.bundles(named, most)
    assert [path for bundle in found for path in bundle] == list(named)
    assert all(len(bundle) == 1 or sum(named[path] for path in bundle) <= most for bundle in found)
