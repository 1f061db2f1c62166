"""The kernels against each other, by parts of the keys, and as torch declares those that are not here."""

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_func.models import attention, kernels
from tests.helpers.tiny_attention import blocks, draw, draw_qkv, gradient, relative, sdpa


def test_products_serve_where_there_is_no_kernel():
    # Told to do without kernels, as on a device that has none.
    at = draw_qkv(2, 3, 11, 7, 6)
    expected = sdpa(*at), gradient(sdpa)(*at)
    for rows, scores in ((128, 1 << 18), (3, 20)):
        with blocks(rows, scores), sdpa_kernel(SDPBackend.MATH):
            assert kernels._kernel(*at[:2], "") == "products"
            assert relative((attention.attention(*at), gradient(attention.attention)(*at)), expected) <= 1e-14


@pytest.mark.parametrize("kernel", ["cpu", "products"])
def test_parts_of_the_keys_add_up_to_all(kernel):
    q, k, v = draw_qkv(2, 3, 9, 12, 4)
    cotangent = draw(2, 3, 9, 4, seed=5)
    with mock.patch.object(kernels, "_kernel", lambda q, k, asked: kernel), blocks(rows=2):
        out, total = kernels.block(q, k, v)
        whole = kernels.block_backward(cotangent, q, k, v, out, total)
        parts = [(a.contiguous(), b.contiguous()) for a, b in zip(k.split(5, 2), v.split(5, 2), strict=True)]
        outs, totals = zip(*(kernels.block(q, *part) for part in parts), strict=True)
        dq, dk, dv = zip(*(kernels.block_backward(cotangent, q, *part, out, total) for part in parts), strict=True)
    weights = torch.stack(totals).softmax(0)[..., None]
    torch.testing.assert_close(torch.stack(totals).logsumexp(0), total, rtol=1e-13, atol=0)
    torch.testing.assert_close((torch.stack(outs) * weights).sum(0), out, rtol=1e-12, atol=1e-14)
    assert relative((sum(dq), torch.cat(dk, 2), torch.cat(dv, 2)), whole) <= 1e-14


@pytest.mark.parametrize(
    ("kernel", "dtype"), [("flash", torch.bfloat16), ("cudnn", torch.bfloat16), ("efficient", torch.float32)]
)
def test_cuda_kernels_are_called_as_torch_declares_them(kernel, dtype):
    with FakeTensorMode(), mock.patch.object(kernels, "_kernel", lambda q, k, asked: kernel):
        q = torch.empty(2, 8, 48, 128, dtype=dtype, device="cuda")
        k = torch.empty(2, 8, 80, 128, dtype=dtype, device="cuda")
        out, total = kernels.block(q, k, k)
        grads = kernels.block_backward(torch.empty_like(out), q, k, k, out, total)
    assert total.shape == (2, 8, 48) and total.dtype == torch.float32
    for x, like in zip((out, *grads), (q, q, k, k), strict=True):
        assert (x.shape, x.dtype, x.device) == (like.shape, dtype, like.device)


@pytest.mark.parametrize("kernel", ["flash", "math"])
def test_a_kernel_that_there_is_passes_the_check(kernel):
    kernels.check(kernel, heads=2, size=8, dtype=torch.bfloat16, device=torch.device("cpu"))


def test_a_kernel_that_there_is_not_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="kernel 'cudnn' is none of a cpu's, which are 'flash', 'math'"):
        kernels.check("cudnn", heads=2, size=8, dtype=torch.float32, device=torch.device("cpu"))


def test_what_a_kernel_does_not_take_is_said():
    with pytest.raises(ValueError, match="kernel 'flash' does not take heads of 8 in torch.int64 on cpu"):
        kernels.check("flash", heads=2, size=8, dtype=torch.int64, device=torch.device("cpu"))
