"""Plans of conversions; tests/test_convert_main.py carries them out."""

import dataclasses
import shutil

import pytest
import torch

import flux_func as ff
from flux_func.errors import UserError
from flux_func.interop import conversion, formats
from flux_func.interop.stored import Stored
from tests.helpers import tiny_pipeline


@pytest.mark.parametrize(
    ("name", "changes", "file"),
    [
        ("mine.safetensors", {"guidance_embed": True}, "flux1-dev.safetensors"),
        ("mine.safetensors", {}, "flux1-schnell.safetensors"),
        ("mine.safetensors", {"guidance_embed": True, "in_channels": 384}, "flux1-fill-dev.safetensors"),
        ("mine.safetensors", {"guidance_embed": True, "in_channels": 128}, "flux1-control-dev.safetensors"),
        ("flux1-krea-dev.safetensors", {"guidance_embed": True}, "flux1-krea-dev.safetensors"),
        ("mine.safetensors", {"depth": 3}, "flux1-custom.safetensors"),
    ],
)
def test_names_of_bfls_files(name, changes, file):
    cfg = dataclasses.replace(ff.flavor("flux-schnell"), **changes)
    layout = formats.layout(cfg, "bfl")
    stored = Stored(name, "bfl", cfg, layout, {}, lambda *rows: None)
    assert conversion.file_name(stored) == file


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A whole pipeline, with files beside it."""
    root = tiny_pipeline.whole(tmp_path_factory.mktemp("pipeline") / "whole")
    (root / "README.md").write_text("words")
    return root


ENCODERS = ["scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]


@pytest.mark.parametrize(
    ("to", "format", "part", "places", "left_out"),
    [
        ("new", "diffusers", None, ["transformer", "vae"], ["README.md"]),
        ("new", "diffusers", "transformer", [""], ["autoencoder", *ENCODERS]),
        ("new", "bfl", None, ["flux1-custom.safetensors", "ae.safetensors"], ENCODERS),
        ("new", "bfl", "autoencoder", ["ae.safetensors"], ["transformer", *ENCODERS]),
        ("new.safetensors", "bfl", None, [""], ["autoencoder", *ENCODERS]),
        ("new", "torchtitan", None, [""], ["autoencoder", *ENCODERS]),
        ("new", "orbax", "autoencoder", [""], ["transformer", *ENCODERS]),
    ],
)
def test_what_becomes_of_a_pipeline(pipeline, tmp_path, to, format, part, places, left_out):
    plan = conversion.plan(str(pipeline), str(tmp_path / to), format, part=part)
    assert list(plan.stored) == places and sorted(plan.left_out) == sorted(left_out)
    assert sorted(plan.copies) == (["model_index.json", *ENCODERS] if format == "diffusers" and not part else [])


def test_the_size_is_what_is_written(pipeline, tmp_path):
    plan = conversion.plan(str(pipeline), str(tmp_path / "new"), "diffusers", torch.bfloat16)
    written = []
    conversion.check(plan)
    conversion.run(plan, progress=written.append)
    assert sum(written) == plan.size()
    assert {str(path.relative_to(plan.to)) for path in plan.to.rglob("*") if path.is_file()} == {
        *plan.files(),
        *(f"{part}/{file}" for part in plan.stored for file in ("config.json", "diffusion_pytorch_model.safetensors")),
    }


@pytest.fixture
def linked(pipeline, tmp_path):
    """A pipeline made of links, to files as in a snapshot of the hub and to folders, at several depths."""
    root = tmp_path / "linked"
    shutil.copytree(pipeline, tmp_path / "cache")
    root.mkdir()
    for child in (tmp_path / "cache").iterdir():
        (root / child.name).symlink_to(child)
    (root / "tokenizer").unlink()
    (root / "tokenizer").mkdir()
    for child in (tmp_path / "cache/tokenizer").iterdir():
        (root / "tokenizer" / child.name).symlink_to(child)
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/deep/words.txt").write_text("words")
    (root / "tokenizer/more").symlink_to(tmp_path / "elsewhere")
    return root


def test_links_are_copied_as_what_they_lead_to(linked, pipeline, tmp_path):
    plan = conversion.plan(str(linked), str(tmp_path / "new"), "diffusers")
    conversion.check(plan)
    conversion.run(plan)
    of = {str(path.relative_to(pipeline)) for path in pipeline.rglob("*")} - {"README.md"}
    more = {"tokenizer/more", "tokenizer/more/deep", "tokenizer/more/deep/words.txt"}
    assert {str(path.relative_to(plan.to)) for path in plan.to.rglob("*")} == of | more
    assert not any(path.is_symlink() for path in plan.to.rglob("*"))
    for path in plan.files():
        assert (plan.to / path).read_bytes() == (linked / path).read_bytes()


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("linked/tokenizer/new", "is part of what is copied"),
        ("linked/tokenizer/more/deep/new", "is part of what is copied"),
        ("elsewhere/deep/new", "is part of what is copied"),
        ("elsewhere", "holds what is read"),
        ("cache", "holds what is read"),
    ],
)
def test_what_is_copied_is_left_alone_through_links_too(linked, tmp_path, to, says):
    plan = conversion.plan(str(linked), str(tmp_path / to), "diffusers")
    with pytest.raises(UserError, match=f"{tmp_path / to}: {says}"):
        conversion.check(plan, overwrite=True)


def test_links_in_a_circle(linked, tmp_path):
    (tmp_path / "elsewhere/deep/back").symlink_to(tmp_path / "elsewhere")
    plan = conversion.plan(str(linked), str(tmp_path / "new"), "diffusers")
    with pytest.raises(UserError, match=r"tokenizer/more/deep/back: is a link back to .*elsewhere, which it is in"):
        conversion.check(plan)
