"""Images to latents and back: FLUX's own autoencoder (`kl`) and a block transform without weights (`dct`).

After black-forest-labs/flux, `modules/autoencoder.py`: the tree flattened by dots is `ae.safetensors`. Latents have
16 channels and an eighth of the image's height and width, whichever the kind.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flux_func import random, tree
from flux_func.models import dct, layers

Params = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
_GROUPS = 32
# Of images that `kl` computes at a time: two of 1024 x 1024. All of a batch at once would take more memory than a
# training step, and be no faster.
PIXELS_AT_ONCE = 1 << 21


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Which autoencoder, and the fields of BFL's AutoEncoderParams for `kl` (the defaults are FLUX's).

    Attributes:
      kind: "dct" (see `dct.py`; it has no weights and takes no other field) or "kl".
      ch: channels at full resolution, a multiple of 32.
      ch_mult: channels at each resolution as multiples of `ch`; each after the first halves height and width.
      num_res_blocks: residual blocks per resolution in the encoder; the decoder has one more.
      z_channels: channels of the latents.
      scale_factor, shift_factor: latent = scale_factor * (z - shift_factor).
    """

    kind: str = "dct"
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self):
        if self.kind not in ("dct", "kl"):
            raise ValueError(f"kind {self.kind!r} should be 'dct' or 'kl'")
        layers.check_numbers(self)
        if not self.ch_mult or any(not isinstance(multiple, int) or multiple < 1 for multiple in self.ch_mult):
            raise ValueError(f"ch_mult {self.ch_mult!r} should be whole numbers from 1 on")
        if self.kind == "dct" and self.z_channels != len(dct.CHANNELS):
            raise ValueError(f"z_channels {self.z_channels} should be {len(dct.CHANNELS)}, dct's number")
        if self.ch % _GROUPS:
            raise ValueError(f"ch {self.ch} should be a multiple of {_GROUPS}")

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along height and along width."""
        return dct.BLOCK if self.kind == "dct" else 2 ** (len(self.ch_mult) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each resolution, the full one first."""
        return tuple(self.ch * multiple for multiple in self.ch_mult)


# Parameters: each leaf declared once, with its shape.


def shapes(cfg: AutoencoderConfig) -> Shapes:
    """Returns {dotted path: shape} of every parameter; none for `dct`."""
    return {} if cfg.kind == "dct" else {**_encoder_shapes(cfg), **_decoder_shapes(cfg)}


def abstract(cfg: AutoencoderConfig, dtype: torch.dtype = torch.float32) -> Params:
    """Returns the parameter tree on the meta device: shapes and types without memory."""
    return tree.unflatten({path: torch.empty(s, dtype=dtype, device="meta") for path, s in shapes(cfg).items()})


