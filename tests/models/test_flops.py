import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flux_func import tree
from flux_func.models import flops, flux

# Image tokens and text tokens: those of flux-debug at 256 pixels, and of 64 pixels with a short text.
SIZES = [(256, 256), (16, 8)]


def counted(cfg: flux.FluxConfig, image_tokens: int, text_tokens: int) -> tuple[int, int]:
    """Returns torch's own count of the forward pass and of forward and backward, on the meta device."""
    side, meta = 2 * int(image_tokens**0.5), {"device": "meta"}
    params = tree.map(torch.Tensor.requires_grad_, flux.abstract(cfg))
    with FlopCounterMode(display=False) as counter:
        out = flux.apply(
            params,
            cfg,
            img=torch.empty(1, image_tokens, cfg.in_channels, **meta),
            img_ids=flux.image_ids(side, side, **meta),
            txt=torch.empty(1, text_tokens, cfg.context_in_dim, **meta),
            txt_ids=flux.text_ids(text_tokens, **meta),
            timesteps=torch.empty(1, **meta),
            y=torch.empty(1, cfg.vec_in_dim, **meta),
            guidance=torch.empty(1, **meta) if cfg.guidance_embed else None,
        )
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("name", flux.FLAVORS)
def test_counts_as_torch_counts(name):
    cfg = flux.flavor(name)
    for image_tokens, text_tokens in SIZES:
        forward, both = counted(cfg, image_tokens, text_tokens)
        # What the formula counts and is not computed: the text's second linear in the last block.
        unread = 2 * text_tokens * (cfg.hidden_size + cfg.mlp_size) * cfg.hidden_size
        assert flops.forward_flops(cfg, image_tokens, text_tokens) == pytest.approx(forward + unread, rel=1e-6)
        assert flops.training_flops(cfg, image_tokens, text_tokens) == pytest.approx(both + 3 * unread, rel=1e-6)


@pytest.mark.parametrize("name", flux.FLAVORS)
def test_parameters_are_those_of_the_tree(name):
    cfg = flux.flavor(name)
    assert flops.parameters(cfg) == sum(leaf.numel() for leaf in tree.leaves(flux.abstract(cfg)))


def test_parameters_without_qkv_bias():
    cfg = flux.FluxConfig(
        hidden_size=32, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6), qkv_bias=False
    )
    assert flops.parameters(cfg) == sum(leaf.numel() for leaf in tree.leaves(flux.abstract(cfg)))


def test_published_figures():
    cases = {"flux-dev": 11_901_408_320, "flux-schnell": 11_891_178_560, "flux-debug": 258_286_144}
    assert {name: flops.parameters(flux.flavor(name)) for name in cases} == cases
    # NVIDIA's own figure for MLPerf's flux-dev: 20.3 TFLOP per training sample of 256x256 pixels.
    assert flops.training_flops(flux.flavor("flux-dev"), 256, 256) == pytest.approx(20.3e12, rel=0.01)
    assert flops.training_flops(flux.flavor("flux-dev"), 4096, 512) == pytest.approx(223e12, rel=0.01)


def test_training_is_three_forward_passes_of_a_large_model():
    cfg = flux.flavor("flux-dev")
    assert flops.training_flops(cfg, 256, 256) == pytest.approx(3 * flops.forward_flops(cfg, 256, 256), rel=1e-3)
