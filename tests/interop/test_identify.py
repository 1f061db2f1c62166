"""The model, its variant and its format told from names and shapes; whatever does not fit is listed."""

import dataclasses
import json
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func.errors import UserError
from flux_func.interop import formats, identify, torchtitan
from flux_func.interop.safetensors_io import Tensors
from flux_func.interop.stored import to_json
from flux_func.models import flux
from flux_func.models.autoencoder import AutoencoderConfig

DEV, KL = flux.flavor("flux-dev"), AutoencoderConfig(kind="kl")
FORMATS = ("bfl", "diffusers", "torchtitan")
VARIANTS = {
    "dev, Krea and Kontext": DEV,
    "schnell": flux.flavor("flux-schnell"),
    "Fill": dataclasses.replace(DEV, in_channels=384),
    "Canny and Depth": dataclasses.replace(DEV, in_channels=128),
    "debug": flux.flavor("flux-debug"),
    "digits": flux.flavor("flux-digits"),
    "two blocks": dataclasses.replace(DEV, depth=1, depth_single_blocks=2, mlp_ratio=2.0),
}


def tensors(shapes, metadata=None, dtype=torch.bfloat16):
    return Tensors(shapes, dict.fromkeys(shapes, dtype), metadata or {}, lambda name, first, last: (name, first, last))


def shapes_of(cfg, format="bfl", **changes):
    found = dict(formats.layout(cfg, format).theirs) | changes
    return {name: shape for name, shape in found.items() if shape is not None}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_shapes_tell_the_variant(cfg, format):
    stored = identify.stored("x", tensors(shapes_of(cfg, format)))
    # torchtitan computes the query and key norms with another epsilon, and its files do not say so.
    eps = torchtitan.QK_NORM_EPS if format == "torchtitan" else 1e-6
    assert (stored.format, stored.cfg) == (format, dataclasses.replace(cfg, qk_norm_eps=eps))
    assert stored.left_out == ()


@pytest.mark.parametrize("format", ["bfl", "diffusers"])
@pytest.mark.parametrize("cfg", [KL, dataclasses.replace(KL, ch=32, ch_mult=(1, 2, 3), num_res_blocks=1)])
def test_shapes_tell_the_autoencoder(cfg, format):
    stored = identify.stored("x", tensors(shapes_of(cfg, format)), "autoencoder")
    assert (stored.format, stored.cfg) == (format, cfg)


@pytest.mark.parametrize("format", FORMATS)
def test_our_files_say_all_that_shapes_do_not(format):
    cfg = dataclasses.replace(DEV, depth=1, depth_single_blocks=1, axes_dim=(32, 48, 48), theta=5000, qk_norm_eps=1e-4)
    said = {"flux_func": json.dumps(to_json(cfg))}
    assert identify.stored("x", tensors(shapes_of(cfg, format), said)).cfg == cfg


@pytest.mark.parametrize(
    "said", ["{}", "3", "no json", '{"model": "transformer"}', '{"model": "transformer", "depth": 1}']
)
def test_what_our_files_say_may_be_damaged(said):
    with pytest.raises(UserError, match="x: does not tell its model"):
        identify.stored("x", tensors(shapes_of(DEV), {"flux_func": said}))
    with pytest.raises(UserError, match="holds the transformer and says that it is the autoencoder"):
        identify.stored("x", tensors(shapes_of(DEV), {"flux_func": json.dumps(to_json(KL))}))


