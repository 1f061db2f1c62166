"""Tables of rows: read from either side, by leaf, by tensor or by any rows, without a bit changed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func.interop.spans import layout, widest

# Our one leaf of 6 rows is the last two rows of q, then k, then the first row of q.
OURS = {"qkv": (6, 2), "bias": (3,)}
TABLE = layout(OURS, lambda path, shape: [("q", 1, 2), ("k", 0, 3), ("q", 0, 1)] if path == "qkv" else [("b", 0, 3)])
THEIRS = {"q": torch.arange(6.0).reshape(3, 2), "k": torch.arange(6.0, 12).reshape(3, 2), "b": torch.arange(3.0)}
QKV = torch.cat([THEIRS["q"][1:], THEIRS["k"], THEIRS["q"][:1]])


def read(name, first, last):
    return THEIRS[name][first:last]


def test_the_shapes_of_the_format_follow_from_the_rows():
    assert TABLE.theirs == {"q": (3, 2), "k": (3, 2), "b": (3,)}


def test_leaves_and_tensors_are_read_from_the_other_side():
    assert torch.equal(TABLE.leaf("qkv", read), QKV) and torch.equal(TABLE.leaf("bias", read), THEIRS["b"])
    ours = {"qkv": QKV, "bias": THEIRS["b"]}
    for name, tensor in THEIRS.items():
        assert torch.equal(TABLE.tensor(name, lambda path, first, last: ours[path][first:last]), tensor)


@given(st.integers(0, 6), st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_any_rows_of_a_leaf(start, stop):
    if start < stop:
        assert torch.equal(TABLE.rows("qkv", start, stop, read), QKV[start:stop])


def test_types_on_either_side():
    kinds = {"q": torch.bfloat16, "k": torch.float32, "b": torch.float16}
    assert TABLE.leaf_types(kinds) == {"qkv": torch.float32, "bias": torch.float16}
    assert TABLE.tensor_types({"qkv": torch.bfloat16, "bias": torch.float64}) == {
        "q": torch.bfloat16,
        "k": torch.bfloat16,
        "b": torch.float64,
    }


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("first", FLOATS)
@pytest.mark.parametrize("second", FLOATS)
def test_the_widest_type_holds_every_value_of_both(first, second):
    wide = widest([first, second, first])
    assert wide == widest([second, first])
    for dtype in (first, second):
        limits = torch.finfo(dtype)
        for value in (limits.max, limits.smallest_normal, 1 + limits.eps):
            exact = torch.tensor(value, dtype=torch.float64).to(dtype)
            assert torch.equal(exact.to(wide).to(torch.float64), exact.to(torch.float64))
