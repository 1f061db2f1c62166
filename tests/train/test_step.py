"""The step against its definition, computed apart in float64 from the pipeline's own batches."""

import collections
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch.overrides import TorchFunctionMode

from flux_func import random, tree
from flux_func.data import pipeline, sources
from flux_func.flow import path
from flux_func.models import autoencoder, flux, text
from flux_func.parallel import mesh
from flux_func.train import encoders, layout, optimizer, state, step
from tests.helpers import tiny_run
from tests.helpers.tiny_run import CPU

SGD = {"optimizer.name": "SGD", "optimizer.lr": 0.1}
FOUR = {"train.batch_size": 4}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a step needs, made of a config's fields."""

    config: object
    cfg: flux.FluxConfig
    encoders: encoders.Encoders
    optimizer: optimizer.Optimizer


def make(fields):
    config = tiny_run.config(fields)
    cfg = state.model_config(config)
    return Setup(config, cfg, encoders.build(config, cfg, CPU), optimizer.from_config(config))


def batches(setup, count, start=0):
    config = setup.config
    source, tokenize = sources.build(config, "train"), setup.encoders.tokenize
    noise = setup.encoders.posterior_noise
    made = pipeline.batches(
        config, source, tokenize, batch_size=config.train.batch_size, start_step=start, posterior_noise=noise
    )
    return list(itertools.islice(made, count))


def given(setup):
    """What `train_step` is given besides the state and a batch."""
    sharding = layout.build(setup.config, setup.cfg, setup.optimizer, mesh.ONE, CPU)
    return {**vars(setup), "device": CPU, "sharding": sharding}


def take(setup, count=1, watch=lambda current: None):
    """Takes steps from the start; returns the state and what each step gave."""
    current, outs = state.create(setup.config, setup.cfg, setup.optimizer, CPU), []
    for i, batch in enumerate(batches(setup, count)):
        current, out = step.train_step(current, batch, i, **given(setup))
        outs.append(out)
        watch(current)
    return current, outs


def double(value):
    return tree.map(lambda leaf: leaf.double(), value)


