"""What is compared: a model, its weights, and inputs drawn from a seed."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flux_func import random, tree
from flux_func.models import autoencoder
from flux_func.models.autoencoder import AutoencoderConfig
from flux_func.models.flux import FluxConfig
from flux_func.models.layers import Params

PARTS = ("transformer", "sampler", "autoencoder", "text")
REFERENCES = ("bfl", "diffusers", "torchtitan")
# What the schedule is compared for, beside the run's own: steps and image tokens.
SCHEDULES = ((1, 1), (4, 256), (28, 1024), (50, 4096))
T5_VOCABULARY, CLIP_VOCABULARY, CLIP_LENGTH = 1000, 1000, 77


@dataclass(frozen=True)
class Problem:
    """One comparison's question.

    Attributes:
      reference: one of `REFERENCES`.
      cfg: the transformer, with the reference's own qk_norm_eps.
      params: its weights, float32.
      parts: which of `PARTS` are compared; "sampler" needs "transformer".
      autoencoder_cfg, autoencoder_params: of the part "autoencoder".
      text_path: a folder with text_encoder and text_encoder_2; "": small ones of the right widths, random.
      conditioning: what the sampler is told, txt [2, L, context] and y [2, vec] of a prompt and of none; None: drawn.
      stored_eps: the qk_norm_eps that the weights say, where it is not the reference's.
      seed: of everything drawn.
      batch, height, width, text_tokens: of the inputs; pixels, multiples of 16.
      steps, guidance, cfg_scale, shift: of the sampler; guidance is not looked at where the model takes none, cfg_scale
        None is without classifier-free guidance.
      device: of both sides.
    """

    reference: str
    cfg: FluxConfig
    params: Params = dataclasses.field(repr=False)
    parts: tuple[str, ...] = PARTS
    autoencoder_cfg: AutoencoderConfig = AutoencoderConfig(kind="kl")
    autoencoder_params: Params | None = dataclasses.field(default=None, repr=False)
    text_path: str = ""
    conditioning: tuple[Tensor, Tensor] | None = dataclasses.field(default=None, repr=False)
    stored_eps: float | None = None
    seed: int = 0
    batch: int = 2
    height: int = 128
    width: int = 192
    text_tokens: int = 64
    steps: int = 4
    guidance: float = 3.5
    cfg_scale: float | None = None
    shift: bool = True
    device: str = "cpu"

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.height // 8, self.width // 8

    @property
    def image_tokens(self) -> int:
        """Patches of an image."""
        return self.height * self.width // 256

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Returns standard normal draws that bfloat16 holds exactly, so that both sides start from equal ones."""
        drawn = torch.from_numpy(random.normal(self.seed, f"parity/{purpose}", 0, shape))
        return drawn.to(torch.bfloat16).to(self.device, torch.float32)


