"""Files that look like FLUX's weights and are not: what each is, and what to do instead.

Names as their own projects write them: diffusers, kohya-ss/sd-scripts, XLabs-AI/x-flux, black-forest-labs/flux2,
comfyanonymous/ComfyUI, bitsandbytes, ggml.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from flux_func.errors import UserError

_FULL = "use the model's full weights"
# (what a name of it looks like, what it is, what to do instead); the first that any name fits decides.
_BY_NAME = (
    (
        r"lora_(A|B|down|up)\b|lora\d?\.(down|up)\b|\.(lokr|hada|oft)_|\.dora_scale$",
        "a LoRA",
        "load the base model that it was trained on; a LoRA is no model by itself",
    ),
    (r"\.weight\.(absmax|quant_map|quant_state\.)", "quantized by bitsandbytes (nf4 or fp4)", _FULL),
    (r"(^|\.)scaled_fp8$|\.(scale_weight|weight_scale|comfy_quant)$", "quantized with scales (ComfyUI's fp8)", _FULL),
    (r"\.(qweight|wscales|smooth_factor)$", "quantized (Nunchaku's or GPTQ's)", _FULL),
    (r"(double_stream_modulation_img|single_stream_modulation)\.lin", "FLUX.2", "FLUX.1 alone is read"),
    (r"distilled_guidance_layer\.", "Chroma", "FLUX.1 alone is read"),
    (r"controlnet_(blocks|x_embedder|single_blocks)\b|input_hint_block\.", "a ControlNet", "give its base model"),
    (r"^(model\.diffusion_model\.)?joint_blocks\.|^pos_embed\.proj\.", "Stable Diffusion 3", ""),
    (r"^conditioner\.embedders\.|^(model\.diffusion_model\.)?label_emb\.|^add_embedding\.linear_1\.", "SDXL", ""),
    (r"^(model\.diffusion_model\.)?input_blocks\.|^down_blocks\.\d+\.attentions\.", "Stable Diffusion 1 or 2", ""),
    (r"^bn\.running_(mean|var)$", "FLUX.2's autoencoder", ""),
    (r"^(first_stage_model\.|vae\.)?(post_)?quant_conv\.", "Stable Diffusion's autoencoder", ""),
    (r"^encoder\.block\.\d+\.layer\.\d+\.", "T5", "it is text encoder 2 of a pipeline, not its transformer"),
    (r"^text_model\.(encoder|embeddings)\.", "CLIP", "it is the text encoder of a pipeline, not its transformer"),
    (r"^redux_(up|down)\.|^ip_adapter|^image_proj", "an image adapter (Redux, IP-Adapter)", "give its base model"),
)
_BY_START = (
    (b"GGUF", "a GGUF file, quantized", _FULL + ", a .safetensors file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it with: git lfs pull"),
    (b"<!", "a web page", "download the file again; it may need a login"),
)
# torch.save's zip archives, and bare pickles by their protocol.
_PICKLE_STARTS = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
# Of weights that are not read.
SUFFIXES = (*_PICKLES, ".gguf")


def name(names: Iterable[str]) -> str:
    """Returns what else than FLUX.1's transformer or autoencoder has such names, and the remedy; "" if unknown."""
    # A text encoder beside the model in an all-in-one file may be quantized, or anything; it is not read.
    names = tuple(name for name in names if not name.startswith("text_encoders."))
    for pattern, what, remedy in _BY_NAME:
        search = re.compile(pattern).search
        if found := next((name for name in names if search(name)), None):
            return f"is {what} (it holds {found!r}); {remedy or 'FLUX.1 alone is read'}"
    return ""


def refuse(path: Path) -> None:
    """Raises UserError for a file whose first bytes, or else whose name, are not a safetensors file's."""
    start = _start(path)
    # The header of JSON comes first, whatever the eight bytes of its length resemble.
    if start[8:9] == b"{":
        return
    if not start:
        raise UserError(f"{path}: is empty; get it again")
    for magic, what, remedy in _BY_START:
        if start.startswith(magic):
            raise UserError(f"{path}: is {what}; {remedy}")
    if path.suffix in _PICKLES or any(start.startswith(magic) for magic in _PICKLE_STARTS):
        raise UserError(f"{path}: is a pickle, which can run code and is never opened; {_conversion(path)}")


def _conversion(path: Path) -> str:
    load = f"torch.load({path.name!r}, map_location='cpu', weights_only=True)"
    return f"where you trust it: safetensors.torch.save_file({load}, {path.stem + '.safetensors'!r})"


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
