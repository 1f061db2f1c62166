"""The norm of a tree against float64."""

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
