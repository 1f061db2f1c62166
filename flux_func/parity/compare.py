"""Our answers to a problem, held against the reference's."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from flux_func import tree
from flux_func.flow import path, sampler, timesteps
from flux_func.models import autoencoder, flux, layers, text
from flux_func.models.layers import Ops, Params
from flux_func.models.stages import Stage, bind
from flux_func.models.text import TextConfig
from flux_func.parallel import fold
from flux_func.parity import exchange
from flux_func.parity.problem import Problem
from flux_func.parity.rows import BOUNDS, Row, relative, relative_row, worst
from flux_func.transforms import precision

Say = Callable[[str], object]


@dataclasses.dataclass
class Comparison:
    """What came of it.

    Attributes:
      rows: one for each comparison.
      gradients: {our path: relative difference of its gradient}.
      images: "ours" and "theirs", [3, H, W] in [-1, 1], where both sampler and autoencoder are compared.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    gradients: dict[str, float] = dataclasses.field(default_factory=dict)
    images: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def compare(problem: Problem, params: Params, folder: Path, say: Say = print) -> Comparison:
    """Returns our side held against what lies in an answered folder.

    Args:
      problem: what was asked.
      params: our transformer's weights: the problem's, unless they are to be damaged.
      folder: of the exchange.
      say: told what is done, when it starts.
    """
    out, end = Comparison(), None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if "transformer" in problem.parts:
        _transformer(problem, params, folder, say, out)
    if "sampler" in problem.parts:
        say("sampler")
        end = _sampler(problem, params, folder, out)
    if "autoencoder" in problem.parts:
        say("autoencoder")
        _autoencoder(problem, folder, end, out)
    if "text" in problem.parts:
        say("T5 and CLIP")
        _text(problem, folder, out)
    return out


# The transformer.


def _transformer(problem: Problem, params: Params, folder: Path, say: Say, out: Comparison) -> None:
    inputs, theirs = (read(folder, "transformer", problem.device) for read in (exchange.inputs, exchange.answers))
    say("forward and its stages")
    with torch.no_grad():
        arguments = _arguments(inputs)
        out.rows += _forward(problem, params, arguments, theirs)
        out.rows += _embeddings(problem, arguments, inputs, theirs)
        out.rows += _stages(problem, params, arguments, theirs)
    say("gradients")
    out.rows += _gradients(problem, params, inputs, theirs, folder, out.gradients)


