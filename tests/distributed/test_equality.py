"""Any mesh gives the losses and gradients of one process, as does any order of adding them up."""

import functools
import math

import numpy as np
import pytest

from tests.helpers import rank_training, ranks, tiny_pipeline

GRADIENT, LOSS, NORM = 1e-5, 1e-6, 1e-5
ONE = {"replicate": 1, "shard": 1, "context": 1}
RING = {"parallel.attention": "ring"}
ULYSSES = {"parallel.attention": "ulysses"}
FULL = {"remat.policy": "full"}
SELECTIVE = {"remat.policy": "selective", "remat.keep": ("attention", "*_attn.qkv")}
COMPILED = {"compile.enabled": True, "compile.backend": "aot_eager"}


def mesh(replicate: int = 1, shard: int = 1, context: int = 1) -> dict[str, int]:
    return {"replicate": replicate, "shard": shard, "context": context}


@functools.cache
def alone() -> tuple:
    """What one process gives: every setting below comes to the same numbers."""
    return rank_training.train(0, ONE, {})


def errors(sizes: dict[str, int], fields: dict, fault: str = "", expected: tuple | None = None) -> tuple:
    """Returns how far a mesh is from one process: (any leaf's gradient of the first step, losses, norms), relative."""
    steps, whole = expected or alone()
    answers = ranks.run(math.prod(sizes.values()), rank_training.train, sizes, fields, len(steps), fault)
    assert all(told == answers[0][0] for told, _ in answers), "every process is told the same"
    found = {path: np.full(grad.shape, np.nan, np.float32) for path, (grad, _) in whole.items()}
    for _, parts in answers:
        for path, (grad, where) in parts.items():
            found[path][where] = grad
    gradient = max(distance(found[path], grad) for path, (grad, _) in whole.items())
    loss, norm = (max(abs(a[i] / b[i] - 1) for a, b in zip(answers[0][0], steps, strict=True)) for i in (0, 1))
    return gradient, loss, norm


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def assert_equal(found: tuple) -> None:
    assert found[0] <= GRADIENT and found[1] <= LOSS and found[2] <= NORM, found


@pytest.mark.parametrize(
    "sizes, fields",
    [
        (mesh(shard=2), {}),
        (mesh(shard=2), {**FULL, "train.accumulate": 4}),
        (mesh(shard=4), {"train.accumulate": 2}),
        (mesh(shard=4), {"parallel.prefetch": 0}),
        (mesh(shard=8), {**FULL, "parallel.prefetch": 3}),
        (mesh(replicate=2), {"train.accumulate": 2}),
        (mesh(replicate=2, shard=2), FULL),
        (mesh(context=2), {}),
        (mesh(context=2), {**RING, **FULL}),
        (mesh(context=2), {**ULYSSES, "train.accumulate": 4}),
        (mesh(context=4), FULL),
        (mesh(context=4), RING),
        (mesh(context=4), ULYSSES),
        (mesh(context=4), {**ULYSSES, "parallel.ulysses": 2}),
        (mesh(shard=2, context=2), {**COMPILED, **FULL}),
        (mesh(context=2), {**COMPILED, **RING}),
        (mesh(shard=2, context=2), {**RING, **SELECTIVE}),
        (mesh(shard=2, context=2), {**ULYSSES, **SELECTIVE, "parallel.ulysses": 2}),
        (mesh(context=2), {**COMPILED, **SELECTIVE}),
        (mesh(2, 2, 2), {}),
        (mesh(2, 2, 2), {**RING, **FULL, "train.accumulate": 4}),
    ],
    ids=str,
)
def test_a_mesh_is_one_process(sizes, fields):
    assert_equal(errors(sizes, fields))


@pytest.mark.parametrize(
    "params, moments",
    [
        ((("*", {}),), ()),  # DDP over every axis
        ((("*", {}),), (("*", {"replicate": 0, "shard": 0}),)),  # ZeRO
        ((("*", {"shard": 0}),), ()),  # repeated over context
        ((("*.weight", {"shard": 1, "context": 1}), ("*", {"context": 0})), ()),  # columns, and another axis
        ((("txt_in.*", {}), ("*", {"shard": 0})), (("*", {"shard": 0}),)),  # some finer than the parameters
    ],
    ids=str,
)
def test_a_table_is_one_process(params, moments):
    assert_equal(errors(mesh(shard=2, context=2), {"parallel.params": params, "parallel.moments": moments}))


def test_replicas_that_share_a_batch_count_it_once():
    assert_equal(errors(mesh(replicate=2, shard=2), {"parallel.batch": (("*", {"shard": 0}),)}))


def test_t5_by_block_is_t5_in_one_process(tmp_path):
    fields = {"text.kind": "hf", "text.path": str(tiny_pipeline.build(tmp_path, 4096, 768))}
    expected = rank_training.train(0, ONE, fields, 3)
    assert_equal(errors(mesh(shard=2), fields, expected=expected))
    assert_equal(errors(mesh(shard=2, context=2), {**fields, "train.accumulate": 2}, expected=expected))


FLOAT8 = {"numerics.compute": "bfloat16", "numerics.linear": "float8_rowwise"}


@pytest.mark.parametrize(
    "sizes, gradient", [(mesh(replicate=2), 2e-2), (mesh(shard=2), 2e-2), (mesh(context=2), 0.1)], ids=str
)
def test_float8_is_what_it_is_in_one_process(sizes, gradient):
    # Scales are of what a process has of a batch, powers of two: but for what is too small for them nothing changes.
    # Attention's sums in another order do change numbers of bfloat16, and those Float8's.
    found = errors(sizes, FLOAT8, expected=rank_training.train(0, ONE, FLOAT8, 3))
    assert found[0] <= gradient and found[1] <= 1e-3 and found[2] <= 1e-2, found


@pytest.mark.parametrize("fault", ["no attention", "no reduction", "same noise"])
def test_the_comparison_sees_what_is_wrong(fault):
    found = errors(mesh(replicate=2), {}, fault)
    assert found[0] > 100 * GRADIENT and found[1] > 100 * LOSS and found[2] > 100 * NORM


@pytest.mark.parametrize("sizes", [mesh(shard=4), mesh(replicate=2, shard=2), mesh(shard=2, context=2)], ids=str)
def test_state_is_split_in_equal_parts(sizes):
    for mine, whole in ranks.run(4, rank_training.bytes_per_process, sizes):
        assert mine <= 1.02 * whole / (sizes["shard"] * sizes["context"])
