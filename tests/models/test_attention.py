"""Attention's derivatives of every kind against torch's quadratic own, and against finite differences."""

import contextlib
import functools
import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flux_func.models import attention, kernels, layers
from tests.helpers.tiny_attention import ALL, blocks, draw, draw_qkv, gradient, loss, relative, sdpa

# Transforms of attention at `at` along `t` and `u`, each a triple of q, k and v.


def slope(attend, t):
    return lambda *at: jvp(functools.partial(loss, attend), at, t)[1]


def dot(attend, t):
    return lambda *at: sum((a * b).sum() for a, b in zip(gradient(attend)(*at), t, strict=True))


def tangent(attend, t):
    return lambda *at: jvp(attend, at, t)[1]


def moved(at, t, step):
    return tuple(x + step * a for x, a in zip(at, t, strict=True))


def batched(at, u):
    return tuple(torch.stack([a, a + b, b]) for a, b in zip(at, u, strict=True))


FORMS = {
    "value": lambda f, at, t, u: f(*at),
    "grad": lambda f, at, t, u: gradient(f)(*at),
    "jvp": lambda f, at, t, u: jvp(f, at, t),
    "jvp of one": lambda f, at, t, u: [
        jvp(functools.partial(lambda i, x: f(*at[:i], x, *at[i + 1 :]), i), (at[i],), (t[i],)) for i in ALL
    ],
    "jvp(grad)": lambda f, at, t, u: jvp(gradient(f), at, t),
    "jvp(grad) of one": lambda f, at, t, u: jvp(lambda k: gradient(f)(at[0], k, at[2]), at[1:2], t[1:2]),
    "grad(grad)": lambda f, at, t, u: grad(dot(f, t), ALL)(*at),
    "grad(jvp)": lambda f, at, t, u: grad(slope(f, t), ALL)(*at),
    "jvp(jvp)": lambda f, at, t, u: jvp(tangent(f, t), at, u),
    "hessian": lambda f, at, t, u: torch.func.hessian(lambda s: loss(f, *moved(at, t, s)))(draw()),
    "vmap": lambda f, at, t, u: vmap(f)(*batched(at, u)),
    "vmap(grad)": lambda f, at, t, u: vmap(gradient(f))(*batched(at, u)),
    "grad(vmap)": lambda f, at, t, u: gradient(lambda *at: vmap(f)(*at))(*batched(at, u)),
    "vmap(grad) of one": lambda f, at, t, u: vmap(gradient(f), (2, None, None), 1)(
        batched(at, u)[0].movedim(0, 2), *at[1:]
    ),
    "vmap(jvp)": lambda f, at, t, u: vmap(lambda *at: jvp(f, at, t))(*batched(at, u)),
    "vmap(jvp) over tangents": lambda f, at, t, u: vmap(lambda *t: jvp(f, at, t))(*batched(t, u)),
    "vmap(jvp(grad))": lambda f, at, t, u: vmap(lambda *at: jvp(gradient(f), at, t))(*batched(at, u)),
    "vmap(grad(grad))": lambda f, at, t, u: vmap(grad(dot(f, t), ALL))(*batched(at, u)),
    "vmap(grad(jvp))": lambda f, at, t, u: vmap(grad(slope(f, t), ALL))(*batched(at, u)),
    "vmap(jvp(jvp))": lambda f, at, t, u: vmap(lambda *at: jvp(tangent(f, t), at, u))(*batched(at, u)),
    "jvp(vmap(grad))": lambda f, at, t, u: jvp(vmap(gradient(f)), batched(at, u), batched(t, u)),
}


def assert_is_the_math(form, qkv, t, u, limit=1e-12):
    with sdpa_kernel(SDPBackend.MATH):
        expected = FORMS[form](sdpa, qkv, t, u)
    found = FORMS[form](attention.attention, qkv, t, u)
    assert all(a.dtype == b.dtype for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True))
    assert relative(found, expected) <= limit


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("length", "keys"), [(11, 11), (3, 14), (9, 2)])
def test_every_transform_is_that_of_the_math(form, length, keys):
    at, t, u = (draw_qkv(2, 3, length, keys, 6, seed=i) for i in ALL)
    with blocks(rows=4, scores=100):
        assert_is_the_math(form, at, t, u)


