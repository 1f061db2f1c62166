import functools

import pytest
import torch

from flux_func.transforms import checks


def halves(x, scale=0.5):
    return x * scale


class Model:
    def __call__(self, x):
        return {"out": x}

    def __repr__(self):
        return "Model()"


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (halves, "halves returned a tensor [3], it should be a scalar tensor"),
        (functools.partial(halves, scale=2.0), "halves returned a tensor [3], it should be a scalar tensor"),
        (lambda x: None, "<lambda> returned a NoneType, it should be a scalar tensor"),
        (Model(), "Model() returned a dict, it should be a scalar tensor"),
    ],
)
def test_what_returned_what(fn, says):
    with pytest.raises(ValueError) as error:
        checks.scalar(fn)(torch.ones(3))
    assert str(error.value) == says


def test_a_scalar_passes_under_transforms_too():
    total = checks.scalar(lambda x: x.square().sum(), " for one sample")
    x = torch.arange(6.0).reshape(2, 3)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(x), 2 * x)
    with pytest.raises(ValueError, match=r"halves returned a tensor \[3\] for one sample"):
        torch.func.vmap(checks.scalar(halves, " for one sample"))(x)
