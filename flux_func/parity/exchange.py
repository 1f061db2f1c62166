"""The folder in which a reference is asked and answers (`references/answer.py`), so that it needs nothing of ours.

Asked: `request.json`; PART.inputs.safetensors for each part; transformer.safetensors and autoencoder.safetensors, the
weights under the reference's own names, with its own configuration in the request. Answered: PART.answers.safetensors,
gradients.safetensors under its own names, about.json.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import diffusers, formats, safetensors_io
from flux_func.interop.spans import Layout
from flux_func.models import autoencoder
from flux_func.models.autoencoder import AutoencoderConfig
from flux_func.models.flux import FluxConfig
from flux_func.models.layers import Params
from flux_func.parity import problem as problems
from flux_func.parity.problem import Problem


def ask(problem: Problem, folder: Path) -> None:
    """Writes the questions.

    Raises:
      UserError: the disk has too little room for them and their answers.
    """
    _check_room(problem, folder)
    request: dict[str, Any] = {
        "parts": problem.parts,
        "device": problem.device,
        "seed": problem.seed,
        "text": problem.text_path,
        "transformer": transformer_config(problem.reference, problem.cfg),
        "autoencoder": _autoencoder_config(problem.reference, problem.autoencoder_cfg),
        "sampler": {
            "steps": problem.steps,
            "guidance": problem.guidance if problem.cfg.guidance_embed else None,
            "cfg_scale": problem.cfg_scale,
            "shift": problem.shift,
            "schedules": problems.schedules(problem),
        },
    }
    if "transformer" in problem.parts:
        _write(folder / "transformer.inputs.safetensors", problems.transformer_inputs(problem))
        write_weights(folder / "transformer.safetensors", layout(problem), problem.params)
    if "sampler" in problem.parts:
        _write(folder / "sampler.inputs.safetensors", problems.sampler_inputs(problem))
    if "autoencoder" in problem.parts:
        _write(folder / "autoencoder.inputs.safetensors", problems.autoencoder_inputs(problem))
        theirs = formats.layout(problem.autoencoder_cfg, problem.reference)
        write_weights(folder / "autoencoder.safetensors", theirs, problem.autoencoder_params)
    if "text" in problem.parts:
        if not problem.text_path:
            request["text"] = str(folder / "text")
            problems.write_text_encoders(folder / "text", problem.seed)
        vocabularies = [
            json.loads((Path(request["text"]) / name / "config.json").read_text())["vocab_size"]
            for name in ("text_encoder_2", "text_encoder")
        ]
        _write(folder / "text.inputs.safetensors", problems.text_inputs(problem, vocabularies))
    (folder / "request.json").write_text(json.dumps(request))


def request(folder: Path) -> dict[str, Any]:
    """Returns what was asked."""
    return json.loads((folder / "request.json").read_text())


def inputs(folder: Path, part: str, device: str) -> dict[str, Tensor]:
    """Returns what a part was asked with."""
    return load_file(folder / f"{part}.inputs.safetensors", device=device)


def answers(folder: Path, part: str, device: str) -> dict[str, Tensor]:
    """Returns what the reference answered for a part."""
    return load_file(folder / f"{part}.answers.safetensors", device=device)


def gradients(folder: Path) -> safetensors_io.Tensors:
    """Returns the reference's gradients, by its own names."""
    return safetensors_io.open_files([folder / "gradients.safetensors"])


def about(folder: Path) -> dict[str, Any]:
    """Returns what the reference says of itself: versions, seconds, peak_bytes."""
    return json.loads((folder / "about.json").read_text())


def layout(problem: Problem) -> Layout:
    """Returns the layout of the transformer's weights, and of their gradients, in the reference's own names."""
    return formats.layout(problem.cfg, problem.reference)


def transformer_config(reference: str, cfg: FluxConfig) -> dict[str, Any]:
    """Returns a transformer's configuration as a reference takes it."""
    return diffusers.transformer_json(cfg) if reference == "diffusers" else dataclasses.asdict(cfg)


def _autoencoder_config(reference: str, cfg: AutoencoderConfig) -> dict[str, Any]:
    return diffusers.vae_json(cfg) if reference == "diffusers" else dataclasses.asdict(cfg)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def write_weights(path: Path, layout: Layout, params: Params) -> None:
    """Writes weights under the names of a layout."""
    flat = tree.flatten(params)
    dtypes = layout.tensor_types({name: leaf.dtype for name, leaf in flat.items()})
    safetensors_io.write(
        path, layout.theirs, dtypes, lambda name: layout.tensor(name, lambda leaf, start, stop: flat[leaf][start:stop])
    )


def _check_room(problem: Problem, folder: Path) -> None:
    shapes = autoencoder.shapes(problem.autoencoder_cfg) if "autoencoder" in problem.parts else {}
    weights = sum(leaf.nbytes for leaf in tree.leaves(problem.params)) if "transformer" in problem.parts else 0
    # The weights and their gradients, and some tensors beside them.
    need = 2 * weights + 4 * sum(map(math.prod, shapes.values())) + 2**30
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"{folder} has {free / 2**30:.1f} GiB free, {need / 2**30:.1f} GiB are needed for weights and gradients; "
            f"name a folder with more room in the environment variable TMPDIR"
        )