@pytest.mark.parametrize("form", ["grad", "jvp", "jvp(grad)", "grad(grad)", "grad(jvp)", "jvp(jvp)"])
def test_more_tokens_than_a_block_has(form):
    at, t, u = (draw_qkv(1, 2, kernels.ROWS * 2 + 5, kernels.ROWS + 1, 8, seed=i) for i in ALL)
    assert_is_the_math(form, at, t, u)


@given(
    st.sampled_from(sorted(FORMS)), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9),
    st.integers(1, 5), st.integers(1, 10), st.integers(1, 200), st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_shapes_and_blocks_do_not_matter(form, batch, heads, length, keys, size, rows, scores, seed):
    at, t, u = (draw_qkv(batch, heads, length, keys, size, seed=(seed, i)) for i in ALL)
    with blocks(rows, scores):
        assert_is_the_math(form, at, t, u, limit=1e-11)


@pytest.mark.parametrize("order", ["grad(jvp)", "jvp(jvp)", "jvp(grad)", "grad(grad)", "autograd"])
def test_second_derivatives_agree_with_finite_differences(order):
    attend = attention.attention
    at, t, u = (draw_qkv(1, 2, 5, 7, 4, seed=i) for i in ALL)

    def twice():
        leaves = [x.clone().requires_grad_() for x in at]
        grads = torch.autograd.grad(loss(attend, *leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * a).sum() for g, a in zip(grads, t, strict=True)), leaves)

    def inner(grads, direction):
        return sum((g * a).sum() for g, a in zip(grads, direction, strict=True))

    with blocks(rows=2, scores=14):
        exact = {
            "grad(jvp)": lambda: inner(grad(slope(attend, t), ALL)(*at), u),
            "jvp(jvp)": lambda: jvp(slope(attend, t), at, u)[1],
            "jvp(grad)": lambda: inner(jvp(gradient(attend), at, u)[1], t),
            "grad(grad)": lambda: inner(grad(dot(attend, t), ALL)(*at), u),
            "autograd": lambda: inner(twice(), u),
        }[order]()
        h = 1e-4
        numeric = (dot(attend, t)(*moved(at, u, h)) - dot(attend, t)(*moved(at, u, -h))) / (2 * h)
    torch.testing.assert_close(exact, numeric, rtol=1e-6, atol=1e-6)


def test_plain_forward_mode_alone_and_over_plain_autograd():
    at, t = (draw_qkv(2, 2, 6, 6, 4, seed=i) for i in (0, 1))
    expected, of_grad = tangent(attention.attention, t)(*at), jvp(gradient(attention.attention), at, t)[1]
    with forward_ad.dual_level():
        leaves = [x.clone().requires_grad_() for x in at]
        duals = [forward_ad.make_dual(a, b) for a, b in zip(leaves, t, strict=True)]
        assert relative(forward_ad.unpack_dual(attention.attention(*duals)).tangent, expected) <= 1e-14
        grads = torch.autograd.grad(loss(attention.attention, *duals), leaves)
        assert relative([forward_ad.unpack_dual(g).tangent for g in grads], of_grad) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loose", [False, True])
def test_value_and_gradient_are_sdpas_to_the_bit(dtype, loose):
    # As out of a fused projection: [B, L, 3, H, D], a head's rows apart; and a cotangent without memory of its own.
    qkv = [x.transpose(1, 2).requires_grad_() for x in draw(2, 37, 3, 4, 16, dtype=dtype).unbind(2)]
    ours, theirs = attention.attention(*qkv), sdpa(*qkv)
    assert ours.dtype == dtype and torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(attention.attention(*qkv), theirs)
    weight = draw(1, 1, 1, seed=1, dtype=dtype).expand_as(ours) if loose else draw(*ours.shape, seed=1, dtype=dtype)
    expected = torch.autograd.grad(theirs, qkv, weight.contiguous())
    by_func = grad(lambda *qkv: (attention.attention(*qkv) * weight).sum(), ALL)(*(x.detach() for x in qkv))
    for found in (torch.autograd.grad(ours, qkv, weight), by_func):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("form", ["jvp", "jvp(grad)", "grad(grad)", "grad(jvp)", "jvp(jvp)"])
