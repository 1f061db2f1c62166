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


def test_counts_and_numbers_are_refused_by_name():
    for value in (0, -1, 1.5, "2", None, torch.ones(2)):
        with pytest.raises(ValueError, match="^bins is .*: should be a whole number from 1 on"):
            checks.count("bins", value)
    with pytest.raises(ValueError, match="probes is 1: should be a whole number from 2 on"):
        checks.count("probes", 1, 2)
    for value in (0, -0.5, float("nan")):
        with pytest.raises(ValueError, match="clip is .*: should be a number above 0"):
            checks.positive("clip", value)
    for value in (1, 0.5, torch.tensor(2.0)):
        checks.weight("share", value)
    for value, kind in ((torch.ones(2), r"tensor \[2\]"), ([0.5], "list")):
        with pytest.raises(ValueError, match=f"share is a {kind}: should be a number or a scalar tensor"):
            checks.weight("share", value)


def test_like_is_the_tree_in_the_others_types_and_order():
    expected = {"b": torch.ones(2, dtype=torch.float64), "a": [torch.ones(())]}
    found = checks.like({"a": [torch.tensor(3)], "b": torch.arange(2)}, expected, "v is unlike")
    assert list(found) == ["b", "a"] and found["b"].dtype == torch.float64 and found["a"][0].dtype == torch.float32
    assert found["b"].tolist() == [0, 1] and found["a"][0] == 3
    with pytest.raises(ValueError, match=r"^v is unlike: 1 tensor: b is \[1\] and should be \[2\]$"):
        checks.like({"a": [torch.ones(())], "b": torch.ones(1)}, expected, "v is unlike")


def test_alike_looks_at_no_value():
    one, other = ({"a": torch.ones(2, device="meta"), "b": torch.ones(3, device="meta")} for _ in range(2))
    ours, theirs = checks.alike(one, other, "")
    assert [id(leaf) for leaf in (*ours, *theirs)] == [id(leaf) for leaf in (*one.values(), *other.values())]


@pytest.mark.parametrize(("chunk", "sizes"), [(None, [5]), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_chunks_are_the_batch_in_parts(chunk, sizes):
    batch = {"x": torch.arange(10).reshape(5, 2), "deep": [torch.arange(5)]}
    parts = list(checks.chunks(batch, chunk))
    assert [len(part["x"]) for part in parts] == sizes
    assert torch.equal(torch.cat([part["deep"][0] for part in parts]), batch["deep"][0])
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])


@pytest.mark.parametrize(
    ("batch", "chunk", "says"),
    [
        ({"x": torch.ones(3), "y": torch.ones(2)}, None, "samples has the first dimensions {'x': 3, 'y': 2}"),
        ({"x": torch.ones(())}, None, "samples has the first dimensions {'x': None}"),
        ({"x": torch.ones(0, 2)}, None, "samples has the first dimensions {'x': 0}"),
        ({}, None, "samples has the first dimensions {}"),
        ({"x": torch.ones(3)}, 0, "chunk is 0: should be a whole number from 1 on"),
        ({"x": torch.ones(3)}, -1, "chunk is -1: should be a whole number from 1 on"),
    ],
)
def test_what_has_no_samples_has_no_chunks(batch, chunk, says):
    with pytest.raises(ValueError) as error:
        checks.chunks(batch, chunk, "samples")
    assert str(error.value).startswith(says)


def test_a_tree_of_nothing_is_refused():
    params = {"a": torch.ones(1)}
    assert checks.filled(params) is params
    with pytest.raises(ValueError, match="params has no leaves"):
        checks.filled({"blocks": []})