def test_comfyuis_prefix_and_its_other_branches():
    flux_shapes = {f"model.diffusion_model.{name}": shape for name, shape in shapes_of(DEV).items()}
    stored = identify.stored("x", tensors(flux_shapes))
    assert stored.cfg == DEV and stored.left_out == ()
    assert stored.read("img_in.weight", 0, 3) == ("model.diffusion_model.img_in.weight", 0, 3)

    branches = {f"vae.{name}": shape for name, shape in shapes_of(KL).items()}
    branches |= {"text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (4, 4)}
    stored = identify.stored("x", tensors(flux_shapes | branches))
    assert stored.cfg == DEV and stored.left_out == ("text_encoders (1 tensors)", "vae (244 tensors)")
    stored = identify.stored("x", tensors(flux_shapes | branches), "autoencoder")
    assert stored.cfg == KL and stored.left_out == ("model (780 tensors)", "text_encoders (1 tensors)")
    # ComfyUI says .weight for .scale as torchtitan does, and computes as BFL does.
    named = {f"model.diffusion_model.{name}": shape for name, shape in shapes_of(DEV, "torchtitan").items()}
    assert identify.stored("x", tensors(named)).cfg == DEV


def test_a_quantized_text_encoder_beside_the_model_is_no_matter():
    found = {f"model.diffusion_model.{name}": shape for name, shape in shapes_of(DEV).items()}
    found |= {"text_encoders.t5xxl.transformer.scaled_fp8": (0,)}
    assert identify.stored("x", tensors(found)).left_out == ("text_encoders (1 tensors)",)
    with pytest.raises(UserError, match="x: is quantized with scales"):
        identify.stored("x", tensors(found | {"model.diffusion_model.scaled_fp8": (0,)}))


@pytest.mark.parametrize("others", [True, False])
def test_a_models_tensor_outside_its_prefix_is_not_left_out(others):
    found = {f"model.diffusion_model.{name}": shape for name, shape in shapes_of(DEV).items()}
    message = "behind 'model.diffusion_model.', and 1 of its tensors without, such as 'single_blocks.38.linear1.bias'"
    with pytest.raises(UserError, match=message):
        identify.stored("x", tensors(found | {"single_blocks.38.linear1.bias": (3,)}), others=others)
    found = {f"vae.{name}": shape for name, shape in shapes_of(KL).items()} | {"decoder.conv_in.bias": (512,)}
    with pytest.raises(UserError, match="holds the autoencoder behind 'vae.', and 1 of its tensors without"):
        identify.stored("x", tensors(found), "autoencoder", others=others)


def test_a_training_checkpoints_other_branches_are_left_out_where_expected():
    found = shapes_of(DEV, "torchtitan") | {"optimizer.state.img_in.weight.exp_avg": (3072, 64), "lr_scheduler": ()}
    stored = identify.stored("x", tensors(found, {"train_state.step": "not a tensor"}), others=True)
    assert stored.left_out == ("lr_scheduler (1 tensors)", "optimizer (1 tensors)", "train_state (1 values)")
    with pytest.raises(UserError, match="not expected optimizer"):
        identify.stored("x", tensors(found))
    # What belongs to the model and is not in it is no other branch.
    with pytest.raises(UserError, match="not expected img_in.other"):
        identify.stored("x", tensors(found | {"img_in.other": (1,)}), others=True)


@pytest.mark.parametrize(
    "cfg, change",
    [
        (DEV, {"num_heads": 0}),
        (DEV, {"num_heads": 24.0}),
        (DEV, {"hidden_size": "3072"}),
        (DEV, {"depth": -1}),
        (DEV, {"qk_norm_eps": None}),
        (DEV, {"mlp_ratio": math.inf}),
        (KL, {"ch": 0}),
        (KL, {"ch_mult": [1, 0]}),
        (KL, {"ch_mult": []}),
        (KL, {"scale_factor": "0.3"}),
        (KL, {"shift_factor": math.nan}),
    ],
)
def test_numbers_that_cannot_be_are_named(cfg, change):
    said = {"flux_func": json.dumps(to_json(cfg) | change)}
    with pytest.raises(UserError, match=f"x: does not tell its model: {next(iter(change))} .* should be"):
        identify.stored("x", tensors(shapes_of(cfg), said))


def refused(cfg, format="bfl", **changes):
    with pytest.raises(UserError) as caught:
        identify.stored("x", tensors(shapes_of(cfg, format, **changes)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


NO_MODEL = {"img_in.weight": "bfl", "double_blocks.0.img_attn.norm.query_norm.scale": "bfl", "txt_in.weight": "bfl"}
NO_MODEL |= {"x_embedder.weight": "diffusers", "transformer_blocks.0.attn.norm_q.weight": "diffusers"}
NO_MODEL |= {"final_layer.linear.weight": "torchtitan", "double_blocks.3.txt_mlp.2.bias": "torchtitan"}


@pytest.mark.parametrize("name, format", NO_MODEL.items())
def test_one_missing_or_misshapen_tensor_is_all_that_is_listed(name, format):
    """Also where it is one that would tell the model."""
    assert f"1 tensor: missing {name} (nearest: " in refused(DEV, format, **{name: None})
    assert f"1 tensor: {name} is [5, 5] and should be [" in refused(DEV, format, **{name: (5, 5)})
    assert f"1 tensor: {name} is [] and should be [" in refused(DEV, format, **{name: ()})


def test_a_missing_block_is_that_blocks_tensors():
    gone = {name: None for name in shapes_of(DEV) if name.startswith("double_blocks.7.")}
    message = refused(DEV, **gone)
    assert f"{len(gone)} tensors: missing double_blocks.7." in message and "double_blocks.18" not in message
    assert f"and {len(gone) - 20} more" in message


def test_a_surplus_tensor_stands_beside_its_nearest():
    message = refused(DEV, **{"img_in.weight": None, "img_in.wieght": (3072, 64)})
    assert "missing img_in.weight (nearest: img_in.wieght)" in message
    assert "not expected img_in.wieght (nearest: img_in.weight)" in message


@pytest.mark.parametrize("format", FORMATS)
def test_the_guidance_embedder_is_never_dropped(format):
    guidance = [name for name in shapes_of(DEV, format) if "guidance" in name]
    assert len(guidance) == 4
    for name in guidance:
        assert f"1 tensor: missing {name}" in refused(DEV, format, **{name: None})
    # Where config.json denies it, it is an error too.
    if format == "diffusers":
        with pytest.raises(UserError, match="4 tensors: not expected time_text_embed.guidance_embedder"):
            saved = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": False}
            identify.stored("x", tensors(shapes_of(DEV, format)), saved=saved)


@given(st.sampled_from(FORMATS), st.lists(st.integers(0, 775), min_size=1, max_size=60, unique=True))
@settings(max_examples=5, deadline=None)
def test_every_missing_tensor_is_counted(format, places):
    found = shapes_of(flux.flavor("flux-schnell"), format)
    names = [list(found)[place] for place in places]
    started = time.process_time()
    message = refused(flux.flavor("flux-schnell"), format, **dict.fromkeys(names))
    assert f" {len(names)} tensor" in message and message.count("missing") == min(20, len(names))
    assert time.process_time() - started < 5


def test_heads_of_a_size_whose_axes_are_not_known():
    cfg = dataclasses.replace(DEV, hidden_size=192, num_heads=2, axes_dim=(32, 32, 32), depth=2, depth_single_blocks=2)
    assert "x: does not tell its model: its heads have 96 dimensions" in refused(cfg)
    assert "does not tell its model: 'img_in.weight' is missing" in refused(cfg, **{"img_in.weight": None})


def test_quantized_tensors_are_not_weights():
    with pytest.raises(UserError, match="is of type torch.int8, no weight or quantized"):
        identify.stored("x", tensors(shapes_of(DEV), dtype=torch.int8))


def test_the_other_part_and_others_still():
    with pytest.raises(UserError, match="x: is FLUX's transformer; its autoencoder is wanted"):
        identify.stored("x", tensors(shapes_of(DEV)), "autoencoder")
    with pytest.raises(UserError, match=r"x: is not recognized as FLUX's \(it holds a, b, c \.\.\.\)"):
        identify.stored("x", tensors(dict.fromkeys("abcd", (1,))))
    with pytest.raises(UserError, match="holds nothing"):
        identify.stored("x", tensors({}))
    with pytest.raises(UserError, match="x: is a LoRA"):
        identify.stored("x", tensors({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 4)}))


def test_kinds_are_the_parts_there_are():
    both = shapes_of(DEV) | shapes_of(KL, "diffusers")
    assert identify.kinds(both) == [("transformer", "bfl", ""), ("autoencoder", "diffusers", "")]
    assert identify.kinds(["shared.weight"]) == []


def test_a_name_with_an_index_far_off_does_not_make_a_model_of_that_depth():
    message = refused(DEV, **{"double_blocks.999999999.img_attn.qkv.weight": (1,)})
    assert "1 tensor: not expected double_blocks.999999999." in message
