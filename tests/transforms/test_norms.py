"""Norms against float64."""

import pytest
import torch

from flux_func.transforms import norms


@pytest.mark.parametrize("count", [65_536, 65_537, 20_000_000])
def test_norm_of_a_large_leaf_keeps_its_digits(count):
    # torch's own float32 norm of 20 million elements on a CPU is 1e-3 off.
    x = torch.randn(count, generator=torch.Generator().manual_seed(0))
    exact = torch.dot(x.double(), x.double()).sqrt()
    torch.testing.assert_close(norms.global_norm({"a": x, "b": x}).double(), 2**0.5 * exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_norm_is_of_the_widest_type_and_of_leaves_of_any_shape(dtype):
    found = norms.global_norm([torch.tensor(3.0), torch.full((2, 2), 2.0, dtype=dtype)])
    assert found.item() == 5 and found.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_norms_of_samples_are_of_float32_at_least(dtype):
    draw = torch.Generator().manual_seed(0)
    grads = [torch.randn(3, *shape, generator=draw).to(dtype) for shape in [(), (5,), (1000, 300), (2, 3, 4)]]
    exact = sum(leaf.double().flatten(1).square().sum(1) for leaf in map(lambda leaf: leaf[..., None], grads))
    found = norms.squared_norms(grads)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows, out, fan_in", [(2, 9, 8), (30, 4, 5)])
def test_both_forms_of_the_product_are_its_square(rows, out, fan_in):
    draw = torch.Generator().manual_seed(0)
    grad, x = torch.randn(rows, out, generator=draw), torch.randn(rows, fan_in, generator=draw)
    exact = (grad.double().mT @ x.double()).square().sum()
    torch.testing.assert_close(norms.square_of_product(grad, x).double(), exact)
