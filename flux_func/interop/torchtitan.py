"""torchtitan's names: BFL's, but for `.weight` where BFL says `.scale`. Its autoencoder's are BFL's.

After pytorch/torchtitan 0.3.0, `models/flux/model/`.
"""

from flux_func.interop import bfl
from flux_func.interop.spans import Layout, layout
from flux_func.models.flux import FluxConfig

# torchtitan computes the query and key norms with it; BFL and diffusers with 1e-6.
QK_NORM_EPS = 1e-5


def name(path: str) -> str:
    """Returns torchtitan's name of one of our leaves."""
    return f"{path.removesuffix('.scale')}.weight" if path.endswith(".scale") else path


def transformer(cfg: FluxConfig) -> Layout:
    """Returns the layout of a torchtitan state dict."""
    return layout(bfl.paths(cfg), lambda path, shape: [(name(path), 0, shape[0])])
