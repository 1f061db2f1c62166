"""The formats by name: each one's layout of a model, and what our files say of theirs."""

import json

from flux_func.interop import bfl, diffusers, torchtitan
from flux_func.interop.spans import Layout
from flux_func.interop.stored import Config, part_of, to_json

# A folder of a format that has no field for the configuration says it in this file.
SIDECAR = "flux_func.json"
_LAYOUTS = {
    ("transformer", "bfl"): bfl.transformer,
    ("transformer", "diffusers"): diffusers.transformer,
    ("transformer", "torchtitan"): torchtitan.transformer,
    ("transformer", "orbax"): bfl.transformer,
    ("autoencoder", "bfl"): bfl.vae,
    ("autoencoder", "diffusers"): diffusers.vae,
    ("autoencoder", "torchtitan"): bfl.vae,
    ("autoencoder", "orbax"): bfl.vae,
}


def layout(cfg: Config, format: str) -> Layout:
    """Returns the layout of a model in "bfl", "diffusers", "torchtitan" or "orbax"."""
    return _LAYOUTS[part_of(cfg), format](cfg)


def qk_norm_eps(format: str) -> float:
    """Returns the epsilon of the query and key norms that a format's programs compute with, which no file says."""
    return torchtitan.QK_NORM_EPS if format == "torchtitan" else diffusers.FIXED["qk_norm_eps"]


def metadata(cfg: Config) -> dict[str, str]:
    """Returns the metadata of our safetensors files: "format", which transformers wants, and the configuration."""
    return {"format": "pt", "flux_func": json.dumps(to_json(cfg))}
