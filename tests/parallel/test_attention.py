"""Attention over a split sequence is attention over the whole, for every kind, with its gradients."""

import functools
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func.errors import UserError
from flux_func.models import layers
from flux_func.parallel import attention, mesh
from tests.helpers import rank_attention, ranks

LENGTHS = ((4, 8), (12, 4), (4, 32))
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
WHOLE = (("all_gather", -1), ("ulysses", -1), ("ring", -1))
KINDS = {2: WHOLE, 4: (*WHOLE, ("ulysses", 2), ("ulysses", 1))}


@functools.cache
def found(world):
    """Every rank's results for all cases: one start of the ranks."""
    cases = [(*kind, lengths, dtype) for kind, lengths, dtype in itertools.product(KINDS[world], LENGTHS, DTYPES)]
    by_rank = ranks.run(world, rank_attention.results, cases)
    joined = {}
    for case, shares in zip(cases, zip(*by_rank, strict=True), strict=True):
        parts = zip(*shares, strict=True)
        joined[case] = [rank_attention.whole([torch.from_numpy(x) for x in part], case[2]) for part in parts]
    return joined


def relative(x, expected):
    return ((x - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("world", [2, 4])
def test_output_and_gradients_are_those_of_the_whole_sequence(world):
    limits = {torch.float64: 1e-14, torch.float32: 1e-6}
    for case, result in found(world).items():
        lengths, dtype = case[2:]
        if dtype in limits:
            expected = rank_attention.plain(*rank_attention.draw(lengths))
            for got, want in zip(result, expected, strict=True):
                assert relative(got, want) <= limits[dtype], case


@pytest.mark.parametrize("world", [2, 4])
def test_bfloat16_is_as_near_as_its_own_attention(world):
    for case, result in found(world).items():
        lengths, dtype = case[2:]
        if dtype == torch.bfloat16:
            *qkv, cotangent = rank_attention.draw(lengths, dtype)
            exact = rank_attention.plain(*(x.double() for x in (*qkv, cotangent)))
            leaves = [x.requires_grad_() for x in qkv]
            out = rank_attention.split(layers.attention(*leaves))
            own = [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]
            for got, theirs, want in zip(result, own, exact, strict=True):
                # A part's gradients are rounded before they are added to the other ranks'.
                assert relative(got, want) <= 2 * relative(theirs.double(), want), case


@pytest.mark.parametrize("rows", [1, 128])
def test_a_device_without_kernels_has_the_same_numbers(rows):
    shares = zip(*ranks.run(2, rank_attention.products, rows), strict=True)
    expected = rank_attention.plain(*rank_attention.draw((4, 12)))
    for share, want in zip(shares, expected, strict=True):
        got = rank_attention.whole([torch.from_numpy(x) for x in share], (4, 12))
        assert relative(got, want) <= 1e-14


def test_transforms_and_compilation_give_the_same_derivatives_or_say_that_there_are_none():
    for by_case in ranks.run(2, rank_attention.transforms, WHOLE):
        for case, errors in by_case.items():
            refused = errors.pop("refused", [])
            assert max(errors.values()) <= 1e-12, (case, errors)
            missing = ("forward mode (jvp)", "vmap", "a second derivative") if case[0] == "ring" else ()
            for line, what in zip(refused, missing, strict=True):
                assert line == f"ring attention has no {what}; parallel.attention 'all_gather' and 'ulysses' have"


def sent_bytes(kind, ulysses, size, dtype):
    """{kind of collective: bytes} that each of 4 processes sends for one attention, forward and backward, by hand.

    `size` are the numbers of q on a process; k and v have as many. Gradients go round a ring in float32 at least.
    """
    one, wide = size * dtype.itemsize, size * max(dtype.itemsize, 4)
    if kind == "all_gather":
        return {"all_gather": 2 * one * 3}, {"reduce_scatter": 2 * one * 3}
    degree = 1 if kind == "ring" else 4 if ulysses == -1 else ulysses
    heads, ring = 4 * one * (degree - 1) / degree, 4 // degree
    there = {"all_to_all": heads, "permute": 2 * one * (ring - 1)}
    back = {"all_to_all": heads, "permute": 2 * one * (ring - 1) + (2 * wide * ring if ring > 1 else 0)}
    return tuple({name: sent for name, sent in way.items() if sent} for way in (there, back))


def test_bytes_are_those_counted_at_the_collectives():
    lengths = (4, 8)
    cases = [(*kind, lengths, dtype) for kind, dtype in itertools.product(KINDS[4], (torch.float32, torch.bfloat16))]
    size = 2 * rank_attention.HEADS * sum(lengths) // 4 * rank_attention.HEAD
    for found in ranks.run(4, rank_attention.counted, cases):
        for (kind, ulysses, _, dtype), counted in zip(cases, found, strict=True):
            assert counted == sent_bytes(kind, ulysses, size, dtype)


def test_one_process_on_the_axis_has_plain_attention():
    assert attention.context_attention("ring", mesh.ONE, 8) is layers.attention


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 24), st.integers(1, 24), st.integers(1, 24))
@settings(max_examples=200, deadline=None)
def test_what_the_check_lets_pass_divides_and_the_degrees_that_it_names_do(context, ulysses, heads, text, image):
    try:
        attention.check("ulysses", context, ulysses, heads, text, image)
    except UserError as error:
        line = str(error)
        assert text % context or image % context or heads % ulysses or context % ulysses
        named = [int(n) for n in re.search(r": ([\d, ]+)( \(|$)", line)[1].split(", ")]
        if line.startswith("parallel.context"):
            assert named == [n for n in range(1, 25) if text % n == image % n == 0]
        else:
            assert named == [n for n in range(1, 25) if heads % n == context % n == 0]
    else:
        assert text % context == image % context == heads % ulysses == context % ulysses == 0


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ("all_gather", 3, -1, 8, 12, 16),
            "parallel.context is 3: does not divide the 16 tokens that data.image_size comes to; "
            "degrees that divide text and image: 1, 2, 4",
        ),
        (
            ("ring", 4, -1, 8, 77, 256),
            "parallel.context is 4: does not divide the 77 tokens that text.max_length comes to; "
            "degrees that divide text and image: 1",
        ),
        (
            ("ulysses", 16, -1, 24, 512, 4096),
            "parallel.ulysses is -1 (all of parallel.context): 16 should divide the 24 heads and parallel.context=16; "
            "degrees that do: 1, 2, 4, 8 (a ring goes over the rest)",
        ),
        (("flash", 2, -1, 8, 4, 4), "parallel.attention is 'flash': should be one of all_gather, ulysses, ring"),
    ],
)
def test_what_does_not_divide_is_said_with_what_would(args, line):
    with pytest.raises(UserError) as caught:
        attention.check(*args)
    assert str(caught.value) == line
