"""FLUX as pure functions over parameter pytrees: `import flux_func as ff`."""

from flux_func import tree
from flux_func.flow import losses, meanflow, timesteps
from flux_func.flow.path import loss
from flux_func.flow.sampler import sample, velocity
from flux_func.interop.weights import load, save
from flux_func.models import autoencoder, text
from flux_func.models.flux import FLAVORS, FluxConfig, abstract, apply, chain, flavor, init
from flux_func.models.layers import Ops
from flux_func.models.stages import Stage
from flux_func.parallel.fold import grad_and_value
from flux_func.train import optimizer
from flux_func.transforms import attribution, curvature, ema, likelihood, lora, per_sample, remat, weights

__version__ = "0.1.0"
__all__ = [
    "FLAVORS",
    "FluxConfig",
    "Ops",
    "Stage",
    "abstract",
    "apply",
    "attribution",
    "autoencoder",
    "chain",
    "curvature",
    "ema",
    "flavor",
    "grad_and_value",
    "init",
    "likelihood",
    "load",
    "lora",
    "loss",
    "losses",
    "meanflow",
    "optimizer",
    "per_sample",
    "remat",
    "sample",
    "save",
    "text",
    "timesteps",
    "tree",
    "velocity",
    "weights",
]