def transformer_inputs(problem: Problem) -> dict[str, Tensor]:
    """Returns the inputs of `flow.path.loss`, what conditions in_channels beyond the latents', and embeddings' values.

    Timesteps and guidance are powers of two: a thousand times those is exact in bfloat16, in which references round
    them, so that what is compared is the model's arithmetic. The embeddings have values of their own.
    """
    cfg, batch, (height, width) = problem.cfg, problem.batch, problem.latent_size
    halvings = 0.5 ** (1 + torch.arange(batch, device=problem.device) % 8)
    size = (batch, cfg.out_channels // 4, height, width)
    out = {
        "latents": problem.normal("latents", *size),
        "noise": problem.normal("noise", *size),
        "timesteps": halvings,
        "txt": problem.normal("txt", batch, problem.text_tokens, cfg.context_in_dim),
        "y": problem.normal("y", batch, cfg.vec_in_dim),
        "timestep_embedding": torch.linspace(0, 1, 129, device=problem.device),
        "guidance_embedding": torch.linspace(0, 32, 129, device=problem.device),
    }
    if cfg.guidance_embed:
        out["guidance"] = 8 * halvings
    if cfg.in_channels > cfg.out_channels:
        extra = cfg.in_channels - cfg.out_channels
        out["img_cond"] = problem.normal("img_cond", batch, problem.image_tokens, extra)
    return out


def sampler_inputs(problem: Problem) -> dict[str, Tensor]:
    """Returns noise [B, c, h, w], txt [B, L, context] and y [B, vec]; uncond_txt and uncond_y where cfg_scale is."""
    cfg, batch = problem.cfg, problem.batch
    out = {"noise": problem.normal("sampler", batch, cfg.out_channels // 4, *problem.latent_size)}
    for i, kind in enumerate(("", "uncond_") if problem.cfg_scale else ("",)):
        if problem.conditioning:
            txt, y = (value[i].to(problem.device).expand(batch, *value[i].shape) for value in problem.conditioning)
        else:
            txt = problem.normal(f"{kind}txt", batch, problem.text_tokens, cfg.context_in_dim)
            y = problem.normal(f"{kind}y", batch, cfg.vec_in_dim)
        out |= {f"{kind}txt": txt, f"{kind}y": y}
    return out


def schedules(problem: Problem) -> list[tuple[int, int, bool]]:
    """Returns the (steps, image tokens, shift) that schedules are compared for."""
    cases = ((problem.steps, problem.image_tokens), *SCHEDULES)
    return [(steps, tokens, shift) for steps, tokens in cases for shift in (True, False)]


def autoencoder_inputs(problem: Problem) -> dict[str, Tensor]:
    """Returns images [1, 3, H, W] in [-1, 1], their corner of at most 64 pixels, and latents [1, c, h, w]."""
    cfg = problem.autoencoder_cfg
    scale = cfg.downsampling
    latents = problem.normal("autoencoder", 1, cfg.z_channels, problem.height // scale, problem.width // scale)
    images = problem.normal("images", 1, 3, problem.height, problem.width).tanh()
    return {"images": images, "corner": images[..., :64, :64].clone(), "latents": latents}


def autoencoder_weights(cfg: AutoencoderConfig, seed: int, device: str) -> Params:
    """Returns random weights under which no norm is the identity and activations stay of order one."""

    def draw(path: str, shape: tuple[int, ...]) -> Tensor:
        values = random.normal(seed, f"parity/autoencoder.{path}", 0, shape)
        is_scale = "norm" in path and path.endswith("weight")
        values *= 1.5 * np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3
        return torch.from_numpy(values + is_scale).to(device, torch.float32)

    return tree.unflatten({path: draw(path, shape) for path, shape in autoencoder.shapes(cfg).items()})


def text_inputs(problem: Problem, vocabularies: tuple[int, int]) -> dict[str, Tensor]:
    """Returns random tokens, "t5" [2, L] and "clip" [2, 77], given the sizes of both vocabularies.

    CLIP's are as its tokenizer leaves them: ending in the vocabulary's last token, the rest filled with it.
    """
    rng = random.generator(problem.seed, "parity/tokens")
    t5 = rng.integers(2, vocabularies[0], (2, problem.text_tokens))
    clip = rng.integers(1, vocabularies[1] - 2, (2, CLIP_LENGTH))
    for row, end in zip(clip, (9, CLIP_LENGTH - 1), strict=True):
        row[end:] = vocabularies[1] - 1
    return {name: torch.from_numpy(ids).to(problem.device) for name, ids in (("t5", t5), ("clip", clip))}


def write_text_encoders(folder: Path, seed: int) -> None:
    """Writes a small T5 and a small CLIP of FLUX's widths, random, as text_encoder_2 and text_encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    sizes = dict(d_model=4096, d_kv=64, num_heads=4, d_ff=512, num_layers=2, vocab_size=T5_VOCABULARY)
    t5 = T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    last = CLIP_VOCABULARY - 1
    sizes = dict(hidden_size=768, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=12)
    clip = CLIPTextConfig(**sizes, vocab_size=CLIP_VOCABULARY, bos_token_id=last - 1, eos_token_id=last, pad_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, model in (("text_encoder_2", T5EncoderModel(t5)), ("text_encoder", CLIPTextModel(clip))):
            for leaf in model.parameters():
                # Norms and biases start at one and zero, under which much would go unseen.
                leaf.data += 0.1 * torch.randn(leaf.shape) if leaf.ndim == 1 else 0
            model.save_pretrained(folder / name)
