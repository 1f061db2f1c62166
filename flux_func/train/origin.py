"""What sample_main draws from: a run's checkpoint, or a whole pipeline of diffusers'."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections
import torch

from flux_func import config as configs
from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import pipelines
from flux_func.launch import processes
from flux_func.models import flux
from flux_func.models.layers import Params
from flux_func.parallel import placements
from flux_func.parallel.mesh import ONE, Mesh
from flux_func.parallel.sharding import ONE_PROCESS, Sharding
from flux_func.train import adapt, checkpoint, encoders, state
from flux_func.transforms import lora

# How FLUX.1's two distilled models are sampled, by whether they have a guidance embedding: dev and schnell.
_USUAL = {
    True: {"sample.steps": 50, "sample.guidance": 3.5, "text.max_length": 512},
    False: {"sample.steps": 4, "text.max_length": 256},
}
_PIXELS = 1024


@dataclass(frozen=True)
class Origin:
    """A model to draw from, checked, its weights not yet read.

    Attributes:
      name: what messages call the model.
      config: a run's, or what stands for one: encoders, numerics.compute, sizes and the settings of config.sample.
      cfg: the model.
      encoders: (config, device, mesh) to the encoders; see `encoders.build`.
      load: (type, sharding) to what this process has of the parameters, no more of which it reads.
      about: what tells the weights from others, for the pictures' metadata.
      loras: those of these weights that it is, each whole and on the CPU, with its weight.
    """

    name: str
    config: ml_collections.ConfigDict
    cfg: flux.FluxConfig
    encoders: Callable[[ml_collections.ConfigDict, torch.device, Mesh], encoders.Encoders]
    load: Callable[[torch.dtype, Sharding], Params]
    about: dict[str, Any]
    loras: tuple[tuple[lora.Lora, float], ...] = ()


def of_run(workdir: str, step: int | None = None, ema: bool = False) -> Origin:
    """Returns a run's checkpoint, or its averaged weights; UserError where there is none."""
    config = read_config(workdir)
    step, member = choose_step(workdir, step), "ema" if ema else "params"
    if member not in checkpoint.members(workdir, step):
        raise UserError(f"--ema is True: the checkpoint of step {step} holds no average (ema.decay); leave --ema out")
    cfg = checkpoint.read_model(workdir, step)
    weights = adapt.find(config, cfg) if config.lora.rank else None

    def build(config: ml_collections.ConfigDict, device: torch.device, mesh: Mesh = ONE) -> encoders.Encoders:
        return encoders.build(config, cfg, device, mesh)

    def base(dtype: torch.dtype, sharding: Sharding = ONE_PROCESS) -> Params:
        with processes.together():
            return state.initial(config, cfg, dtype, sharding.device or torch.device("cpu"), weights, sharding)

    def load(dtype: torch.dtype, sharding: Sharding = ONE_PROCESS) -> Params:
        like, places = {member: flux.abstract(cfg, dtype)}, None
        if sharding.params is not None:
            places = tree.flatten({member: sharding.params})
        found = checkpoint.restore(
            workdir, step, like, sharding.device or "cpu", cast=True, placements=places, mesh=sharding.mesh
        )
        return placements.shards(found[member])

    about = {"flavor": config.model.flavor, "step": step, "ema": ema}
    if config.lora.rank:
        adapted = ((adapt.of_run(workdir, step, ema), 1.0),)
        return Origin("the model of this run", config, cfg, build, base, about, adapted)
    return Origin("the model of this run", config, cfg, build, load, about)


def of_pipeline(folder: str) -> Origin:
    """Returns the pipeline in a folder, set as its makers sample it, in float32 where its weights are in that type.

    Raises:
      UserError: naming --weights: no FLUX.1 pipeline, or one that needs more than text.
    """
    with _naming_weights(folder):
        pipeline = pipelines.open_pipeline(folder)
    weights = state.find_weights(folder, "transformer", "--weights")
    state.check_text_to_image(weights, "--weights", folder)
    config = configs.default()
    config.update_from_flattened_dict(
        {
            "autoencoder.kind": "kl",
            "autoencoder.path": folder,
            "text.kind": "hf",
            "text.path": folder,
            "data.image_size": _PIXELS,
            "numerics.compute": "float32" if set(weights.dtypes.values()) == {torch.float32} else "bfloat16",
            "sample.shift": pipeline.shift,
            **_USUAL[weights.cfg.guidance_embed],
        }
    )

    def build(config: ml_collections.ConfigDict, device: torch.device, mesh: Mesh = ONE) -> encoders.Encoders:
        with _naming_weights(folder):
            return encoders.build(config, weights.cfg, device, mesh)

    def load(dtype: torch.dtype, sharding: Sharding = ONE_PROCESS) -> Params:
        with processes.together():
            return state.read_weights(weights, dtype, sharding.device or torch.device("cpu"), sharding)

    return Origin("the model of this pipeline", config, weights.cfg, build, load, {"weights": folder})


@contextlib.contextmanager
def _naming_weights(folder: str) -> Iterator[None]:
    # What is wrong with a pipeline's part is said of the flag, and not of the field that stands for it.
    try:
        yield
    except UserError as error:
        said = str(error).removeprefix(f"{folder}: ")
        raise UserError(f"--weights is {folder!r}: {said.partition(f'.path is {folder!r}: ')[2] or said}") from error


def read_config(workdir: str) -> ml_collections.ConfigDict:
    """Returns the configuration that a run left in its workdir; UserError where there is none, or it is not ours."""
    path = Path(workdir) / "config.json"
    config = configs.default()
    try:
        saved = json.loads(path.read_text())
        configs.check_known([*saved, *dict(configs.flat(saved))])
        config.update(saved)
    except OSError as error:
        remedy = "should be the --workdir of a train_main run"
        raise UserError(f"--workdir is {workdir!r}: {path} cannot be read ({error.strerror}); {remedy}") from error
    except (UserError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--workdir is {workdir!r}: {path} is not a config of this version ({error})") from error
    configs.validate(config)
    return config


def choose_step(workdir: str, step: int | None) -> int:
    """Returns the step asked for, or the newest; UserError names the steps there are."""
    steps = checkpoint.steps(workdir)
    if not steps:
        raise UserError(f"--workdir is {workdir!r}: there is no checkpoint in it yet; train_main writes them")
    if step is not None and step not in steps:
        raise UserError(f"--step is {step}: should be one of {', '.join(map(str, steps))}, which {workdir} holds")
    return steps[-1] if step is None else step
