"""Files that are not FLUX.1's weights are said to be what they are, and pickles are never opened."""

import pickle

import pytest
import torch
from safetensors.torch import save

from flux_func.errors import UserError
from flux_func.interop import bfl, diffusers, strangers, torchtitan
from flux_func.models import flux
from flux_func.models.autoencoder import AutoencoderConfig

# Names as the tools write them.
NAMES = {
    "LoRA": [
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer.single_transformer_blocks.0.attn.to_q.lora_B.default.weight",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "double_blocks.0.img_attn.qkv.lora_A.weight",
        "double_blocks.0.processor.qkv_lora1.down.weight",
        "unet.down_blocks.0.attentions.0.to_q_lora.up.weight",
        "lora_unet_double_blocks_0_img_mlp_0.lokr_w1",
    ],
    "bitsandbytes": [
        "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4",
        "transformer_blocks.0.attn.to_q.weight.absmax",
    ],
    "fp8": ["scaled_fp8", "model.diffusion_model.scaled_fp8", "double_blocks.0.img_attn.qkv.scale_weight"]
    + ["double_blocks.0.img_attn.qkv.weight_scale", "double_blocks.0.img_attn.qkv.comfy_quant"],
    "Nunchaku": ["transformer_blocks.0.qkv_proj.qweight"],
    "FLUX.2": ["double_stream_modulation_img.lin.weight", "single_stream_modulation.linear.weight"],
    "FLUX.2's autoencoder": ["bn.running_mean"],
    "Chroma": ["distilled_guidance_layer.norms.0.scale", "distilled_guidance_layer.in_proj.weight"],
    "ControlNet": ["controlnet_blocks.0.weight", "controlnet_x_embedder.weight", "input_hint_block.0.weight"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "pos_embed.proj.weight"],
    "SDXL": [
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "model.diffusion_model.label_emb.0.0.weight",
        "add_embedding.linear_1.weight",
    ],
    "Stable Diffusion 1 or 2": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    ],
    "Stable Diffusion's autoencoder": ["quant_conv.weight", "first_stage_model.post_quant_conv.weight"],
    "T5": ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    "CLIP": ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
    "Redux": ["redux_up.weight"],
}


@pytest.mark.parametrize("what, name", [(what, name) for what, names in NAMES.items() for name in names])
def test_it_is_said_to_be_what_it_is(what, name):
    said = strangers.name(["img_in.weight", "double_blocks.0.img_attn.qkv.weight", name])
    assert said.startswith("is ") and what in said and repr(name) in said and "; " in said


def test_fluxs_own_names_are_no_strangers():
    cfg, kl = flux.flavor("flux-dev"), AutoencoderConfig(kind="kl")
    layouts = [
        bfl.transformer(cfg),
        diffusers.transformer(cfg),
        torchtitan.transformer(cfg),
        bfl.vae(kl),
        diffusers.vae(kl),
    ]
    for layout in layouts:
        assert strangers.name(layout.theirs) == ""


class Trap:
    def __reduce__(self):
        raise AssertionError("a pickle of this was made or opened")


@pytest.mark.parametrize(
    "name", ["flux.pt", "flux.pth", "diffusion_pytorch_model.bin", "flux.ckpt", "flux.safetensors", "f"]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path, monkeypatch, name, zipped):
    path = tmp_path / name
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped)
    for module, opens in ((pickle, "Unpickler"), (pickle, "load"), (torch, "load")):
        monkeypatch.setattr(module, opens, Trap)
    with pytest.raises(UserError, match="is a pickle, .* never opened; .*weights_only=True") as caught:
        strangers.refuse(path)
    assert f"{path}: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "start, words",
    [
        (b"", "is empty"),
        (b"GGUF\x03\x00\x00\x00\x01\x02", "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"<!doctype html><html>", "a web page"),
    ],
)
def test_other_contents_are_named(tmp_path, start, words):
    (tmp_path / "flux.safetensors").write_bytes(start)
    with pytest.raises(UserError, match=words):
        strangers.refuse(tmp_path / "flux.safetensors")


def test_a_header_whose_length_resembles_a_pickle_is_no_pickle(tmp_path):
    # 0x0280 bytes: the first two of the file are those of a pickle of protocol 2.
    for length in range(100, 600):
        raw = save({"a" * length: torch.zeros(1)})
        if raw[:2] == b"\x80\x02":
            break
    else:
        raise AssertionError("no such length")
    (tmp_path / "x.bin").write_bytes(raw)
    strangers.refuse(tmp_path / "x.bin")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="none.bin: cannot be read"):
        strangers.refuse(tmp_path / "none.bin")
