import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from fluxbfl.model import Flux, FluxParams
from safetensors.torch import load_file

from flux_func.errors import UserError
from flux_func.models import flux
from flux_func.parity import exchange
from tests.helpers import tiny_parity

TINY = flux.flavor("flux-tiny")


def test_weights_are_the_reference_s_own_state_dict(tmp_path):
    for reference in ("bfl", "diffusers"):
        (tmp_path / reference).mkdir()
        posed = tiny_parity.pose(reference, TINY, parts=("transformer", "autoencoder"))
        exchange.ask(posed, tmp_path / reference)
    fields = exchange.request(tmp_path / "bfl")["transformer"]
    fields.pop("qk_norm_eps")
    models = {"bfl/transformer": Flux(FluxParams(**fields))}
    request = exchange.request(tmp_path / "diffusers")
    for part, kind in (("transformer", FluxTransformer2DModel), ("autoencoder", AutoencoderKL)):
        fields = {name: value for name, value in request[part].items() if not name.startswith("_")}
        models[f"diffusers/{part}"] = kind(**fields)
    for name, model in models.items():
        state = load_file(tmp_path / f"{name}.safetensors")
        assert {key: leaf.shape for key, leaf in state.items()} == {
            key: leaf.shape for key, leaf in model.state_dict().items()
        }


def test_only_what_is_compared_is_asked(tmp_path):
    exchange.ask(tiny_parity.pose("bfl", TINY), tmp_path)
    names = {"request.json", "transformer.inputs.safetensors", "transformer.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names
    inputs = exchange.inputs(tmp_path, "transformer", "cpu")
    assert inputs["latents"].dtype == torch.float32


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**29))
    with pytest.raises(UserError, match=r"has 0.5 GiB free, 1.0 GiB are needed .* TMPDIR"):
        exchange.ask(tiny_parity.pose("bfl", TINY), tmp_path)
    assert not list(tmp_path.iterdir())
