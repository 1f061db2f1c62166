"""Downloads through huggingface_hub itself, from a hub on this machine."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download, utils

from flux_func.errors import UserError
from flux_func.interop import hub
from tests.helpers import tiny_hub

# The files of FLUX.1-dev, and some that other repositories have beside them.
DEV = (
    ".gitattributes",
    "LICENSE.md",
    "README.md",
    "ae.safetensors",
    "dev_grid.jpg",
    "flux1-dev.safetensors",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder_2/config.json",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.json",
    "text_encoder_2/model.fp16-00001-of-00001.safetensors",
    "text_encoder_2/model.safetensors.index.fp16.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/spiece.model",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
UNREAD = {
    ".gitattributes",
    "LICENSE.md",
    "README.md",
    "ae.safetensors",
    "dev_grid.jpg",
    "flux1-dev.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder_2/model.fp16-00001-of-00001.safetensors",
    "text_encoder_2/model.safetensors.index.fp16.json",
}
BOTH = ("transformer", "autoencoder")


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A hub with FLUX.1-dev's names, which huggingface_hub in this process asks."""
    for name in DEV:
        path = tmp_path / "repos/owner/dev" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    with tiny_hub.serve(tmp_path / "repos") as served:
        tiny_hub.use(monkeypatch, served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        utils.disable_progress_bars()
        yield served
        utils.enable_progress_bars()


def add(served, repo, *names):
    """Adds a repository of files that hold their names."""
    for name in names:
        path = served.folder / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def downloaded(served):
    return {name.partition("/dev/")[2] for name in served.downloaded}


def test_a_whole_pipeline_without_what_nobody_reads(local):
    found = hub.fetch("hf://owner/dev", BOTH, whole=True)
    assert list(found) == ["pipeline"]
    assert downloaded(local) == set(DEV) - UNREAD and len(local.downloaded) == len(DEV) - len(UNREAD)
    for name in set(DEV) - UNREAD:
        assert (found["pipeline"] / name).read_text() == name


@pytest.mark.parametrize("parts", [("transformer",), ("autoencoder",), BOTH])
def test_parts_as_single_files(local, parts):
    names = {"transformer": "flux1-dev.safetensors", "autoencoder": "ae.safetensors"}
    found = hub.fetch("hf://owner/dev", parts)
    assert {part: path.name for part, path in found.items()} == {part: names[part] for part in parts}
    assert all(path.read_text() == path.name for path in found.values())
    assert downloaded(local) == {names[part] for part in parts}


def test_parts_as_folders_where_there_are_no_single_files(local):
    for name in ("flux1-dev.safetensors", "ae.safetensors"):
        (local.folder / "owner/dev" / name).unlink()
    found = hub.fetch("hf://owner/dev", BOTH)
    assert {part: path.name for part, path in found.items()} == {"transformer": "transformer", "autoencoder": "vae"}
    assert downloaded(local) == {name for name in DEV if name.startswith(("transformer/", "vae/"))}


@pytest.mark.parametrize("path", ["flux1-dev.safetensors", "vae", "text_encoder_2/model.safetensors.index.json"])
def test_a_path_in_a_repository(local, path):
    found = hub.fetch(f"hf://owner/dev/{path}", BOTH, whole=True)
    assert list(found) == [""] and str(found[""]).endswith(f"/{path}")
    assert downloaded(local) == {name for name in DEV if name == path or name.startswith(f"{path}/")}


def test_a_single_file_of_any_name(local):
    add(local, "owner/tuned", "README.md", "mine.safetensors")
    assert hub.fetch("hf://owner/tuned", ("transformer",))[""].read_text() == "mine.safetensors"


def test_revisions(local):
    for revision in ("v1", tiny_hub.COMMIT):
        found = hub.fetch(f"hf://owner/dev@{revision}", ("autoencoder",))
        assert found["autoencoder"].parent.name == tiny_hub.COMMIT
    assert downloaded(local) == {"ae.safetensors"} and len(local.downloaded) == 1


def test_what_the_cache_holds_serves_again_and_without_a_network(local, monkeypatch):
    whole = hub.fetch("hf://owner/dev", BOTH, whole=True)
    before = len(local.downloaded)
    assert hub.fetch("hf://owner/dev", BOTH, whole=True) == whole and len(local.downloaded) == before
    requests = local.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch("hf://owner/dev", BOTH, whole=True) == whole and local.requests == requests
    with pytest.raises(UserError, match="'hf://owner/dev': not in the cache, and HF_HUB_OFFLINE is set: unset it"):
        hub.fetch("hf://owner/dev", ("transformer",))


def test_a_licence_to_accept(local, monkeypatch):
    local.gated.add("owner/dev")
    says = "accept the licence on the repository's page, and log in with `hf auth login` or set HF_TOKEN"
    with pytest.raises(UserError, match=f"^--from is 'hf://owner/dev': not permitted: {says}"):
        hub.fetch("hf://owner/dev", ("transformer",))
    monkeypatch.setenv("HF_TOKEN", "hf_of_someone_else")
    with pytest.raises(UserError, match="not permitted"):
        hub.fetch("hf://owner/dev", ("transformer",))
    monkeypatch.setenv("HF_TOKEN", local.TOKEN)
    assert hub.fetch("hf://owner/dev", ("transformer",))["transformer"].is_file()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("hf://owner", "should be hf://owner/repo, hf://owner/repo@revision or hf://owner/repo/file.safetensors"),
        ("hf://", "should be hf://owner/repo"),
        ("hf://owner/dev@", "should be hf://owner/repo"),
        ("hf://datasets/owner/dev", "a dataset holds no weights; should be hf://owner/repo"),
        ("hf://owner/none", "there is no such repository, or it is not yours to see: mind the spelling, or log in"),
        ("hf://owner/dev@v2", "the repository has no such revision"),
        ("hf://owner/dev/flux2.safetensors", "the repository has no such file; it has ae.safetensors, flux1-dev.safe"),
        ("hf://owner/two", "it has flux1-a.safetensors, flux1-b.safetensors: name one, as hf://owner/two/flux1-a.safe"),
        ("hf://owner/other", "no file's name says transformer or autoencoder; it has a.safetensors, b.safetensors"),
        ("hf://owner/pickles", "no file's name says transformer or autoencoder; it has no safetensors file"),
    ],
)
def test_addresses_that_lead_nowhere(local, address, says):
    add(local, "owner/two", "flux1-a.safetensors", "flux1-b.safetensors")
    add(local, "owner/other", "a.safetensors", "b.safetensors")
    add(local, "owner/pickles", "flux1.pt", "transformer/diffusion_pytorch_model.bin")
    with pytest.raises(UserError) as error:
        hub.fetch(address, BOTH)
    assert str(error.value).startswith(f"--from is {address!r}: {says}") and "\n" not in str(error.value)
    assert not local.downloaded


