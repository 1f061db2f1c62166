"""Every format's names, shapes and counts are those of its own reference, at full size and without memory."""

import dataclasses
import json
import math

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from fluxbfl.model import Flux, FluxParams
from fluxbfl.modules.autoencoder import AutoEncoder, AutoEncoderParams
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flux_func.interop import bfl, diffusers, formats, torchtitan
from flux_func.interop.stored import from_json, to_json
from flux_func.models import autoencoder, flux

DEV, KL = flux.flavor("flux-dev"), autoencoder.AutoencoderConfig(kind="kl")
COUNTS = {"flux-dev": (780, 11_901_408_320), "flux-schnell": (776, 11_891_178_560)}
FILL = dataclasses.replace(DEV, in_channels=384)
SMALL = st.builds(
    lambda heads, axes, **fields: flux.FluxConfig(
        hidden_size=heads * sum(axes), num_heads=heads, axes_dim=axes, vec_in_dim=8, context_in_dim=12, **fields
    ),
    heads=st.integers(1, 3),
    axes=st.sampled_from([(2, 2, 4), (4, 4, 4), (2, 6)]),
    depth=st.integers(0, 2),
    depth_single_blocks=st.integers(0, 3),
    guidance_embed=st.booleans(),
    in_channels=st.sampled_from([4, 64]),
    out_channels=st.sampled_from([4, 64]),
)


def shapes_of(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def params_of(cfg):
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(cfg).items()}
    return FluxParams(**{name: value for name, value in fields.items() if name != "qk_norm_eps"})


@pytest.mark.parametrize("cfg", [DEV, flux.flavor("flux-schnell"), FILL], ids=["dev", "schnell", "Fill"])
def test_the_full_transformer_is_each_references(cfg):
    with torch.device("meta"):
        references = {"bfl": Flux(params_of(cfg)), "diffusers": FluxTransformer2DModel(**fields_of(cfg))}
    for format, module in references.items():
        assert formats.layout(cfg, format).theirs == shapes_of(module)
    ours = formats.layout(cfg, "torchtitan").theirs
    assert ours == {name.replace(".scale", ".weight"): shape for name, shape in shapes_of(references["bfl"]).items()}


def fields_of(cfg):
    return {name: value for name, value in diffusers.transformer_json(cfg).items() if name[0] != "_"}


@pytest.mark.parametrize("name, tensors, parameters", [(name, *counts) for name, counts in COUNTS.items()])
def test_the_counts_are_the_published_ones(name, tensors, parameters):
    for format in ("bfl", "torchtitan", "diffusers"):
        layout = formats.layout(flux.flavor(name), format)
        assert sum(math.prod(shape) for shape in layout.theirs.values()) == parameters
        assert format == "diffusers" or len(layout.theirs) == tensors


def test_the_full_autoencoder_is_each_references():
    with torch.device("meta"):
        bfls = AutoEncoder(AutoEncoderParams(256, 3, 128, 3, [1, 2, 4, 4], 2, 16, 0.3611, 0.1159))
        fields = {name: value for name, value in diffusers.vae_json(KL).items() if name[0] != "_"}
        theirs = AutoencoderKL(**fields)
    assert formats.layout(KL, "bfl").theirs == formats.layout(KL, "torchtitan").theirs == shapes_of(bfls)
    assert formats.layout(KL, "diffusers").theirs == shapes_of(theirs)
    assert (theirs.config.scaling_factor, theirs.config.shift_factor) == (0.3611, 0.1159)


@given(SMALL, st.sampled_from(["bfl", "diffusers", "torchtitan"]))
@settings(max_examples=40, deadline=None)
def test_every_row_of_either_side_is_in_the_table_once(cfg, format):
    layout = formats.layout(cfg, format)
    for shapes, key, start in ((layout.ours, "path", "start"), (layout.theirs, "name", "name_start")):
        rows = {name: [] for name in shapes}
        for span in layout.spans:
            first = getattr(span, start)
            rows[getattr(span, key)] += range(first, first + span.rows)
        assert {name: sorted(found) for name, found in rows.items()} == {
            n: list(range(s[0])) for n, s in shapes.items()
        }


@given(SMALL)
@settings(max_examples=20, deadline=None)
def test_diffusers_module_of_our_config_json_has_our_names(cfg):
    if len(cfg.axes_dim) == 3 and cfg.depth + cfg.depth_single_blocks:
        saved = json.loads(json.dumps(diffusers.transformer_json(cfg)))
        with torch.device("meta"):
            module = FluxTransformer2DModel.from_config(saved)
        assert formats.layout(cfg, "diffusers").theirs == shapes_of(module)
    assert diffusers.transformer_config(diffusers.transformer_json(cfg)) == cfg


def test_the_last_modulation_is_turned_once_and_no_other():
    """BFL's adaLN holds shift before scale, diffusers' norm_out scale before shift."""
    layout, size = formats.layout(DEV, "diffusers"), DEV.hidden_size
    turned = {span.path for span in layout.spans if span.name_start != span.start and span.name.startswith("norm_out")}
    assert turned == {"final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias"}
    halves = [(span.start, span.name_start) for span in layout.spans if span.name == "norm_out.linear.bias"]
    assert sorted(halves) == [(0, size), (size, 0)]
    others = [span for span in layout.spans if span.path not in turned]
    assert all(span.name_start == 0 for span in others)
    for format in ("bfl", "torchtitan"):
        assert all(span.start == span.name_start == 0 for span in formats.layout(DEV, format).spans)


@pytest.mark.parametrize("cfg", [DEV, KL, dataclasses.replace(DEV, qk_norm_eps=torchtitan.QK_NORM_EPS)])
def test_json_gives_back_the_configuration(cfg):
    assert from_json(json.loads(json.dumps(to_json(cfg)))) == cfg
    assert json.loads(formats.metadata(cfg)["flux_func"]) == json.loads(json.dumps(to_json(cfg)))


def test_bfl_shapes_give_back_the_configuration():
    for cfg in (DEV, FILL, flux.flavor("flux-digits")):
        assert bfl.transformer_config(bfl.paths(cfg)) == cfg
    assert bfl.vae_config(autoencoder.shapes(KL)) == KL


@given(st.integers(1, 40), st.integers(1, 25_000))
@example(7, 899)  # 896 * (899 / 896) is below 899
@example(24, 12_288)
@settings(max_examples=50, deadline=None)
def test_any_width_of_the_hidden_layer_is_told_by_shapes(heads, width):
    cfg = dataclasses.replace(DEV, hidden_size=heads * 128, num_heads=heads, depth=1, depth_single_blocks=0)
    shapes = bfl.paths(cfg) | {"double_blocks.0.img_mlp.0.weight": (width, cfg.hidden_size)}
    told = bfl.transformer_config(shapes)
    # As BFL and torchtitan compute it.
    assert told.mlp_size == int(told.hidden_size * told.mlp_ratio) == width
    assert told.mlp_ratio == pytest.approx(width / cfg.hidden_size, rel=1e-15)


@pytest.mark.parametrize(("field", "value"), [("norm_num_groups", 16), ("act_fn", "gelu"), ("use_quant_conv", True)])
def test_a_field_of_config_json_that_is_not_flux_is_not_ignored(field, value):
    with pytest.raises(ValueError, match=f"{field} in its config.json is {value!r}"):
        diffusers.vae_config({**diffusers.vae_json(KL), field: value})
    with pytest.raises(ValueError, match="patch_size in its config.json is 2, FLUX's is 1"):
        diffusers.transformer_config({"patch_size": 2})
