"""oneDNN's products against float64, and who is left to torch's own."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import flux_func as ff
from flux_func.models import layers, products
from tests.helpers import tiny_batch

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
SIZES = st.integers(1, 40)


def layer(out, fan_in, bias=True, **options):
    draw = torch.Generator().manual_seed(out + fan_in)
    params = {"weight": torch.randn(out, fan_in, generator=draw), "bias": torch.randn(out, generator=draw)}
    return {name: leaf.to(**options) for name, leaf in params.items() if bias or name == "weight"}


@pytest.fixture
def asked(monkeypatch):
    """The shapes of what oneDNN was asked for."""
    found, run = [], products._linear
    monkeypatch.setattr(products, "_linear", lambda x, *rest: found.append(tuple(x.shape)) or run(x, *rest))
    return found


@settings(max_examples=50, deadline=None)
@given(st.lists(SIZES, max_size=2), SIZES, SIZES, st.booleans())
def test_products_are_those_of_float64(rows, out, fan_in, bias):
    params, x = layer(out, fan_in, bias), torch.randn(*rows, fan_in)
    with torch.no_grad():
        found = products.linear(params, x, "a")
    expected = F.linear(x.double(), *(leaf.double() for leaf in params.values()))
    assert found.shape == expected.shape and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [torch.randn(8, 6).mT, torch.randn(6, 16)[:, ::2]], ids=["columns", "every other"])
def test_strides_do_not_matter(weight, asked):
    x, bias = torch.randn(8, 5).mT, torch.randn(6)
    with torch.no_grad():
        found = products.linear({"weight": weight, "bias": bias}, x, "a")
    torch.testing.assert_close(found, F.linear(x, weight, bias))
    assert asked == [(5, 8)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_and_what_has_gradients_are_torchs(dtype, asked):
    params, x = layer(4, 3), torch.randn(2, 3)
    with torch.no_grad():
        narrow = products.linear(layer(4, 3, dtype=dtype), x.to(dtype), "a")
        assert torch.equal(narrow, F.linear(x.to(dtype), *layer(4, 3, dtype=dtype).values()))
        assert products.linear(params, x[:0], "a").shape == (0, 4)
    assert torch.equal(products.linear(params, x, "a"), F.linear(x, *params.values()))
    assert asked == []


def test_what_is_not_a_plain_tensor_has_its_own_products(asked):
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, fn, types, args=(), kwargs=None):
            plain = [arg.as_subclass(torch.Tensor) if isinstance(arg, cls) else arg for arg in args]
            return 2 * fn(*plain, **(kwargs or {})) if fn is F.linear else super().__torch_function__(fn, types, args)

    params, x = layer(4, 3, bias=False), torch.randn(2, 3)
    with torch.no_grad():
        found = products.linear({"weight": params["weight"].as_subclass(Doubled)}, x, "a")
    torch.testing.assert_close(found, 2 * F.linear(x, params["weight"]))
    assert asked == []


def test_transforms_give_the_same():
    params, x, ops = layer(4, 3), torch.randn(5, 3), products.linear
    with torch.no_grad():
        torch.testing.assert_close(vmap(lambda row: ops(params, row, "a"))(x), F.linear(x, *params.values()))
        value, tangent = jvp(lambda x: ops(params, x, "a"), (x,), (x,))
        torch.testing.assert_close(tangent, F.linear(x, params["weight"]))
    gradient = grad(lambda params: ops(params, x, "a").sum())(params)
    torch.testing.assert_close(gradient["bias"], torch.full((4,), 5.0))


def test_a_compiled_model_asks_it_too():
    cfg = ff.flavor("flux-tiny")
    params, batch = ff.init(cfg, scheme="nonzero"), tiny_batch.batch(2)
    plain = ff.loss(params, cfg, batch)
    ops = layers.Ops(linear=products.linear)
    run = torch.compile(lambda: ff.loss(params, cfg, batch, ops=ops), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(), plain, rtol=1e-6, atol=0)
        torch.testing.assert_close(ff.loss(params, cfg, batch, ops=ops), plain, rtol=1e-6, atol=0)