def init(
    cfg: AutoencoderConfig, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Params:
    """Returns random parameters as torch's layers draw theirs, a pure function of (seed, path); {} for `dct`.

    Weights and biases of convolutions are uniform within 1/sqrt(fan-in) of zero (He et al. 2015 with torch's gain);
    norms are one and zero.
    """
    flat = shapes(cfg)
    return tree.unflatten({path: _draw(path, flat, seed).to(device, dtype) for path in flat})


def load(
    path: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cfg: AutoencoderConfig = AutoencoderConfig(kind="kl"),
) -> tuple[Params, AutoencoderConfig]:
    """Returns the parameters in a safetensors file with BFL's names, and their configuration.

    Raises:
      ValueError: the file is not there, cannot be read, or does not hold exactly the tensors of `cfg`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    wanted = "should be the safetensors file of FLUX's autoencoder, ae.safetensors"
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot be read ({error}); it {wanted}") from error
    expected = shapes(cfg)
    if unfit := tree.differences({path: tuple(leaf.shape) for path, leaf in found.items()}, expected):
        raise ValueError(f"does not hold this autoencoder's tensors, {unfit}; it {wanted}")
    return tree.unflatten({p: found[p].to(device, dtype) for p in expected}), cfg


# The two directions.


def encode(params: Params, cfg: AutoencoderConfig, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """Returns latents [B, 16, H/8, W/8], in the images' type.

    Args:
      params: the tree of `init` or `load`.
      cfg: the autoencoder.
      images: [B, 3, H, W] in [-1, 1].
      noise: standard normal, shaped as the latents: they are then a draw from `kl`'s posterior, a Gaussian with
        independent elements; None: its mean. `dct` has a posterior of zero variance, to which noise adds nothing.

    Raises:
      ValueError: images that are not [B, 3, H, W] with H and W multiples of 8, or no floats, or noise of another shape.
    """
    factor = cfg.downsampling
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
        raise ValueError(f"images {tuple(images.shape)} should be [B, 3, H, W], H and W multiples of {factor}")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}, they should be floats in [-1, 1]")
    size = (images.shape[0], cfg.z_channels, images.shape[2] // factor, images.shape[3] // factor)
    if noise is not None and tuple(noise.shape) != size:
        raise ValueError(f"noise {tuple(noise.shape)} should be {size}")
    if cfg.kind == "dct":
        return dct.encode(images)
    encoder = functools.partial(_encoder, params["encoder"], cfg)
    mean, logvar = _in_turn(encoder, images, math.prod(images.shape[2:])).chunk(2, dim=1)
    z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise.to(mean)
    return cfg.scale_factor * (z - cfg.shift_factor)


def decode(params: Params, cfg: AutoencoderConfig, latents: Tensor) -> Tensor:
    """Returns images [B, 3, H, W], about in [-1, 1], of latents [B, 16, H/8, W/8], in the latents' type.

    Raises:
      ValueError: latents of another number of dimensions or channels.
    """
    if latents.ndim != 4 or latents.shape[1] != cfg.z_channels:
        raise ValueError(f"latents {tuple(latents.shape)} should be [B, {cfg.z_channels}, h, w]")
    if cfg.kind == "dct":
        return dct.decode(latents)
    decoder = functools.partial(_decoder, params["decoder"], cfg)
    z = latents / cfg.scale_factor + cfg.shift_factor
    return _in_turn(decoder, z, math.prod(z.shape[2:]) * cfg.downsampling**2)


def _in_turn(fn: Callable[[Tensor], Tensor], x: Tensor, pixels: int) -> Tensor:
    """Returns fn(x) [B, ...], some samples at a time, of so many pixels each."""
    parts = x.split(max(1, PIXELS_AT_ONCE // pixels))
    return fn(x) if len(parts) == 1 else torch.cat([fn(part) for part in parts])


def _encoder(params: Params, cfg: AutoencoderConfig, x: Tensor) -> Tensor:
    x = _conv(params["conv_in"], x)
    for level in range(len(cfg.widths)):
        stage = params["down"][str(level)]
        for block in range(cfg.num_res_blocks):
            x = _resnet(stage["block"][str(block)], x)
        if "downsample" in stage:
            # The reference pads to the right and below alone.
            x = _conv(stage["downsample"]["conv"], F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
    return _out(params, _middle(params["mid"], x))


def _decoder(params: Params, cfg: AutoencoderConfig, x: Tensor) -> Tensor:
    x = _middle(params["mid"], _conv(params["conv_in"], x))
    for level in reversed(range(len(cfg.widths))):
        stage = params["up"][str(level)]
        for block in range(cfg.num_res_blocks + 1):
            x = _resnet(stage["block"][str(block)], x)
        if "upsample" in stage:
            x = _conv(stage["upsample"]["conv"], F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return _out(params, x)


def _middle(params: Params, x: Tensor) -> Tensor:
    return _resnet(params["block_2"], _attention(params["attn_1"], _resnet(params["block_1"], x)))


def _out(params: Params, x: Tensor) -> Tensor:
    return _conv(params["conv_out"], F.silu(_norm(params["norm_out"], x)))


def _resnet(params: Params, x: Tensor) -> Tensor:
    hidden = _conv(params["conv1"], F.silu(_norm(params["norm1"], x)))
    hidden = _conv(params["conv2"], F.silu(_norm(params["norm2"], hidden)))
    return hidden + (_conv(params["nin_shortcut"], x, padding=0) if "nin_shortcut" in params else x)


def _attention(params: Params, x: Tensor) -> Tensor:
    normed = _norm(params["norm"], x)
    q, k, v = (rearrange(_conv(params[name], normed, padding=0), "B C h w -> B 1 (h w) C") for name in "qkv")
    mixed = rearrange(layers.attention(q, k, v), "B (h w) C -> B C h w", h=x.shape[2])
    return x + _conv(params["proj_out"], mixed, padding=0)


def _norm(params: Params, x: Tensor) -> Tensor:
    return F.group_norm(x, _GROUPS, params["weight"].to(x), params["bias"].to(x), eps=1e-6)


def _conv(params: Params, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
    return F.conv2d(x, params["weight"].to(x), params["bias"].to(x), stride=stride, padding=padding)


def _encoder_shapes(cfg: AutoencoderConfig) -> Shapes:
    widths, last = cfg.widths, len(cfg.widths) - 1
    out = _conv_shapes("encoder.conv_in", 3, cfg.ch, 3)
    for level, (before, width) in enumerate(zip((cfg.ch, *widths), widths, strict=False)):
        for block in range(cfg.num_res_blocks):
            out |= _resnet_shapes(f"encoder.down.{level}.block.{block}", before if block == 0 else width, width)
        if level != last:
            out |= _conv_shapes(f"encoder.down.{level}.downsample.conv", width, width, 3)
    return out | _end_shapes("encoder", middle=widths[-1], width=widths[-1], channels=2 * cfg.z_channels)


def _decoder_shapes(cfg: AutoencoderConfig) -> Shapes:
    widths = cfg.widths
    out = _conv_shapes("decoder.conv_in", cfg.z_channels, widths[-1], 3)
    for level, (before, width) in enumerate(zip((*widths[1:], widths[-1]), widths, strict=True)):
        for block in range(cfg.num_res_blocks + 1):
            out |= _resnet_shapes(f"decoder.up.{level}.block.{block}", before if block == 0 else width, width)
        if level != 0:
            out |= _conv_shapes(f"decoder.up.{level}.upsample.conv", width, width, 3)
    return out | _end_shapes("decoder", middle=widths[-1], width=widths[0], channels=3)


def _end_shapes(half: str, middle: int, width: int, channels: int) -> Shapes:
    attention = [_conv_shapes(f"{half}.mid.attn_1.{name}", middle, middle, 1) for name in ("q", "k", "v", "proj_out")]
    parts: Iterable[Shapes] = (
        _resnet_shapes(f"{half}.mid.block_1", middle, middle),
        _norm_shapes(f"{half}.mid.attn_1.norm", middle),
        *attention,
        _resnet_shapes(f"{half}.mid.block_2", middle, middle),
        _norm_shapes(f"{half}.norm_out", width),
        _conv_shapes(f"{half}.conv_out", width, channels, 3),
    )
    return {path: shape for part in parts for path, shape in part.items()}


def _resnet_shapes(name: str, before: int, width: int) -> Shapes:
    shortcut = _conv_shapes(f"{name}.nin_shortcut", before, width, 1) if before != width else {}
    return {
        **_norm_shapes(f"{name}.norm1", before),
        **_conv_shapes(f"{name}.conv1", before, width, 3),
        **_norm_shapes(f"{name}.norm2", width),
        **_conv_shapes(f"{name}.conv2", width, width, 3),
        **shortcut,
    }


def _conv_shapes(name: str, before: int, width: int, size: int) -> Shapes:
    return {f"{name}.weight": (width, before, size, size), f"{name}.bias": (width,)}


def _norm_shapes(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _draw(path: str, flat: Shapes, seed: int) -> Tensor:
    layer, _, kind = path.rpartition(".")
    fan_in = int(np.prod(flat[f"{layer}.weight"][1:]))
    if len(flat[f"{layer}.weight"]) == 1:
        return torch.full(flat[path], float(kind == "weight"))
    rng = random.generator(seed, f"init/autoencoder.{path}")
    unit = rng.random(flat[path], dtype=np.float32)
    return torch.from_numpy((2 * unit - 1) * fan_in**-0.5)
