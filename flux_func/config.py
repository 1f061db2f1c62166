"""Every setting of a run: its default, what it means, and what values it may have.

A file of `configs/` starts from `default()` and states only what differs. Any field can be set from the command
line (`--config.train.steps=20`); the tree is locked, so a mistyped field is an error that names the nearest one.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from flux_func.config_checks import check, check_groups, check_model, nearest, one_of
from flux_func.errors import UserError

# Fields that are None unless they are set, and their types.
OPTIONAL = {"model.guidance_embed": bool, "model.qk_norm_eps": float}

DEFAULTS = dict(
    model=dict(
        flavor="flux-debug",  # one of flux_func.FLAVORS; "": the shape of model.weights, whatever it is
        weights="",  # what to start from: a file or folder of any format, a pipeline, a workdir; "": from scratch
        init="pretrain",  # from scratch; "nonzero": gates, modulations and the final layer random too
        guidance_embed=None,  # None: as the weights or flavor say
        qk_norm_eps=None,  # None: as they say; torchtitan's is 1e-5
    ),
    autoencoder=dict(
        kind="dct",  # "dct": fixed block transform, no weights; "kl": FLUX's own
        path="",  # kl: its ae.safetensors, a vae folder of diffusers, or a pipeline that has one
        random_init=False,  # kl: random weights where there is no path, to try a set-up out
        sample=True,  # kl: train on a draw from the posterior (False: on its mean)
    ),
    text=dict(
        kind="hash",  # "hash": words hashed to embeddings, no weights; "hf": T5 and CLIP of transformers
        path="",  # hf: a folder with text_encoder, text_encoder_2, tokenizer and tokenizer_2, as diffusers lays it out
        t5="",  # hf: T5 and its tokenizer from a folder, or a name in the hub's cache, of their own
        clip="",  # hf: CLIP and its tokenizer likewise
        random_init=False,  # hf: random weights from the folder's config.json files
        max_length=256,  # tokens of the T5 sequence: 512 for dev, 256 for schnell
    ),
    data=dict(
        source="digits",  # "digits": scikit-learn's; "wds": WebDataset tars; "folder": images with .txt; "hf": datasets
        path="",  # wds: a tar or a glob of tars; folder: a directory; hf: a save_to_disk directory or a hub name
        split="train",  # what to train on; the rest is validate.split
        validation_fraction=0.1,  # share of the samples held out, where the source has no validation split of its own
        image_key="image",  # hf: the column with the image
        caption_key="caption",  # hf: the column with the caption (a string, or a list whose first is taken)
        streaming=False,  # hf: read from the hub as it comes (order and resume are then the stream's own, not exact)
        image_size=256,  # pixels of the square that images are resized and cropped to; a multiple of 16
        crop="random",  # "random" or "center", along the longer side
        prompt_dropout=0.1,  # probability of an empty caption, drawn for T5 and CLIP independently
        workers=0,  # processes that read and decode; 0: threads of this one
    ),
    train=dict(
        steps=10,  # optimizer steps in the whole run
        batch_size=2,  # samples per step, over all processes and micro-batches
        accumulate=1,  # micro-batches per step
        seed=0,  # of everything random: weights, order, crops, dropout, noise, timesteps
        timesteps="uniform",  # "uniform", "logit_normal", "mode" (SD3) or "stratified" (a stratum of [0, 1] a sample)
        shift=False,  # shift the training timesteps by resolution, as the sampler does
        guidance=3.5,  # what a model with a guidance embedding is told; tune distilled dev at 1 (flux_dev_finetune.py)
    ),
    optimizer=dict(
        name="adamw",  # "adamw", or the name of any class of torch.optim
        lr=1e-4,  # after warm-up
        betas=(0.9, 0.95),  # adamw
        eps=1e-8,  # adamw
        weight_decay=0.1,  # adamw: decoupled
        moments="",  # adamw: its moments' type: "float32", "bfloat16" or, by torchao, "8bit"; "": numerics.param
        options="",  # other classes' own arguments, such as "momentum=0.9, nesterov=True"
        schedule="constant",  # "constant", "cosine" or "linear"
        warmup_steps=0,  # linear from lr/warmup_steps to lr
        decay_steps=0,  # step at which a decaying schedule ends; 0: train.steps, so that more steps stretch it
        final_lr_fraction=0.0,  # of lr, where a decaying schedule ends
        clip_norm=1.0,  # largest global norm of the gradients; 0: not clipped
    ),
    parallel=dict(
        replicate=1,  # groups of processes with the same parameters (HSDP, DDP); -1: what is left
        shard=-1,  # processes that parameters, moments and the batch are split over (FSDP); -1: what is left
        context=1,  # processes that each sample's sequence is split over, and parameters too; -1: what is left
        attention="all_gather",  # over context: "all_gather" of keys and values, "ulysses" (over heads) or "ring"
        ulysses=-1,  # ulysses: processes that heads are split over, the rest being a ring; -1: all of context
        prefetch=1,  # stages whose parameters are gathered ahead
        offload=False,  # keep parameters, moments and averages in the host's memory, and update them there
        # Tables: (pattern, {mesh axis: dimension}), the first that fits a path counts; see parallel/placements.py.
        params=(("*", {"shard": 0, "context": 0}),),
        lora=(("*", {}),),  # a LoRA and its moments, params being the table of the weights under it
        moments=(),  # none: as params; where params are repeated they may be split (ZeRO)
        batch=(("*", {"replicate": 0, "shard": 0}),),
        activations=(("rope", {"context": 2}), ("*", {"context": 1})),
        text_encoder=(("*", {"shard": 0, "context": 0}),),  # T5's weights
    ),
    remat=dict(
        policy="none",  # "full": keep each stage's input alone, and compute it again in the backward pass; "selective"
        keep=("attention",),  # selective: results kept too, such as "double_blocks.*_mlp.0" or "single_blocks.linear2"
    ),
    kernels=dict(attention=""),  # "flash", "flash3", "cudnn", "efficient" or "math"; "": the one torch takes
    compile=dict(
        enabled=False,  # compile each kind of stage in the training step: the first steps take minutes, the others less
        backend="inductor",  # of torch.compile: "inductor", or "aot_eager" to try out what compiles
        mode="",  # inductor's: "max-autotune", "reduce-overhead" (CUDA graphs), ...; "": its default
    ),
    numerics=dict(
        param="float32",  # type of parameters: "float32" or "bfloat16"
        rounding="stochastic",  # of updates in bfloat16; "nearest" loses those below 1/256 of a parameter
        compute="float32",  # type that parameters are cast to before each stage: "float32" or "bfloat16"
        reduce="float32",  # type that gradients are added up in, over micro-batches and processes
        linear="",  # products, by torchao: "float8_tensorwise", "float8_rowwise" or "mxfp8"; "": in numerics.compute
        patterns=("double_blocks.*_attn.*", "double_blocks.*_mlp.*", "single_blocks.linear?"),  # linears that it is for
    ),
    lora=dict(
        rank=0,  # of what is added to linears' weights and trained in their place; 0: the weights are trained
        alpha=0.0,  # it is scaled by alpha / rank; 0: the rank, for a scale of 1
        patterns=("double_blocks.*", "single_blocks.*"),  # of the linears: "*_attn.qkv", "single_blocks.*.linear1"
    ),
    ema=dict(decay=0.0),  # of the averaged weights; 0: none are kept
    validate=dict(
        every=0,  # steps; 0: never
        split="validation",  # "validation" or "train"
        samples=64,  # samples per validation
        batch_size=8,  # samples per forward pass of a process
        all_timesteps=False,  # each sample at all 8 timesteps; False: at one of them in turn
        convention="start",  # t = i/8 ("start") or (i + 1/2)/8 ("middle"), i = 0..7
        images=0,  # images drawn from the split's own captions after each validation
    ),
    sample=dict(
        every=0,  # steps; 0: never
        prompts=(),  # captions of the grid; none: the first of the validation split
        steps=20,  # Euler steps
        guidance=3.5,  # distilled guidance, for models with a guidance embedding
        cfg_scale=1.0,  # classifier-free guidance; 1: none
        shift=True,  # resolution-dependent shift of the schedule
        seed=0,  # of the noise
    ),
    checkpoint=dict(
        every=0,  # steps; 0: at the end alone
        keep_last=2,  # checkpoints kept; 0: all
        keep_every=0,  # steps whose multiples are kept for good; 0: none
        last_weights_only=False,  # the last checkpoint without moments: not for resuming
        export_dtype="",  # type of the weights in a weights-only checkpoint, such as "bfloat16"; "": numerics.param
    ),
    log=dict(every=1),  # steps between lines of metrics; 0: none but the last
    metrics=dict(
        peak_tflops=0.0,  # the device's peak, for MFU; 0: MFU is not reported
        tensorboard=True,  # event files in the workdir
        wandb="",  # project of Weights & Biases; "": not used
    ),
    profile=dict(steps=0),  # steps to trace, after the first two; 0: none (docs/profiling.md)
)


def default() -> ml_collections.ConfigDict:
    """Returns the configuration that every config file starts from."""
    config = ml_collections.ConfigDict(copy.deepcopy(DEFAULTS))
    for field, kind in OPTIONAL.items():
        group, name = field.split(".")
        config[group][name] = config_dict.placeholder(kind)
    return config.lock()


get_config = default  # this file is a config file too, which programs take where --config may be left out


CHOICES = {
    "model.init": ("pretrain", "nonzero"),
    "autoencoder.kind": ("dct", "kl"),
    "text.kind": ("hash", "hf"),
    "data.source": ("digits", "wds", "folder", "hf"),
    "data.split": ("train", "validation"),
    "data.crop": ("random", "center"),
    "train.timesteps": ("uniform", "logit_normal", "mode", "stratified"),
    "optimizer.schedule": ("constant", "cosine", "linear"),
    "remat.policy": ("none", "full", "selective"),
    "kernels.attention": ("", "flash", "flash3", "cudnn", "efficient", "math"),
    "compile.backend": ("inductor", "aot_eager"),
    "compile.mode": ("", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "numerics.param": ("float32", "bfloat16"),
    "numerics.compute": ("float32", "bfloat16"),
    "numerics.reduce": ("float32", "bfloat16"),
    "numerics.rounding": ("stochastic", "nearest"),
    "numerics.linear": ("", "float8_tensorwise", "float8_rowwise", "mxfp8"),
    "optimizer.moments": ("", "float32", "bfloat16", "8bit"),
    "parallel.attention": ("all_gather", "ulysses", "ring"),
    "validate.split": ("train", "validation"),
    "validate.convention": ("start", "middle"),
    "checkpoint.export_dtype": ("", "float32", "bfloat16", "float16"),
}
AT_LEAST_ONE = (
    "text.max_length",
    "train.steps",
    "train.batch_size",
    "train.accumulate",
    "validate.samples",
    "validate.batch_size",
    "sample.steps",
)
NOT_NEGATIVE = (
    "parallel.prefetch",
    "data.workers",
    "optimizer.lr",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "optimizer.decay_steps",
    "optimizer.clip_norm",
    "validate.every",
    "validate.images",
    "sample.every",
    "checkpoint.every",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "log.every",
    "metrics.peak_tflops",
    "profile.steps",
    "lora.rank",
    "lora.alpha",
)
FRACTIONS = ("data.prompt_dropout", "data.validation_fraction", "ema.decay", "optimizer.final_lr_fraction")
PATH_NEEDED = {"data.source": ("wds", "folder", "hf")}
# Fields that only some values of another one read: with any other they would be ignored without a word.
READ_WITH = {
    "autoencoder.path": ("autoencoder.kind", ("kl",)),
    "autoencoder.random_init": ("autoencoder.kind", ("kl",)),
    "text.path": ("text.kind", ("hf",)),
    "text.t5": ("text.kind", ("hf",)),
    "text.clip": ("text.kind", ("hf",)),
    "text.random_init": ("text.kind", ("hf",)),
    "data.path": ("data.source", ("wds", "folder", "hf")),
    "data.streaming": ("data.source", ("hf",)),
    "optimizer.decay_steps": ("optimizer.schedule", ("cosine", "linear")),
    "optimizer.final_lr_fraction": ("optimizer.schedule", ("cosine", "linear")),
    "optimizer.moments": ("optimizer.name", ("adamw",)),
    "numerics.linear": ("numerics.compute", ("bfloat16",)),
    "checkpoint.export_dtype": ("checkpoint.last_weights_only", (True,)),
    "compile.mode": ("compile.enabled", (True,)),
}
# What may change between a checkpoint and the run that goes on from it.
RESUME_MAY_DIFFER = (
    "train.steps",
    "data.workers",
    "sample.*",
    "validate.*",
    "metrics.*",
    "profile.*",
    "parallel.*",
    "remat.*",
    "kernels.*",
    "compile.*",
    "*.every",
)


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted field, value) of every field, tuples as lists, as JSON would hold them."""
    for key, value in config.items():
        if isinstance(value, (Mapping, ml_collections.ConfigDict)):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, (tuple, list)) else value


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks every field's type and value against its range, and the fields that depend on each other.

    Raises:
      UserError: the first field found wrong, its value and what it should be.
    """
    fields, usual = _fields(config), dict(flat(default()))
    check_model(fields, usual)
    for field, choices in CHOICES.items():
        check(fields, field, fields[field] in choices, one_of(fields[field], choices))
    for field in AT_LEAST_ONE:
        check(fields, field, fields[field] >= 1, "should be at least 1")
    for field in NOT_NEGATIVE:
        check(fields, field, fields[field] >= 0, "should not be negative")
    for field in FRACTIONS:
        check(fields, field, 0 <= fields[field] <= 1, "should be in [0, 1]")
    for field, value in fields.items():
        check(fields, field, not isinstance(value, float) or math.isfinite(value), "should be finite")
    betas = fields["optimizer.betas"]
    in_range = all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas)
    check(fields, "optimizer.betas", len(betas) == 2 and in_range, "should be two numbers in [0, 1)")
    check(fields, "sample.prompts", all(isinstance(p, str) for p in fields["sample.prompts"]), "should be texts")
    size, batch, micro = fields["data.image_size"], fields["train.batch_size"], fields["train.accumulate"]
    near = max(16, round(size / 16) * 16)
    check(fields, "data.image_size", size >= 16 and size % 16 == 0, f"should be a multiple of 16, such as {near}")
    check(fields, "train.accumulate", batch % micro == 0, f"should divide train.batch_size, which is {batch}")
    for field, kinds in PATH_NEEDED.items():
        path, given = field.split(".")[0] + ".path", fields[field]
        check(fields, path, given not in kinds or fields[path], f"should be set, as {field} is {given!r}")
    for field, (switch, values) in READ_WITH.items():
        good = not fields[field] or fields[switch] in values
        check(fields, field, good, f"is read only where {switch} is {' or '.join(map(repr, values))}")
    optimizes = not fields["compile.mode"] or fields["compile.backend"] == "inductor"
    check(fields, "compile.mode", optimizes, "is read only where compile.backend is 'inductor'")
    weightless = fields["autoencoder.kind"] == "kl" and not fields["autoencoder.random_init"]
    remedy = "should name an ae.safetensors (or set autoencoder.random_init to try a set-up out)"
    check(fields, "autoencoder.path", fields["autoencoder.path"] or not weightless, remedy)
    ulysses = fields["parallel.ulysses"]
    used = ulysses == -1 or fields["parallel.attention"] == "ulysses"
    check(fields, "parallel.ulysses", used, "is read only where parallel.attention is 'ulysses'")
    check(fields, "parallel.ulysses", ulysses == -1 or ulysses >= 1, "should be at least 1, or -1 for all of context")
    check_groups(fields, usual)


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {dotted field: value}; UserError where they are not the fields of `default`, each of its type."""
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"config is a {type(config).__name__}: should be flux_func.config.default() with changes")
    known, fields = dict(flat(default())), dict(flat(config))
    check_known(fields)
    for field, usual in known.items():
        if field not in fields:
            raise UserError(f"{field} is not set: a config should start from flux_func.config.default()")
        value, kind = fields[field], OPTIONAL.get(field)
        remedy = f"should be None or a {kind.__name__}" if kind else f"should be of the type of {usual!r}, its default"
        check(fields, field, _is_of(kind or type(usual), value) or (kind and value is None), remedy)
    return fields


def _is_of(kind: type, value: Any) -> bool:
    return type(value) in (int, float) if kind is float else type(value) is kind


def check_known(fields: Iterable[str]) -> None:
    """Checks that these dotted fields, or groups of them, are of `default`; UserError names the nearest one."""
    known = [field for field, _ in flat(default())]
    groups = {field.partition(".")[0] for field in known}
    for field in fields:
        if field not in known and field not in groups:
            raise UserError(f"{field} is no field of the config: {nearest(field, known)}see flux_func/config.py")


def check_resume(saved: Mapping[str, Any], config: ml_collections.ConfigDict) -> None:
    """Checks that `config` may go on from a checkpoint written under `saved` (`config.to_dict()` through JSON).

    Raises:
      UserError: naming the first field that may not differ, and both values.
    """
    from flux_func import tree

    before, now = dict(flat(saved)), dict(flat(config))
    for field in sorted(before.keys() | now.keys()):
        old, new = before.get(field, "not set"), now.get(field, "not set")
        if old != new and not tree.match(RESUME_MAY_DIFFER, field):
            raise UserError(
                f"{field} is {new!r}, but the checkpoint in the workdir was written with {old!r}: "
                f"set it back, or name another --workdir"
            )
