"""The train state: what it holds, in which types, and that its outline needs no memory."""

import pytest
import torch

from flux_func import tree
from flux_func.models import flux
from flux_func.train import optimizer, state
from tests.helpers import tiny_run
from tests.helpers.tiny_run import CPU

RUNS = [
    {},
    {"ema.decay": 0.9},
    {"model.guidance_embed": True, "numerics.param": "bfloat16", "ema.decay": 0.9},
    {"optimizer.name": "SGD", "optimizer.options": "momentum=0.9"},
]


@pytest.mark.parametrize("fields", RUNS, ids=lambda fields: next(iter(fields), "default"))
def test_the_outline_is_the_state_without_memory(fields):
    config = tiny_run.config(fields)
    chosen = optimizer.from_config(config)
    made, outline = state.create(config, chosen, CPU), state.abstract(config, chosen)
    forms = [{path: (leaf.shape, leaf.dtype) for path, leaf in tree.flatten(each).items()} for each in (made, outline)]
    assert forms[0] == forms[1]
    assert all(leaf.is_meta for leaf in tree.leaves(outline) if leaf.ndim)
    assert state.size_in_bytes(made) == state.size_in_bytes(outline)
    assert state.size_in_bytes(made) == sum(leaf.untyped_storage().nbytes() for leaf in tree.leaves(made))


def test_weights_are_the_configs():
    config = tiny_run.config({"train.seed": 5, "model.guidance_embed": True, "numerics.param": "bfloat16"})
    made = state.create(config, optimizer.from_config(config), CPU)
    cfg = state.model_config(config)
    expected = flux.init(cfg, seed=5, dtype=torch.bfloat16, scheme="nonzero")
    assert cfg.guidance_embed and "guidance_in" in made["params"] and made.keys() == {"params", "opt"}
    assert all(map(torch.equal, tree.leaves(made["params"]), tree.leaves(expected)))


def test_a_flavors_own_guidance_stands_unless_it_is_overruled():
    assert state.model_config(tiny_run.config({"model.flavor": "flux-dev"})).guidance_embed
    assert not state.model_config(
        tiny_run.config({"model.flavor": "flux-dev", "model.guidance_embed": False})
    ).guidance_embed
    assert not state.model_config(tiny_run.config()).guidance_embed


def test_the_average_starts_at_the_weights_in_float32_and_memory_of_its_own():
    for param in ("float32", "bfloat16"):
        config = tiny_run.config({"ema.decay": 0.9, "numerics.param": param})
        made = state.create(config, optimizer.from_config(config), CPU)
        assert state.averaged(made) is made["ema"]
        for mean, leaf in zip(tree.leaves(made["ema"]), tree.leaves(made["params"]), strict=True):
            assert mean.dtype == torch.float32 and torch.equal(mean, leaf.float())
            assert mean.data_ptr() != leaf.data_ptr()
    config = tiny_run.config()
    made = state.create(config, optimizer.from_config(config), CPU)
    assert state.averaged(made) is made["params"]
