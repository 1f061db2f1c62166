import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func.interop import arrays

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def random_bits(shape, dtype, seed):
    """Any bit pattern: infinities, negative zeros, every kind of nan."""
    numel = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    raw = np.random.default_rng(seed).integers(0, 256, numel * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape).clone()


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    seed=st.integers(0, 2**32 - 1),
)
def test_to_jax_and_back_keeps_every_bit(dtype, shape, seed):
    tensor = random_bits(shape, dtype, seed)
    back = arrays.to_torch(np.array(arrays.to_jax(tensor)))
    assert back.dtype == dtype and back.shape == tensor.shape
    assert torch.equal(bits(back), bits(tensor))


@pytest.mark.parametrize("view", [lambda x: x.t(), lambda x: x[1:, 3:], lambda x: x[2, 5]])
def test_to_jax_takes_views(view):
    tensor = view(torch.arange(99.0).view(9, 11))
    np.testing.assert_array_equal(np.asarray(arrays.to_jax(tensor)), tensor.numpy())


def test_to_jax_copies_nothing_that_is_aligned():
    tensor = torch.zeros(64)
    assert arrays.to_jax(tensor).unsafe_buffer_pointer() == tensor.data_ptr()


def test_copies_are_copies_and_reuse_what_fits():
    flat = {"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.ones(())}
    first = arrays.copies(flat, {})
    where = {path: buffer.data_ptr() for path, buffer in first.items()}
    assert all(where[path] != leaf.data_ptr() for path, leaf in flat.items())
    for leaf in flat.values():
        leaf.add_(1)
    assert all(buffer.eq(1).all() for buffer in first.values())
    changed = {"a": flat["a"], "b": flat["b"].float(), "c": flat["c"][None]}
    second = arrays.copies(changed, first)
    assert second["a"].data_ptr() == where["a"]
    assert second["b"].dtype == torch.float32 and second["c"].shape == (1,)
    assert all(torch.equal(second[path], changed[path]) for path in changed)


def test_orbax_is_quiet_and_absl_is_not(capsys):
    ocp = arrays.orbax()
    heard = []

    class Handler(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())

    handler, logger = Handler(), logging.getLogger("absl")
    logger.addHandler(handler)
    try:
        for path in (ocp.__file__, "/our/own/module.py"):
            logger.handle(logging.LogRecord("absl", logging.ERROR, path, 1, "said by %s", (path,), None))
    finally:
        logger.removeHandler(handler)
    assert heard == ["said by /our/own/module.py"]


def test_of_writes_that_fail_together_one_is_told_and_other_tasks_are_as_ever(caplog):
    ocp = arrays.orbax()
    lost = "Task exception was never retrieved\nfuture: <Task finished coro=<write() done, defined at %s:1>>"
    for path in (ocp.__file__, "/our/own/module.py"):
        logging.getLogger("asyncio").error(lost, path)
    assert [record.args for record in caplog.records] == [("/our/own/module.py",)]


@settings(max_examples=80, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3), ndim=st.integers(0, 3))
def test_parts_make_up_the_leaf_and_are_where_jax_is_told(data, sizes, ndim):
    dims = [data.draw(st.sampled_from([None, *range(ndim)])) for _ in sizes]
    split = [math.prod(size for size, dim in zip(sizes, dims, strict=True) if dim == d) for d in range(ndim)]
    shape = tuple(data.draw(st.integers(1, 4)) * count for count in split)
    whole, axes = torch.arange(math.prod(shape)).view(shape), ("a", "b", "c")[: len(sizes)]
    rows, least = np.arange(math.prod(sizes)).reshape(sizes), arrays.LEAST_PART_BYTES
    arrays.LEAST_PART_BYTES = data.draw(st.sampled_from([1, 64]))
    found = []
    try:
        for place in np.ndindex(*sizes):
            local = whole
            for size, dim, index in zip(sizes, dims, place, strict=True):
                local = local if dim is None else local.chunk(size, dim)[index]
            part = arrays._share(local, shape, rows, axes, dims, place)
            # What JAX's NamedSharding says of this device.
            told = whole
            for dim, names in enumerate(part.spec):
                for name in names:
                    told = told.chunk(sizes[axes.index(name)], dim)[place[axes.index(name)]]
            assert torch.equal(part.tensor, told) and part.shape == shape
            found.append(part)
    finally:
        arrays.LEAST_PART_BYTES = least
    copies = math.prod(size for size, dim in zip(sizes, dims, strict=True) if dim is None)
    shared = len(found[0].spec and sum(found[0].spec, ())) > sum(dim is not None for dim in dims)
    assert sum(part.tensor.numel() for part in found) == whole.numel() * (1 if shared else copies)


def test_without_other_processes_a_part_is_the_leaf():
    leaf = torch.zeros(4, 3, requires_grad=True)
    part = arrays.part(leaf)
    assert part.tensor.data_ptr() == leaf.data_ptr() and not part.tensor.requires_grad
    assert arrays.assemble(part, part.tensor).shape == (4, 3)
