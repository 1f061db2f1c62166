"""Answers the questions of an exchange folder with a reference's own code; flux_func/parity/exchange.py says how.

    PYTHON flux_func/parity/references/answer.py bfl|diffusers|torchtitan FOLDER

A program by itself, which imports nothing of flux_func, so that PYTHON may be that of any environment that has torch,
safetensors and the reference. What is particular to a reference is in with_NAME.py, beside this file.
"""

import contextlib
import importlib
import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# The exit code that says: the module named on the last line of stderr is not installed.
MISSING = 3
Tensors = dict[str, Tensor]


def answer(name: str, folder: Path, say: Callable[[str], object] = print) -> None:
    """Answers every question of `folder`, each in a file of its own there, and says each when it starts."""
    request = json.loads((folder / "request.json").read_text())
    # Bounds are those of float32, not of its faster approximations.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    reference, start = importlib.import_module(f"with_{name}"), time.perf_counter()
    for part, solve in PARTS.items():
        if part in request["parts"]:
            inputs = load_file(folder / f"{part}.inputs.safetensors", device=request["device"])
            save(solve(reference, request, folder, inputs, say), folder / f"{part}.answers.safetensors")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    about = {"versions": versions(reference.DISTRIBUTION), "seconds": time.perf_counter() - start, "peak_bytes": peak}
    (folder / "about.json").write_text(json.dumps(about))


def versions(distribution: str) -> dict[str, str]:
    """Returns what computed the answers."""
    found = {name: importlib.metadata.version(name) for name in (distribution, "torch", "transformers")}
    return {"python": sys.version.split()[0], **found}


def save(tensors: Tensors, path: Path) -> None:
    """Writes tensors, each in memory of its own."""
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, path)


def build(make: Callable[[], torch.nn.Module], path: Path, device: str) -> torch.nn.Module:
    """Returns a module with the weights of a file, never held twice."""
    with torch.device("meta"):
        module = make()
    module.load_state_dict(load_file(path, device=device), strict=True, assign=True)
    return module.eval()


# The transformer.


def transformer(reference: ModuleType, request: dict, folder: Path, inputs: Tensors, say: Callable) -> Tensors:
    """Forward in float32 and bfloat16, the carry before every stage, embeddings, the gradients, the trajectory."""
    model = build(
        lambda: reference.transformer(request["transformer"]),
        folder / "transformer.safetensors",
        request["device"],
    )
    given, target = question(reference, inputs)
    say("forward and its stages")
    with torch.no_grad(), recording(reference, model) as answers:
        answers["forward"] = reference.velocity(model, given)
    for name in ("timestep", "guidance"):
        answers[f"{name}_embedding"] = reference.embedding(model, inputs[f"{name}_embedding"])
    if "sampler" in request["parts"]:
        say("sampler")
        sampled = load_file(folder / "sampler.inputs.safetensors", device=request["device"])
        save(trajectory(reference, model, request["sampler"], sampled), folder / "sampler.answers.safetensors")
    say("gradients")
    loss = (reference.velocity(model, given) - target).square().mean()
    loss.backward()
    answers["loss"] = loss.reshape(1)
    grads = {name: leaf.grad for name, leaf in model.named_parameters()}
    save_file({name: grad.cpu().contiguous() for name, grad in grads.items()}, folder / "gradients.safetensors")
    model.zero_grad(set_to_none=True)
    del grads
    say("forward in bfloat16")
    model.to(torch.bfloat16)
    with torch.no_grad():
        narrow = {name: narrowed(name, value) for name, value in given.items()}
        answers["forward_bfloat16"] = reference.velocity(model, narrow).float()
    return answers


def question(reference: ModuleType, inputs: Tensors) -> tuple[Tensors, Tensor]:
    """Returns the model's inputs at x_t = (1 - t) x_0 + t eps, patches in the reference's order, and the target."""
    t = inputs["timesteps"].reshape(-1, 1, 1, 1)
    noisy = (1 - t) * inputs["latents"] + t * inputs["noise"]
    given = reference.prepare(noisy, inputs["txt"], inputs["y"])
    if "img_cond" in inputs:
        given["img"] = torch.cat([given["img"], inputs["img_cond"]], dim=-1)
    rest = {name: inputs[name] for name in ("timesteps", "guidance") if name in inputs}
    return {**given, **rest}, reference.pack(inputs["noise"] - inputs["latents"])


def narrowed(name: str, value: Tensor) -> Tensor:
    """Returns an input as a model in bfloat16 takes it; positions are never rounded."""
    return value if name.endswith("_ids") else value.to(torch.bfloat16)


