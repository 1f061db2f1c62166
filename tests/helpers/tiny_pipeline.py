"""Tiny FLUX in diffusers' own classes and layout, with tokenizers trained on the spot: text encoders, or all of it."""

import json
import pathlib
import shutil
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CAPTIONS = (
    "a handwritten zero",
    "a photograph of a red bird on a branch, in the morning",
    "Two people walk along the beach; one carries a blue umbrella.",
    "the old city's towers against a dark sky",
    "a bowl of fruit: apples, pears and a single orange!",
    "handwritten digits one two three four five six seven eight nine",
)


def build(
    folder: pathlib.Path,
    context_dim: int = 32,
    vec_dim: int = 24,
    layers: int = 2,
    weights: bool = True,
    shards: bool = False,
) -> pathlib.Path:
    """Writes text_encoder, text_encoder_2, tokenizer and tokenizer_2 into `folder`, and returns it.

    Args:
      folder: where to; it is made.
      context_dim, vec_dim: widths of T5 and CLIP (4096 and 768 fit FLUX's flavors).
      layers: of each model.
      weights: False: config.json alone, for random_init.
      shards: T5's weights as several files with an index.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    folder = pathlib.Path(folder)
    t5_tokenizer = _train_t5(folder / "tokenizer_2")
    clip_tokenizer = _train_clip(folder / "tokenizer")
    t5 = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=context_dim,
        d_kv=4,
        d_ff=32,
        num_layers=layers,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=vec_dim,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for name, kind, config in (("text_encoder_2", T5EncoderModel, t5), ("text_encoder", CLIPTextModel, clip)):
            if weights:
                size = "8KB" if shards and kind is T5EncoderModel else "1GB"
                kind(config).save_pretrained(folder / name, max_shard_size=size)
            else:
                config.save_pretrained(folder / name)
    return folder


def whole(
    folder: pathlib.Path, guidance: bool = True, shift: bool = True, transformer: dict[str, Any] | None = None
) -> pathlib.Path:
    """Writes a whole FLUX.1 pipeline by diffusers' `save_pretrained`, and returns the folder.

    Every weight is random, and large enough that prompts, guidance and time each change the pixels.

    Args:
      folder: where to; it is made.
      guidance: whether the transformer has a guidance embedding.
      shift: whether the scheduler shifts by resolution, as dev's, or not, as schnell's.
      transformer: changes to its configuration.
    """
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    parts = build(folder / "parts")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = FluxTransformer2DModel(
            **{
                "in_channels": 64,
                "num_layers": 2,
                "num_single_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 3,
                "joint_attention_dim": 32,
                "pooled_projection_dim": 24,
                "guidance_embeds": guidance,
                "axes_dims_rope": (4, 6, 6),
                **(transformer or {}),
            }
        )
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[32, 32, 64, 64],
            layers_per_block=1,
            latent_channels=16,
            scaling_factor=0.4,
            shift_factor=0.2,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        _randomize(model, 1.0)
        _randomize(vae, 0.6)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shift, shift=3.0 if shift else 1.0)
    FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        transformer=model,
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder"),
        text_encoder_2=T5EncoderModel.from_pretrained(parts / "text_encoder_2"),
        tokenizer=AutoTokenizer.from_pretrained(parts / "tokenizer"),
        tokenizer_2=AutoTokenizer.from_pretrained(parts / "tokenizer_2"),
    ).save_pretrained(folder)
    shutil.rmtree(parts)
    return folder


def _randomize(model, gain: float) -> None:
    # Linears and convolutions keep the size of what goes through them, times the gain; biases and norms are not plain.
    import torch

    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if leaf.ndim > 1:
                leaf.normal_(std=gain * (leaf.numel() / leaf.shape[0]) ** -0.5)
            else:
                leaf.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.1)


def _train_t5(folder: pathlib.Path):
    # Unigram over words marked with "▁", "</s>" appended; pad, eos and unk are 0, 1 and 2, as T5's.
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "model_max_length": 512}
    return _finish(folder, {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, **settings})


def _train_clip(folder: pathlib.Path):
    # Byte-level BPE in which a word's last piece ends with "</w>", kept in vocab.json and merges.txt, as FLUX's is.
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[start, end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    folder.mkdir(parents=True)
    tokenizer.model.save(str(folder))
    settings = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end, "model_max_length": 77}
    return _finish(folder, {"tokenizer_class": "CLIPTokenizer", **settings})


def _finish(folder: pathlib.Path, settings: dict):
    from transformers import AutoTokenizer

    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)