def _arguments(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the arguments of `flux.apply` at x_t."""
    noisy = path.interpolate(inputs["latents"], inputs["noise"], inputs["timesteps"])
    img = flux.patchify(noisy)
    if "img_cond" in inputs:
        img = torch.cat([img, inputs["img_cond"]], dim=-1)
    rest = {name: inputs[name] for name in ("timesteps", "txt", "y", "guidance") if name in inputs}
    img_ids = flux.image_ids(*noisy.shape[2:], device=img.device)
    return {"img": img, "img_ids": img_ids, "txt_ids": flux.text_ids(rest["txt"].shape[1], img.device), **rest}


def _forward(problem: Problem, params: Params, arguments: dict, theirs: dict[str, Tensor]) -> list[Row]:
    ours = flux.apply(params, problem.cfg, **arguments)
    narrow = Ops(wrap_stage=precision.compute_in(torch.bfloat16))
    error = relative(flux.apply(params, problem.cfg, **arguments, ops=narrow), theirs["forward"])
    their_error = relative(theirs["forward_bfloat16"], theirs["forward"])
    return [
        relative_row("forward", "float32", ours, theirs["forward"], "forward"),
        Row(
            "forward",
            "bfloat16",
            "relative to their float32",
            error,
            BOUNDS["bfloat16"] * their_error,
            f"{BOUNDS['bfloat16']} x the reference's own {their_error:.2e}",
        ),
        # Float32 would be within any bound from above.
        Row(
            "forward",
            "bfloat16 is used",
            "the reference's error over ours",
            their_error / error if error else math.inf,
            BOUNDS["bfloat16 used"],
        ),
    ]


def _embeddings(problem: Problem, arguments: dict, inputs: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[Row]:
    kinds = ("timestep", "guidance") if problem.cfg.guidance_embed else ("timestep",)
    rows = []
    for kind in kinds:
        ours = layers.timestep_embedding(inputs[f"{kind}_embedding"], 256)
        rows.append(relative_row("embeddings", kind, ours, theirs[f"{kind}_embedding"], "embedding"))
    _, const = flux.inputs(problem.cfg, **arguments)
    bound = BOUNDS["rope"] * max(1, problem.height / 256, problem.width / 256)
    for ours, expected, name in zip(const["rope"], _rope(theirs), ("cosines", "sines"), strict=True):
        rows.append(Row("embeddings", f"rope, {name}", "relative", relative(ours[:1], expected), bound))
    return rows


def _rope(theirs: dict[str, Tensor]) -> layers.Rope:
    """Returns the reference's cosines and sines [L, D/2] as our table: [1, 1, L, D], sines signed."""
    cos, sin = theirs["rope/cos"], theirs["rope/sin"]
    table = torch.stack([cos, cos], dim=-1), torch.stack([-sin, sin], dim=-1)
    return tuple(part.flatten(-2)[None, None] for part in table)


def _stages(problem: Problem, params: Params, arguments: dict, theirs: dict[str, Tensor]) -> list[Row]:
    """Each stage by itself: what the reference gave to it, and what it made of that."""
    chain = flux.chain(problem.cfg)
    carry, _ = flux.inputs(problem.cfg, **arguments)
    const = {"rope": _rope(theirs), "text_length": arguments["txt"].shape[1]}
    rows = []
    for stage, after in zip(chain, (*chain[1:], None), strict=True):
        expected = {"img": theirs["forward"]} if after is None else _before(theirs, after.name, const["text_length"])
        ours = bind(stage, Ops())(stage.select(params), carry, const)
        errors = {name: relative(ours[name], value) for name, value in expected.items()}
        where, bound = worst(errors), BOUNDS["join" if stage.name == "join" else "stage"]
        rows.append(Row("stages", stage.name, "relative", errors[where], bound, where, stage.name))
        carry = {"vec": theirs["double_blocks.0/vec"], **expected}
    return rows


def _before(theirs: dict[str, Tensor], stage: str, text: int) -> dict[str, Tensor]:
    found = {name.rpartition("/")[2]: value for name, value in theirs.items() if name.startswith(f"{stage}/")}
    # The reference's last block computes text too, which its head leaves aside.
    return {"img": found["stream"][:, text:]} if stage == "head" else found


def _gradients(
    problem: Problem,
    params: Params,
    inputs: dict[str, Tensor],
    theirs: dict[str, Tensor],
    folder: Path,
    errors: dict[str, float],
) -> list[Row]:
    """Of the flow's loss, for every leaf; `errors` is filled with each leaf's."""
    grads, loss = _grad_and_value(problem, params, inputs)
    flat, layout, found = tree.flatten(grads), exchange.layout(problem), exchange.gradients(folder)
    for leaf in layout.ours:
        errors[leaf] = relative(flat[leaf].cpu(), layout.leaf(leaf, found.read))
    by_stage: dict[str, list[str]] = {}
    for stage in flux.chain(problem.cfg):
        leaves = [leaf for leaf in layout.ours if stage_of(leaf) == stage.name]
        by_stage |= {stage.name: leaves} if leaves else {}
    rows = [relative_row("gradients", "the loss itself", loss.reshape(1), theirs["loss"], "loss")]
    for stage, leaves in by_stage.items():
        where = worst({leaf: errors[leaf] for leaf in leaves})
        rows.append(Row("gradients", stage, "relative, worst leaf", errors[where], BOUNDS["gradient"], where, stage))
    return rows


def stage_of(leaf: str) -> str:
    """Returns the name of the stage that a leaf of the parameters is of."""
    top, index, *_ = leaf.split(".")
    if top in tree.LISTS:
        return f"{top}.{index}"
    return "head" if top == "final_layer" else "stem"


def _grad_and_value(problem: Problem, params: Params, inputs: dict[str, Tensor]) -> tuple[Params, Tensor]:
    if "img_cond" not in inputs:
        return fold.grad_and_value(params, problem.cfg, inputs)
    # The training fold has no channels beside the latents'.
    target = flux.patchify(path.target(inputs["latents"], inputs["noise"]))

    def loss(params: Params) -> Tensor:
        return (flux.apply(params, problem.cfg, **_arguments(inputs)) - target).square().mean()

    value, pull = fold.autograd_vjp(loss, params)
    return pull(torch.ones_like(value))[0], value


# The sampler.


def _sampler(problem: Problem, params: Params, folder: Path, out: Comparison) -> Tensor:
    inputs, theirs = (read(folder, "sampler", problem.device) for read in (exchange.inputs, exchange.answers))
    states: list[Tensor] = []
    told: list[Tensor] = []

    def watch(fn: Callable, stage: Stage) -> Callable:
        def watched(params: Params, carry: dict, const: dict) -> dict:
            # A last bit of t turns 1000 t by 6e-5, which would hide the loop's own errors: what is told has a row.
            time = theirs["times"][len(states)]
            ours = carry["timesteps"].reshape(-1, len(time))  # [2, B] where guided by no prompt beside the prompt
            states.append(carry["img"][: len(time)])
            told.append(ours)
            return fn(params, {**carry, "timesteps": time.repeat(len(ours))}, const)

        return watched if stage.name == "stem" else fn

    with torch.no_grad():
        end = sampler.sample(
            params,
            problem.cfg,
            **inputs,
            steps=problem.steps,
            guidance=problem.guidance if problem.cfg.guidance_embed else None,
            cfg_scale=problem.cfg_scale,
            shift=problem.shift,
            image_seq_len=_shift_length(problem.reference, problem.image_tokens),
            ops=Ops(wrap_stage=watch),
        )
    states.append(flux.patchify(end))
    out.rows += [*_schedules(problem, folder, theirs), _told(told, theirs), *_trajectory(problem, states, theirs)]
    return end


def _shift_length(reference: str, image_tokens: int) -> int:
    """Returns what a reference's shift goes by: torchtitan's goes by latent pixels."""
    return 4 * image_tokens if reference == "torchtitan" else image_tokens


def _told(told: list[Tensor], theirs: dict[str, Tensor]) -> Row:
    errors = {
        f"step {step}": (ours - time).abs().max().item()
        for step, (ours, time) in enumerate(zip(told, theirs["times"], strict=True), start=1)
    }
    where = worst(errors)
    return Row("sampler", "times told to the model", "largest difference", errors[where], BOUNDS["schedule"], where)


def _trajectory(problem: Problem, states: list[Tensor], theirs: dict[str, Tensor]) -> Iterator[Row]:
    yield relative_row("sampler", "noise in patches", states[0], theirs["x.0"], "patches")
    # cfg_scale v_c - (cfg_scale - 1) v_u, whose errors are independent.
    scale = problem.cfg_scale or 1
    bound = BOUNDS["trajectory"] * math.hypot(scale, scale - 1)
    for step, state in enumerate(states[1:], start=1):
        yield Row("sampler", f"after step {step}", "relative", relative(state, theirs[f"x.{step}"]), bound)


def _schedules(problem: Problem, folder: Path, theirs: dict[str, Tensor]) -> Iterator[Row]:
    for shift in (True, False):
        errors = {}
        for i, (steps, tokens, shifted) in enumerate(exchange.request(folder)["sampler"]["schedules"]):
            if shifted == shift:
                length = _shift_length(problem.reference, tokens) if shift else None
                ours = timesteps.schedule(steps, length)
                errors[f"{steps} steps, {tokens} tokens"] = (ours - theirs[f"schedule.{i}"].cpu()).abs().max().item()
        where, name = worst(errors), "shifted" if shift else "unshifted"
        yield Row("sampler", f"schedule, {name}", "largest difference", errors[where], BOUNDS["schedule"], where)


# The autoencoder and the text encoders.


# In float64: how it is convolved in float32 depends on the processor, and ways differ by 2e-6, as would a small fault.
@torch.no_grad()
def _autoencoder(problem: Problem, folder: Path, end: Tensor | None, out: Comparison) -> None:
    params, cfg = tree.map(Tensor.double, problem.autoencoder_params), problem.autoencoder_cfg
    inputs, theirs = (read(folder, "autoencoder", problem.device) for read in (exchange.inputs, exchange.answers))
    inputs = {name: value.double() for name, value in inputs.items()}
    latents = inputs["latents"] if end is None else exchange.answers(folder, "sampler", problem.device)["latents"][:1]
    mean = autoencoder.encode(params, cfg, inputs["images"])
    drawn = autoencoder.encode(params, cfg, inputs["corner"], theirs["noise"])
    decoded = autoencoder.decode(params, cfg, latents.double())
    out.rows += [
        relative_row("autoencoder", "encode, mean", mean, theirs["mean"], "encode"),
        relative_row("autoencoder", "encode, drawn", drawn, theirs["draw"], "encode"),
        relative_row("autoencoder", "decode", decoded, theirs["decoded"], "decode"),
    ]
    if end is not None:
        # To be looked at: the bound is a shade, and the decoder was held in float64 above.
        ours = autoencoder.decode(problem.autoencoder_params, cfg, end[:1])
        images = {"ours": ours, "theirs": theirs["decoded"].float()}
        out.images |= {name: image[0].cpu() for name, image in images.items()}
        difference = (images["ours"].clamp(-1, 1) - images["theirs"].clamp(-1, 1)).abs().max().item() / 2
        out.rows.append(Row("image", "at the end", "largest difference", difference, BOUNDS["image"]))


def _text(problem: Problem, folder: Path, out: Comparison) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokens, theirs = (read(folder, "text", problem.device) for read in (exchange.inputs, exchange.answers))
    cfg = TextConfig(kind="hf", path=exchange.request(folder)["text"], max_length=problem.text_tokens)
    txt, y = text.encode(text.load(cfg, device=problem.device), cfg, tokens)
    out.rows += [
        relative_row("text", "T5, last hidden state", txt, theirs["t5"], "text"),
        relative_row("text", "CLIP, pooled", y, theirs["clip"], "text"),
    ]


def damaged(params: Params, leaf: str) -> Params:
    """Returns parameters with the first row of one leaf moved by the leaf's own size: a fault to be found."""
    flat = tree.flatten(params)
    value = flat[leaf].clone()
    value[0] += value.square().mean().sqrt().clamp(min=1e-3)
    return tree.unflatten({**flat, leaf: value})


def failed_stages(rows: list[Row]) -> list[str]:
    """Returns the stages that by themselves differ from the reference's, in the order of the model."""
    return [row.stage for row in rows if row.part == "stages" and not row.passed]