@contextlib.contextmanager
def recording(reference: ModuleType, model: torch.nn.Module) -> Iterator[Tensors]:
    """Yields a dict that fills with "STAGE/NAME", what goes into each stage after the first, as the model runs."""
    found: Tensors = {}

    def put(stage: str, values: dict[str, Tensor]) -> None:
        found.update({f"{stage}/{name}": value.detach().clone() for name, value in values.items()})

    doubles, singles = reference.blocks(model)
    hooks = []
    for i, block in enumerate(doubles):
        after = f"double_blocks.{i + 1}" if i + 1 < len(doubles) else "join"
        hooks.append(block.register_forward_hook(lambda _, __, out, after=after: put(after, reference.double_out(out))))
    for i, block in enumerate(singles):
        after = f"single_blocks.{i + 1}" if i + 1 < len(singles) else "head"
        hooks.append(block.register_forward_hook(lambda _, __, out, after=after: put(after, reference.single_out(out))))

    def first_double(_: Any, args: tuple, kwargs: dict) -> None:
        put("double_blocks.0", reference.double_in(args, kwargs))
        put("rope", reference.rope(args, kwargs))

    def first_single(_: Any, args: tuple, kwargs: dict) -> None:
        put("single_blocks.0", reference.single_in(args, kwargs))

    hooks.append(doubles[0].register_forward_pre_hook(first_double, with_kwargs=True))
    hooks.append(singles[0].register_forward_pre_hook(first_single, with_kwargs=True))
    yield found
    for hook in hooks:
        hook.remove()


def trajectory(reference: ModuleType, model: torch.nn.Module, settings: dict, inputs: Tensors) -> Tensors:
    """The state before each step of the reference's own loop and after the last, its times, and schedules.

    With classifier-free guidance the model is given the state twice a step: in one batch, or one after the other.
    """
    states: list[Tensor] = []
    times: list[Tensor] = []
    batch = len(inputs["noise"])

    def before(_: Any, args: tuple, kwargs: dict) -> None:
        states.append(kwargs[reference.IMAGE][:batch].detach().clone())
        times.append(kwargs[reference.TIME][:batch].detach().clone())

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        end = reference.sample(model, inputs, settings)
    hook.remove()
    calls = len(states) // settings["steps"]
    schedules = {
        f"schedule.{i}": torch.as_tensor(reference.schedule(*case), dtype=torch.float64)
        for i, case in enumerate(settings["schedules"])
    }
    steps = {f"x.{i}": state for i, state in enumerate([*states[::calls], reference.pack(end)])}
    return {**steps, "times": torch.stack(times[::calls]), "latents": end, **schedules}


# The autoencoder and the text encoders.


@torch.no_grad()
def autoencoder(reference: ModuleType, request: dict, folder: Path, inputs: Tensors, say: Callable) -> Tensors:
    """Both directions, back from the first of the trajectory's ends, if any; a draw, with the noise that was drawn.

    In float64, as flux_func/parity/compare.py says.
    """
    model = build(
        lambda: reference.autoencoder(request["autoencoder"]),
        folder / "autoencoder.safetensors",
        request["device"],
    ).double()
    say("autoencoder")
    answers = {"mean": reference.encode(model, inputs["images"].double(), draw=False)}
    corner = inputs["corner"].double()
    torch.manual_seed(request["seed"])
    answers["noise"] = torch.randn_like(reference.encode(model, corner, draw=False))
    torch.manual_seed(request["seed"])
    answers["draw"] = reference.encode(model, corner, draw=True)
    latents = inputs["latents"]
    if "sampler" in request["parts"]:
        latents = load_file(folder / "sampler.answers.safetensors", device=request["device"])["latents"][:1]
    answers["decoded"] = reference.decode(model, latents.double())
    return answers


@torch.no_grad()
def text(reference: ModuleType, request: dict, folder: Path, inputs: Tensors, say: Callable) -> Tensors:
    """T5 and CLIP as transformers' own whole modules run them, which is what every reference uses."""
    del reference
    from transformers import CLIPTextModel, T5EncoderModel

    root, answers = Path(request["text"]), {}
    kinds = {
        "t5": ("text_encoder_2", T5EncoderModel, "last_hidden_state"),
        "clip": ("text_encoder", CLIPTextModel, "pooler_output"),
    }
    for part, (name, kind, output) in kinds.items():
        say(part.upper())
        model = kind.from_pretrained(root / name, dtype=torch.float32, local_files_only=True, use_safetensors=True)
        tokens = inputs[part]
        answers[part] = model.to(tokens.device).eval()(input_ids=tokens, attention_mask=None)[output]
        del model
    return answers


# In this order, the sampler's question being answered with the transformer's.
PARTS = {"transformer": transformer, "autoencoder": autoencoder, "text": text}


if __name__ == "__main__":
    try:
        answer(sys.argv[1], Path(sys.argv[2]), lambda line: print(line, flush=True))
    except ModuleNotFoundError as error:
        print(error.name, file=sys.stderr)
        sys.exit(MISSING)
