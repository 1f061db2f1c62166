"""Black Forest Labs' own code, as fluxbfl packages it."""

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

from bfl_modules import (  # noqa: F401 (what answer.py asks each reference for)
    IMAGE,
    TIME,
    blocks,
    double_in,
    double_out,
    single_in,
    single_out,
    velocity,
)
from torch import Tensor, nn

DISTRIBUTION = "fluxbfl"


@contextlib.contextmanager
def _without_cameras() -> Iterator[None]:
    """Stands in for two modules that sampling.py imports for control images (OpenCV, watermarks) alone."""
    names = {
        "fluxbfl.modules.image_embedders": ("CannyImageEncoder", "DepthImageEncoder", "ReduxImageEncoder"),
        "fluxbfl.util": ("PREFERED_KONTEXT_RESOLUTIONS",),
    }
    absent = [module for module in names if module not in sys.modules]
    sys.modules.update({module: types.SimpleNamespace(**dict.fromkeys(names[module], object)) for module in absent})
    try:
        yield
    finally:
        for module in absent:
            del sys.modules[module]


with _without_cameras():
    from fluxbfl import model as models
    from fluxbfl import sampling
    from fluxbfl.modules import autoencoder as autoencoders
    from fluxbfl.modules import layers


def transformer(cfg: dict) -> nn.Module:
    """Returns the model, its weights yet to come."""
    return models.Flux(models.FluxParams(**{name: value for name, value in cfg.items() if name != "qk_norm_eps"}))


def pack(latents: Tensor) -> Tensor:
    """Returns patches of latents [B, c, h, w]."""
    return prepare(latents, latents.new_zeros(len(latents), 1, 1), latents.new_zeros(len(latents), 1))["img"]


def prepare(latents: Tensor, txt: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Returns patches and positions, txt and y as the model takes them."""
    given = sampling.prepare(lambda prompts: txt, lambda prompts: y, latents, [""] * len(latents))
    return {"y" if name == "vec" else name: value for name, value in given.items()}


def embedding(model: nn.Module, values: Tensor) -> Tensor:
    """Returns the sinusoidal features of timesteps or guidance."""
    del model
    return layers.timestep_embedding(values, 256)


def rope(args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Returns cosines and sines [L, D/2] of the rotary table that goes into a double block."""
    table = kwargs["pe"][0].flatten(0, -4)
    return {"cos": table[..., 0, 0], "sin": table[..., 1, 0]}


def schedule(steps: int, image_tokens: int, shift: bool) -> list[float]:
    """Returns timesteps [steps + 1]."""
    return sampling.get_schedule(steps, image_tokens, shift=shift)


def sample(model: nn.Module, inputs: dict[str, Tensor], settings: dict) -> Tensor:
    """Returns the latents at the end of the reference's own sampling loop, which has no classifier-free guidance."""
    given, (height, width) = prepare(inputs["noise"], inputs["txt"], inputs["y"]), inputs["noise"].shape[2:]
    given["vec"] = given.pop("y")
    timesteps = schedule(settings["steps"], given["img"].shape[1], settings["shift"])
    guidance = {} if settings["guidance"] is None else {"guidance": settings["guidance"]}
    end = sampling.denoise(model, **given, timesteps=timesteps, **guidance)
    return sampling.unpack(end, 8 * height, 8 * width)


def autoencoder(cfg: dict) -> nn.Module:
    """Returns the autoencoder, its weights yet to come."""
    fields = {name: value for name, value in cfg.items() if name != "kind"}
    return autoencoders.AutoEncoder(autoencoders.AutoEncoderParams(resolution=256, in_channels=3, out_ch=3, **fields))


def encode(model: nn.Module, images: Tensor, draw: bool) -> Tensor:
    """Returns latents: a draw from the posterior, or its mean."""
    model.reg.sample = draw
    return model.encode(images)


def decode(model: nn.Module, latents: Tensor) -> Tensor:
    """Returns images."""
    return model.decode(latents)