def test_narrower_types_are_as_near_as_they_can_be(form, dtype, limit):
    given = [draw_qkv(2, 2, 40, 33, 16, seed=i, dtype=dtype) for i in ALL]
    exact = FORMS[form](attention.attention, *(tuple(x.double() for x in xs) for xs in given))
    found = FORMS[form](attention.attention, *given)
    assert all(x.dtype == dtype for x in tree_leaves(found))
    assert relative([x.double() for x in tree_leaves(found)], tree_leaves(exact)) <= limit


@pytest.mark.parametrize("form", ["value", "grad", "jvp", "jvp(grad)", "grad(jvp)", "jvp(jvp)", "vmap(jvp(grad))"])
def test_strides_do_not_matter(form):
    triples = [draw_qkv(2, 3, 6, 5, 4, seed=i) for i in ALL]
    strided = [tuple(x.movedim(3, 0).contiguous().movedim(0, 3) for x in triple) for triple in triples]
    assert strided[0][0].stride(-1) != 1
    assert relative(*(FORMS[form](attention.attention, *given) for given in (strided, triples))) <= 1e-14


@pytest.mark.parametrize("form", ["grad(grad(grad))", "jvp(grad(grad))", "grad(jvp(jvp))", "jvp(jvp(grad))", "jvp^3"])
def test_a_third_derivative_is_refused(form):
    f, (at, t) = attention.attention, (draw_qkv(1, 1, 3, 3, 2, seed=i) for i in (0, 1))
    second = {
        "grad(grad(grad))": lambda: grad(lambda *at: sum(x.sum() for x in grad(dot(f, t), ALL)(*at)), ALL)(*at),
        "jvp(grad(grad))": lambda: jvp(grad(dot(f, t), ALL), at, t),
        "grad(jvp(jvp))": lambda: grad(lambda *at: jvp(slope(f, t), at, t)[1], ALL)(*at),
        "jvp(jvp(grad))": lambda: jvp(lambda *at: jvp(gradient(f), at, t)[1], at, t),
        "jvp^3": lambda: jvp(lambda *at: jvp(slope(f, t), at, t)[1], at, t),
    }[form]
    with pytest.raises(NotImplementedError, match="attention has no third derivative"):
        second()


def test_a_second_derivative_may_be_held_constant():
    # As a target that was computed by derivatives and is not differentiated itself.
    at, t = (draw_qkv(1, 2, 4, 4, 3, seed=i) for i in (0, 1))

    def regress(*at):
        aim = jvp(gradient(attention.attention), at, t)[1][0].detach()
        return (attention.attention(*at).sum() * aim).sum()

    aim = jvp(gradient(attention.attention), at, t)[1][0].sum()
    expected = grad(lambda *at: attention.attention(*at).sum() * aim, ALL)(*at)
    assert relative(grad(regress, ALL)(*at), expected) <= 1e-14


def test_nothing_outlives_the_graph_and_hooks_have_all_that_is_saved():
    def kept(hooks):
        x = draw(1, 2, 8, 4).requires_grad_() * 1
        reference = weakref.ref(x)
        with hooks:
            out = attention.attention(x, x, x)
        del x
        gc.collect()
        return out, reference

    plain, x = kept(contextlib.nullcontext())
    assert x() is not None
    del plain
    assert x() is None
    packing = torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(force=True).copy(), torch.from_numpy)
    out, x = kept(packing)
    assert x() is None and torch.isfinite(out).all()


