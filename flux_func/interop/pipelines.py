"""Whole pipelines as diffusers lays them out: a folder with model_index.json and a folder for each part.

After huggingface/diffusers, `pipelines/flux/pipeline_flux.py` and `schedulers/scheduling_flow_match_euler_discrete.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_func.errors import UserError

INDEX = "model_index.json"
# The folders of the parts that are read and written in several formats, by our names of those parts.
FOLDERS = {"transformer": "transformer", "autoencoder": "vae"}
# Each part and its class; None: any (the same tokenizer goes by several names).
PARTS = {
    "transformer": "FluxTransformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
    "tokenizer": None,
    "tokenizer_2": None,
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}
# Parts that are looked at only where an image is given.
_FOR_IMAGES = ("image_encoder", "feature_extractor")
# What else such a folder may hold, by the beginning of its class; the first that fits.
_OTHERS = {
    "Flux2": "FLUX.2",
    "Chroma": "Chroma",
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusion": "Stable Diffusion 1 or 2",
}
# The scheduler's fields and the values that FLUX's have: those that are always read, those of the shift by resolution
# (dev), and that of the schedule without (schnell).
_SCHEDULE = {
    "num_train_timesteps": 1000,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
_SHIFTED = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "time_shift_type": "exponential",
}
_UNSHIFTED = {"shift": 1.0}


@dataclass(frozen=True)
class Pipeline:
    """A FLUX.1 pipeline in a folder, its parts found there and none of them read.

    Attributes:
      root: the folder.
      kind: its class in diffusers, such as "FluxPipeline".
      shift: whether its schedule is shifted by resolution, as dev's is and schnell's is not.
    """

    root: Path
    kind: str
    shift: bool

    def part(self, name: str) -> Path:
        """Returns the folder of one of `PARTS`."""
        return self.root / name


def open_pipeline(folder: str | Path) -> Pipeline:
    """Returns the pipeline in a folder, from its model_index.json and its scheduler's configuration.

    Raises:
      UserError: naming the folder or file: no pipeline, one of another family (said to be what it is), a part that is
        missing or of another class, or a scheduler whose schedule is not one of FLUX.1's two.
    """
    root = Path(folder)
    if not (root / INDEX).is_file():
        what = f"has no {INDEX}" if root.is_dir() else "is a file" if root.exists() else "is not there"
        raise UserError(f"{root}: {what}; should be a pipeline's folder as diffusers saves it, such as FLUX.1-dev")
    index = read_json(root / INDEX)
    kind = index.get("_class_name")
    _check_family(root, kind)
    _check_parts(root, index)
    return Pipeline(root, kind, _shift(root / "scheduler" / "scheduler_config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; UserError naming the file where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is no JSON object, but a {type(found).__name__}")
    return found


def _check_family(root: Path, kind: Any) -> None:
    wanted = "a FLUX.1 pipeline is needed, such as FLUX.1-dev or FLUX.1-schnell"
    if not isinstance(kind, str):
        raise UserError(f"{root / INDEX}: has no _class_name; {wanted}")
    other = next((name for start, name in _OTHERS.items() if kind.startswith(start)), None)
    if other or not kind.startswith("Flux"):
        raise UserError(f"{root}: holds {f'{other}, a ' if other else 'a '}{kind}; {wanted}")


def _check_parts(root: Path, index: Mapping[str, Any]) -> None:
    for name, wanted in PARTS.items():
        found = _class(index.get(name))
        if found is None or not (root / name).is_dir():
            where = f"names no {name}" if found is None else f"names {name}, a folder that is not there"
            raise UserError(f"{root / INDEX}: {where}; the whole pipeline is needed")
        if wanted not in (None, found):
            raise UserError(f"{root / INDEX}: {name} is a {found}; FLUX.1's is a {wanted}")
    for name, value in index.items():
        if not name.startswith("_") and name not in PARTS and _class(value) and name not in _FOR_IMAGES:
            raise UserError(f"{root / INDEX}: names {name}, a {_class(value)}, which is no part of FLUX.1 from text")


def _class(entry: Any) -> str | None:
    """Returns the class in an entry ["library", "Class"]; None for a part that is left out."""
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _shift(path: Path) -> bool:
    saved = read_json(path)
    shift = saved.get("use_dynamic_shifting", False)
    if not isinstance(shift, bool):
        raise UserError(f"{path}: use_dynamic_shifting is {shift!r}; should be true or false")
    read, unread = (_SHIFTED, _UNSHIFTED) if shift else (_UNSHIFTED, _SHIFTED)
    usual = {**_SCHEDULE, **read}
    for field, value in saved.items():
        if field.startswith("_") or field == "use_dynamic_shifting" or field in unread:
            continue
        # A field that another version of diffusers has does nothing where it is null or false.
        wanted = usual.get(field)
        if value != wanted and (field in usual or value):
            raise UserError(f"{path}: {field} is {value!r}; FLUX.1's is {wanted!r}, and no other schedule is built")
    return shift