def test_nobody_answers(local, monkeypatch):
    tiny_hub.use(monkeypatch, "http://127.0.0.1:1")
    with pytest.raises(UserError, match="'hf://owner/dev': the hub cannot be reached .*refused"):
        hub.fetch("hf://owner/dev", BOTH)


def test_no_room_for_the_download(local, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(UserError, match="GB are to be downloaded, and the disk of .* has 0.00 GB free: .*HF_HOME"):
        hub.fetch("hf://owner/dev", BOTH)
    assert not local.downloaded


def test_a_disk_that_fills_up(local, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(UserError, match="the disk of .*cache' is full: free some, or set HF_HOME"):
        hub.fetch("hf://owner/dev", ("autoencoder",))


def test_a_download_cut_short_is_not_in_the_cache(local):
    local.broken.add("ae.safetensors")
    with pytest.raises(UserError, match="'hf://owner/dev': the hub cannot be reached"):
        hub.fetch("hf://owner/dev", ("autoencoder",))
    assert not list(Path(constants.HF_HUB_CACHE).rglob("ae.safetensors"))
    local.broken.clear()
    assert hub.fetch("hf://owner/dev", ("autoencoder",))["autoencoder"].read_text() == "ae.safetensors"


def test_a_lora_alone_and_what_peft_keeps_beside_it():
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    for parts in ((), ("transformer",)):
        chosen = hub.choose("hf://owner/lora", names, "", parts, False)
        assert chosen == {"": ["adapter_model.safetensors", "adapter_config.json"]}
    assert hub.choose(
        "x", ["a/adapter_config.json", "a/adapter_model.safetensors"], "a/adapter_model.safetensors", (), False
    ) == {"": ["a/adapter_model.safetensors", "a/adapter_config.json"]}
    assert hub.choose("x", ["README.md", "style.safetensors"], "", (), False) == {"": ["style.safetensors"]}
    with pytest.raises(
        UserError, match="it is not clear which of its files is meant; it has a.safetensors, b.safetensors"
    ):
        hub.choose("x", ["a.safetensors", "b.safetensors"], "", (), False)
