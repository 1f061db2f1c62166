"""Our training step against torch.func and torch.optim, which know nothing of folds."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import flux_func as ff
from flux_func import tree
from flux_func.bench import ours
from flux_func.bench.cases import Side
from flux_func.errors import UserError
from flux_func.train import optimizer
from tests.helpers import tiny_bench

CASE = tiny_bench.case(batch=4)


def given(path):
    request = json.loads(path.read_text())
    return request, tree.unflatten(load_file(request["weights"])), load_file(request["inputs"])


def expected(path, steps=3):
    """Losses, and the weights at the end."""
    _, params, batch = given(path)
    leaves = tree.leaves(params)
    reference = torch.optim.AdamW(leaves, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        grads, loss = torch.func.grad_and_value(ff.loss)(params, CASE.cfg, batch)
        losses.append(loss.item())
        norm = math.sqrt(sum(grad.double().square().sum().item() for grad in tree.leaves(grads)))
        for leaf, grad in zip(leaves, tree.leaves(grads), strict=True):
            leaf.grad = grad * min(1, 1 / norm)
        reference.step()
    return losses, params


def test_adamw_of_clipped_gradients_under_recomputation_to_the_bit(tmp_path):
    paths = tiny_bench.ask(CASE, [Side("ours"), Side("ours", remat="full")], tmp_path)
    losses, _ = expected(paths[0])
    kept, again = ([step().item() for _ in losses] for step in (tiny_bench.work(path).step for path in paths))
    assert kept == pytest.approx(losses, rel=1e-5)
    assert kept == again


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_micro_batches_are_one_step(accumulate, tmp_path):
    [path] = tiny_bench.ask(CASE, [Side("ours")], tmp_path)
    losses, weights = expected(path)
    request, params, batch = given(path)
    config = ours.settings(request)
    config.train.accumulate = accumulate
    here = {"params": params, "opt": optimizer.from_config(config).init(params)}
    step = ours.training(config, CASE.cfg, here, batch, torch.device("cpu"))
    assert [step().item() for _ in losses] == pytest.approx(losses, rel=1e-5)
    for leaf, same in zip(tree.leaves(here["params"]), tree.leaves(weights), strict=True):
        assert (leaf - same).norm() <= 1e-5 * same.norm()
    assert here["opt"]["step"] == 3


def test_a_policy_that_there_is_not_is_refused(tmp_path):
    [path] = tiny_bench.ask(CASE, [Side("ours", remat="some")], tmp_path)
    with pytest.raises(UserError, match="remat.policy is 'some'"):
        tiny_bench.work(path)
