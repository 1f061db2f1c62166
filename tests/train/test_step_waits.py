"""A step is launched without waiting for the device: neither to read from it nor to copy to it."""

import contextlib
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux_func.data import pipeline, sources
from flux_func.parallel import mesh
from flux_func.train import encoders, layout, optimizer, state, step
from tests.helpers import tiny_pipeline, tiny_run

CUDA, META = torch.device("cuda"), torch.device("meta")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Operations whose result the host has to have before it can go on.
READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim")
RUNS = {
    "default": {},
    "average, accumulation, recomputation, guidance, schedules": {
        "ema.decay": 0.5,
        "train.accumulate": 2,
        "train.timesteps": "logit_normal",
        "train.shift": True,
        "remat.policy": "full",
        "model.guidance_embed": True,
        "optimizer.schedule": "cosine",
        "optimizer.decay_steps": 9,
        "numerics.compute": "bfloat16",
    },
}


class Waits(AssertionError):
    """The host waited for the device."""


class NeverWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device other than the CPU, as far as operations show it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._overloadpacket.__name__, kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {leaf.device.type for leaf in given}
        if name in READS and devices != {"cpu"}:
            raise Waits(name)
        if name in ("_to_copy", "copy_"):
            devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
            if len(devices) > 1 and not (kwargs.get("non_blocking") or args[2:] == (True,)):
                raise Waits(f"{name} between {devices}")
        # The fused kernel has no stand-in without memory, and returns nothing.
        return None if name == "_fused_adamw_" and "meta" in devices else func(*args, **kwargs)


def prepare(fields, device, count):
    """A function that takes the i-th of `count` steps, a state that it is to be given, and the config."""
    config = tiny_run.config(fields)
    cfg, chosen = state.model_config(config), optimizer.from_config(config)
    sharding, codec = layout.build(config, cfg, chosen, mesh.ONE, device), encoders.build(config, cfg, device)
    data = pipeline.batches(
        config,
        sources.build(config, "train"),
        codec.tokenize,
        batch_size=config.train.batch_size,
        posterior_noise=codec.posterior_noise,
    )
    with contextlib.closing(data):
        batches = list(itertools.islice(data, count))
    given = {"cfg": cfg, "config": config, "encoders": codec, "optimizer": chosen, "device": device}
    given |= {"sharding": sharding, "ops": layout.ops(config, cfg, sharding)}
    current = state.create(config, cfg, chosen, device, None, sharding)
    return lambda current, i: step.train_step(current, batches[i], i, **given), current


def models(folder):
    """Encoders that have weights."""
    path = tiny_pipeline.build(folder / "flux", 4096, 768, layers=1, weights=False)
    text = {"text.kind": "hf", "text.path": str(path), "text.random_init": True, "text.max_length": 6}
    return {**text, "autoencoder.kind": "kl", "autoencoder.random_init": True}


@pytest.mark.parametrize("name", [*RUNS, "encoders with weights"])
def test_no_operation_of_a_step_waits_for_a_device(tmp_path, name):
    """On torch's stand-in for a device that computes nothing: its values cannot be read, whatever asks for them."""
    take, current = prepare(RUNS[name] if name in RUNS else models(tmp_path), META, 1)
    with NeverWaiting():
        _, out = take(current, 0)
    assert all(value.device == META for value in out.values())


@pytest.mark.parametrize("fault", ["a copy that blocks", "a value that is read", "a choice by value"])
def test_a_step_that_waits_is_found(monkeypatch, fault):
    take, current = prepare({}, META, 1)
    if fault == "a copy that blocks":
        monkeypatch.setattr(step, "to_device", lambda x, device: x.to(device))
    else:
        apply = step.apply

        def reading(here, grads, loss, *args, **kwargs):
            loss = loss * float(loss) if fault == "a value that is read" else loss[loss > 0].sum()
            return apply(here, grads, loss, *args, **kwargs)

        monkeypatch.setattr(step, "apply", reading)
    with NeverWaiting(), pytest.raises((Waits, RuntimeError, NotImplementedError)):
        take(current, 0)


@needs_cuda
@pytest.mark.parametrize("name", [*RUNS, "encoders with weights"])
def test_cuda_never_waits_in_a_step(tmp_path, name):
    take, current = prepare(RUNS[name] if name in RUNS else models(tmp_path), CUDA, 3)
    current, _ = take(current, 0)  # libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in (1, 2):
            current, out = take(current, i)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(value) for value in out.values())


@needs_cuda
@pytest.mark.parametrize("remat", ["none", "full"])
def test_cuda_graphs_change_nothing_but_rounding(remat):
    fields, losses = {"remat.policy": remat, "train.accumulate": 2}, {}
    graphs = {"compile.enabled": True, "compile.mode": "reduce-overhead"}
    for kind, more in (("eager", {}), ("graphs", graphs)):
        take, current = prepare({**fields, **more}, CUDA, 6)
        losses[kind] = []
        for i in range(6):
            current, out = take(current, i)
            losses[kind].append(float(out["loss"]))
    assert losses["graphs"] == pytest.approx(losses["eager"], rel=1e-4)