def expected_batch(setup, batch):
    """The batch of `ff.loss` in float64, from the data by other roads than the step's."""
    config, size = setup.config, setup.config.train.batch_size
    u = [random.uniform(config.train.seed, "timestep", int(p)) for p in batch["position"]]
    t = {
        "uniform": lambda: u,
        "logit_normal": lambda: [1 / (1 + math.exp(-norm.ppf(x))) for x in u],
        "stratified": lambda: [(i + x) / size for i, x in enumerate(u)],
    }[config.train.timesteps]()
    if config.train.shift:
        mu = 0.5 + (1.15 - 0.5) * ((config.data.image_size / 16) ** 2 - 256) / (4096 - 256)
        t = [math.exp(mu) / (math.exp(mu) + (1 / x - 1)) for x in t]
    txt, y = text.encode({}, text.TextConfig(max_length=4), {"t5": batch["t5_tokens"], "clip": batch["clip_tokens"]})
    shape = (16, config.data.image_size // 8, config.data.image_size // 8)
    out = {
        "latents": autoencoder.encode({}, autoencoder.AutoencoderConfig(), torch.from_numpy(batch["image"])),
        "noise": torch.stack([torch.from_numpy(random.normal(0, "noise", int(p), shape)) for p in batch["position"]]),
        "timesteps": torch.tensor(t, dtype=torch.float64),
        "txt": txt,
        "y": y,
    }
    if setup.cfg.guidance_embed:
        out["guidance"] = torch.full((size,), config.train.guidance)
    return double(out)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"train.timesteps": "logit_normal"},
        {"train.timesteps": "stratified", "train.batch_size": 3},
        {"train.shift": True, "data.image_size": 48},
        {"model.guidance_embed": True, "train.guidance": 7.0},
        {"remat.policy": "full", "train.accumulate": 2},
        {"optimizer.warmup_steps": 4},
    ],
    ids=lambda fields: next(iter(fields), "default"),
)
def test_a_step_is_gradient_descent_on_path_loss_of_the_pipelines_batch(fields):
    setup = make({**SGD, "optimizer.clip_norm": 0.5, **fields})
    before = double(state.create(setup.config, setup.cfg, setup.optimizer, CPU)["params"])
    current, [out] = take(setup)
    inputs = expected_batch(setup, batches(setup, 1)[0])
    grads, loss = torch.func.grad_and_value(path.loss)(before, setup.cfg, inputs)
    size = torch.stack([leaf.square().sum() for leaf in tree.leaves(grads)]).sum().sqrt()
    assert loss > 1 and size > 1  # nothing is compared with zero, and clipping does something
    torch.testing.assert_close(out["loss"].double(), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(out["grad_norm"].double(), size, rtol=1e-4, atol=0)
    after, warm = tree.flatten(current["params"]), setup.config.optimizer.warmup_steps or 1
    for name, leaf in tree.flatten(before).items():
        update = -0.1 / warm * 0.5 / size * tree.flatten(grads)[name]
        error = (after[name].double() - leaf - update).norm()
        assert error <= 1e-3 * update.norm() + 1e-7 * leaf.norm(), name


def test_shift_is_applied_once_and_towards_noise():
    plain, shifted = (make({"train.shift": on, "data.image_size": 64}) for on in (False, True))
    batch = batches(plain, 1)[0]
    t, moved = (
        step.train_batch(batch, s.encoders, s.config, s.cfg, CPU)["timesteps"].double() for s in (plain, shifted)
    )
    odds = torch.log(moved / (1 - moved)) - torch.log(t / (1 - t))
    mu = 0.5 - 0.65 * 240 / 3840  # 16 tokens
    torch.testing.assert_close(odds, torch.full_like(odds, mu), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("kind", ["adamw", "SGD"])
def test_accumulation_changes_nothing_but_rounding(kind, accumulate):
    fields = {**FOUR, "train.timesteps": "stratified", **(SGD if kind == "SGD" else {})}
    whole, parts = (make({**fields, "train.accumulate": count}) for count in (1, accumulate))
    (one, ones), (many, manys) = take(whole, 3), take(parts, 3)
    for a, b in zip(ones, manys, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    first = state.create(whole.config, whole.cfg, whole.optimizer, CPU)["params"]
    for start, a, b in zip(*map(tree.leaves, (first, one["params"], many["params"])), strict=True):
        # adamw divides rounding by itself where a gradient is next to nothing.
        assert (a - b).norm() <= (1e-2 if kind == "adamw" else 1e-4) * (a - start).norm() + 1e-7 * a.norm()


def test_micro_batches_are_the_batch_in_order():
    [batch] = batches(make({"train.batch_size": 6}), 1)
    for count in (1, 2, 3, 6):
        parts = list(step.micro_batches(batch, count))
        assert len(parts) == count and all(len(part["position"]) == 6 // count for part in parts)
        for key in ("image", "noise", "t5_tokens", "clip_tokens", "uniform", "position"):
            joined = torch.cat([torch.from_numpy(part[key]) for part in parts])
            assert torch.equal(joined, torch.from_numpy(batch[key]))
        assert [c for part in parts for c in part["caption"]] == batch["caption"]


def test_guidance_is_told_where_the_model_has_the_embedding_and_only_there():
    setup = make({"model.guidance_embed": True, "train.guidance": 2.5, "train.batch_size": 3})
    inputs = step.train_batch(batches(setup, 1)[0], setup.encoders, setup.config, setup.cfg, CPU)
    assert inputs["guidance"].tolist() == [2.5] * 3
    plain = make({})
    assert "guidance" not in step.train_batch(batches(plain, 1)[0], plain.encoders, plain.config, plain.cfg, CPU)


def test_the_average_is_its_closed_form():
    setup = make({"ema.decay": 0.3, "optimizer.lr": 1e-2})
    seen = [double(state.create(setup.config, setup.cfg, setup.optimizer, CPU)["params"])]
    current, _ = take(setup, 5, lambda current: seen.append(double(current["params"])))
    decays = [min(0.3, (1 + i) / (10 + i)) for i in range(5)]
    assert decays[0] == 0.1 and decays[-1] == 0.3
    weights = [math.prod(decays)] + [(1 - d) * math.prod(decays[i + 1 :]) for i, d in enumerate(decays)]
    mean = tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *seen)
    assert sum(weights) == pytest.approx(1)
    for a, b in zip(tree.leaves(current["ema"]), tree.leaves(mean), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)
    assert state.averaged(current) is current["ema"]


class Linears(TorchFunctionMode):
    """Notes of every linear the types of its input and weight, and the rows that it is given at once."""

    def __init__(self):
        super().__init__()
        self.types, self.rows, self.calls = collections.Counter(), set(), 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            self.types[args[0].dtype, args[1].dtype] += 1
            self.rows.add(len(args[0]))
            self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("param", ["float32", "bfloat16"])
def test_the_precision_asked_for_is_what_linears_see(param, compute):
    setup = make({"numerics.param": param, "numerics.compute": compute})
    with Linears() as seen:
        current, [out] = take(setup)
    # 5 linears a stream in each of 2 double blocks, 3 in each of 2 single ones, 2 in the stem and 2 in the head; and 4
    # more in the stem, of a row for a sample, which are never below float32.
    expected = collections.Counter({(state.DTYPES[compute],) * 2: 2 * 2 * 5 + 2 * 3 + 2 + 2})
    assert seen.types == expected + collections.Counter({(torch.float32,) * 2: 4})
    kept = {leaf.dtype for part in ("params", "opt") for leaf in tree.leaves(current[part]) if leaf.ndim}
    assert kept == {state.DTYPES[param]}
    assert out["loss"].dtype == out["grad_norm"].dtype == torch.float32


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_batch_size_and_recomputation_asked_for_are_what_linears_see(remat, accumulate):
    with Linears() as seen:
        take(make({**FOUR, "train.accumulate": accumulate, "remat.policy": remat}))
    # 5 linears a stream in each of 2 double blocks, 3 in each of 2 single ones, 6 in the stem and 2 in the head.
    once = 2 * 2 * 5 + 2 * 3 + 6 + 2
    assert seen.rows == {4 // accumulate}
    assert seen.calls == accumulate * once * (2 if remat == "full" else 1)


def test_the_loss_does_not_scale_with_batch_or_resolution():
    """At initialization the velocity is zero, so that the loss is the target's second moment: 1 and the latents'."""
    for fields in ({}, {"train.batch_size": 8}, {"data.image_size": 128}, {**FOUR, "train.accumulate": 4}):
        setup = make({"model.init": "pretrain", **fields})
        [batch] = batches(setup, 1)
        inputs = expected_batch(setup, batch)
        _, [out] = take(setup)
        moment = (inputs["noise"] - inputs["latents"]).square().mean()
        assert float(out["loss"]) == pytest.approx(float(moment), rel=1e-5)
        assert 1 < moment < 6


def test_the_state_is_donated():
    setup = make({})
    current = state.create(setup.config, setup.cfg, setup.optimizer, CPU)
    before = [leaf.data_ptr() for leaf in tree.leaves(current)]
    after, _ = step.train_step(current, batches(setup, 1)[0], 0, **given(setup))
    assert [leaf.data_ptr() for leaf in tree.leaves(after)] == before