def peak_bytes(run):
    """The most bytes that were allocated at once while `run` ran, by torch's own record of its allocator."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del result
    return int(np.max(np.cumsum(sizes)))


@pytest.mark.parametrize("form", ["jvp", "jvp(grad)", "grad(grad)", "grad(jvp)", "jvp(jvp)"])
def test_memory_is_linear_in_the_tokens(form):
    def peak(length, attend=attention.attention):
        given = [draw_qkv(1, 2, length, length, 32, seed=i, dtype=torch.float32) for i in ALL]
        return peak_bytes(lambda: FORMS[form](attend, *given))

    with blocks(rows=16):
        short, long = peak(1024), peak(2048)
    assert long <= 2.1 * short
    with sdpa_kernel(SDPBackend.MATH):
        assert long <= 0.1 * peak(2048, sdpa)


def test_torch_counts_the_operations():
    # Beside those of the kernels, which on a CPU it does not count.
    given = [draw_qkv(1, 2, 40, 40, 8, seed=i) for i in ALL]
    product = 2 * 2 * 40 * 40 * 8
    for form, products in {"jvp": 5, "jvp(grad)": 5 + 12, "grad(jvp)": 5 + 10, "grad(grad)": 5 + 10}.items():
        with FlopCounterMode(display=False) as counter:
            FORMS[form](attention.attention, *given)
        assert counter.get_total_flops() == products * product, form


def test_compiled_it_is_sdpa():
    qkv = [x.requires_grad_() for x in draw_qkv(1, 2, 6, 6, 4)]
    compiled = torch.compile(attention.attention, backend="aot_eager", fullgraph=True)(*qkv)
    assert torch.equal(compiled, sdpa(*qkv))
    weight = torch.ones_like(compiled)
    found, expected = (torch.autograd.grad(out, qkv, weight) for out in (compiled, sdpa(*qkv)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_of_no_tokens_there_is_nothing():
    q, k, v = draw_qkv(2, 3, 4, 5, 6)
    assert attention.attention(q[:, :, :0], k, v).shape == (2, 0, 18)
    assert attention.attention(q[:0], k[:0], v[:0]).shape == (0, 4, 18)
    assert attention.attention(q, k[:, :, :0], v[:, :, :0]).count_nonzero() == 0


@pytest.mark.parametrize(("part", "what"), [(0, slice(1)), (1, slice(2)), (3, slice(4))])
def test_shapes_that_do_not_go_together_are_said(part, what):
    q, k, v = draw_qkv(2, 3, 4, 5, 6)
    wrong = k.movedim(part, 0)[what].movedim(0, part)
    with pytest.raises(ValueError, match=r"of one B, H and D.*they are \[2, 3, 4, 6\], .*, \[2, 3, 5, 6\]"):
        attention.attention(q, wrong, v)


def test_it_is_the_layers_attention():
    assert layers.attention is attention.attention is layers.Ops().attention


@pytest.mark.parametrize("kernel", ["flash", "math"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_by_name_gives_the_same(kernel, compiled):
    qkv = [x.requires_grad_() for x in draw_qkv(2, 2, 6, 5, 4)]
    attend = functools.partial(attention.attention, kernel=kernel)
    if compiled:
        attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
    cotangent = draw(2, 6, 8, seed=7)
    found = attend(*qkv)
    assert relative(found, sdpa(*qkv)) <= 1e-14
    grads, expected = (torch.autograd.grad(out, qkv, cotangent) for out in (found, sdpa(*qkv)))
    assert relative(grads, expected) <= 1e-14


def test_what_is_compiled_with_a_kernel_of_its_own_has_no_second_derivative():
    q, k, v = (x.requires_grad_() for x in draw_qkv(1, 2, 6, 5, 4))
    attend = torch.compile(functools.partial(attention.attention, kernel="flash"), backend="aot_eager")
    with pytest.raises((NotImplementedError, RuntimeError)):
        [grad] = torch.autograd.grad(attend(q, k, v).square().sum(), q, create_graph=True)
        torch.autograd.grad(grad.sum(), q)


def test_heads_are_kept_together_and_joined_again():
    x = torch.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    heads = attention.split_heads(x, heads=2)
    assert heads.shape == (2, 2, 3, 4)
    torch.testing.assert_close(heads[1, 1, 2], x[1, 2, 4:8])
    torch.testing.assert_close(heads[0, 0, 1], x[0, 1, :4])
    assert torch.equal(attention.join_heads(heads), x)
