"""The encoders of a run are the models' own functions, on what the config names; and every wrong path is named."""

import dataclasses
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flux_func import tree
from flux_func.errors import UserError
from flux_func.models import autoencoder, flux, text
from flux_func.train import encoders
from tests.helpers import rank_encoders, ranks, tiny_pipeline, tiny_run
from tests.helpers.tiny_run import CPU

CFG = flux.flavor("flux-tiny")
KL = autoencoder.AutoencoderConfig(kind="kl")
CAPTIONS = ["a handwritten three", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """T5 and CLIP as wide as FLUX takes them, of one layer."""
    return tiny_pipeline.build(tmp_path_factory.mktemp("hf") / "flux", 4096, 768, layers=1)


@pytest.fixture(scope="module")
def kl():
    return encoders.build(*settings({"autoencoder.kind": "kl", "autoencoder.random_init": True}))


def settings(fields=None):
    return tiny_run.config(fields), CFG, CPU


def images(size=16, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (2, 3, size, size)).astype(np.float32))


def test_dct_and_hash_are_the_models_functions():
    codecs = encoders.build(*settings({"text.max_length": 5}))
    latents = codecs.encode_image(images(), None)
    torch.testing.assert_close(latents, autoencoder.encode({}, autoencoder.AutoencoderConfig(), images()))
    torch.testing.assert_close(codecs.decode(latents), autoencoder.decode({}, autoencoder.AutoencoderConfig(), latents))
    tokens = codecs.tokenize(CAPTIONS)
    assert tokens["t5"].shape == (2, 5) and tokens["clip"].shape == (2, 77)
    cfg = text.TextConfig(max_length=5)
    for ours, theirs in zip(
        codecs.encode_text(tokens), text.encode({}, cfg, text.tokenizer(cfg)(CAPTIONS)), strict=True
    ):
        assert torch.equal(ours, theirs) and ours.shape[-1] in (CFG.context_in_dim, CFG.vec_in_dim)
    assert not codecs.posterior_noise


def test_kl_with_random_weights_draws_from_its_posterior(kl):
    params, noise = autoencoder.init(KL, seed=0), torch.ones(2, 16, 2, 2)
    assert kl.posterior_noise
    drawn, mean = kl.encode_image(images(), noise), kl.encode_image(images(), None)
    with torch.no_grad():
        torch.testing.assert_close(drawn, autoencoder.encode(params, KL, images(), noise))
        torch.testing.assert_close(mean, autoencoder.encode(params, KL, images()))
        torch.testing.assert_close(kl.decode(mean), autoencoder.decode(params, KL, mean))
    assert (drawn - mean).abs().min() > 0
    assert not (drawn.requires_grad or kl.decode(mean).requires_grad)


def test_kl_reads_its_file_and_trains_on_the_mean_where_asked(tmp_path):
    params = autoencoder.init(KL, seed=7)
    save_file(tree.flatten(params), tmp_path / "ae.safetensors")
    fields = {"autoencoder.kind": "kl", "autoencoder.path": str(tmp_path / "ae.safetensors")}
    codecs = encoders.build(*settings({**fields, "autoencoder.sample": False}))
    assert not codecs.posterior_noise
    with torch.no_grad():
        torch.testing.assert_close(codecs.encode_image(images(), None), autoencoder.encode(params, KL, images()))


@pytest.mark.parametrize("where", ["", "vae"])
def test_kl_is_read_from_a_pipeline_or_its_vae_folder_with_the_scaling_it_says(tmp_path, where):
    from diffusers import AutoencoderKL

    folder = tiny_pipeline.whole(tmp_path / "pipe")
    theirs = AutoencoderKL.from_pretrained(folder / "vae")
    fields = {"autoencoder.kind": "kl", "autoencoder.path": str(folder / where), "autoencoder.sample": False}
    codecs = encoders.build(*settings(fields))
    with torch.no_grad():
        latents = (theirs.encode(images(32)).latent_dist.mean - 0.2) * 0.4
        torch.testing.assert_close(codecs.encode_image(images(32), None), latents, rtol=1e-4, atol=1e-5)
        decoded = theirs.decode(latents / 0.4 + 0.2).sample
        torch.testing.assert_close(codecs.decode(latents), decoded, rtol=1e-4, atol=1e-4)


def test_an_autoencoder_of_another_size_is_refused(tmp_path):
    cfg = dataclasses.replace(KL, ch=32, ch_mult=(1, 1, 1))
    save_file(tree.flatten(autoencoder.init(cfg)), tmp_path / "ae.safetensors")
    with pytest.raises(UserError, match="its latents have 16 channels, and one stands for 4 pixels along a side"):
        encoders.build(*settings({"autoencoder.kind": "kl", "autoencoder.path": str(tmp_path / "ae.safetensors")}))


def test_t5_of_a_folder_of_its_own_is_named_where_it_does_not_fit(tmp_path, folder):
    narrow = tiny_pipeline.build(tmp_path / "narrow", weights=False)
    own = shutil.copytree(narrow / "text_encoder_2", tmp_path / "t5")
    shutil.copytree(narrow / "tokenizer_2", own, dirs_exist_ok=True)
    with pytest.raises(UserError) as raised:
        encoders.build(*settings({"text.kind": "hf", "text.path": str(folder), "text.t5": str(own)}))
    assert str(raised.value) == f"text.t5 is '{own}': its T5 is 32 wide, and the model takes 4096"


@pytest.mark.parametrize("random_init", [False, True])
def test_hf_is_t5_and_clip_of_the_folder(folder, random_init):
    fields = {"text.kind": "hf", "text.path": str(folder), "text.max_length": 6, "text.random_init": random_init}
    codecs = encoders.build(*settings({**fields, "train.seed": 3}))
    cfg = text.TextConfig("hf", str(folder), max_length=6, random_init=random_init)
    tokens = pickle.loads(pickle.dumps(codecs.tokenize))(CAPTIONS)
    assert tokens["t5"].shape == (2, 6) and tokens["clip"].shape == (2, 77)
    expected = text.encode(text.load(cfg, seed=3), cfg, tokens)
    for ours, theirs in zip(codecs.encode_text(tokens), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not ours.requires_grad and (ours[0] - ours[1]).abs().max() > 0.1


def test_what_has_weights_computes_in_the_type_asked_for(folder):
    fields = {"text.kind": "hf", "text.path": str(folder), "numerics.compute": "bfloat16"}
    codecs = encoders.build(*settings(fields))
    txt, y = codecs.encode_text(codecs.tokenize(CAPTIONS))
    assert txt.dtype == y.dtype == torch.bfloat16
    latents = codecs.encode_image(images(), None)
    assert latents.dtype == codecs.decode(latents).dtype == torch.float32
    # dct has no weights: nothing of an image is rounded away.
    torch.testing.assert_close(latents, autoencoder.encode({}, autoencoder.AutoencoderConfig(), images()))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text.kind": "hf", "text.path": "{tmp}/none"}, "text.path is '{tmp}/none': there is no such folder"),
        ({"text.kind": "hf", "text.path": "{tmp}"}, "text.path is '{tmp}': "),
        (
            {"text.kind": "hf", "text.path": "{tmp}/narrow", "text.random_init": True},
            "text.path is '{tmp}/narrow': its T5 is 32 wide, and the model takes 4096",
        ),
        (
            {"autoencoder.kind": "kl", "autoencoder.path": "{tmp}/ae.safetensors"},
            "autoencoder.path is '{tmp}/ae.safetensors': there is no such file or folder",
        ),
        (
            {"autoencoder.kind": "kl", "autoencoder.path": "{tmp}/other.safetensors"},
            "autoencoder.path is '{tmp}/other.safetensors': ",
        ),
    ],
)
def test_a_path_that_does_not_serve_is_named(tmp_path, fields, said):
    if "narrow" in said:
        tiny_pipeline.build(tmp_path / "narrow", weights=False)
    save_file({"encoder.conv_in.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError) as error:
        given = {
            field: value.format(tmp=tmp_path) if isinstance(value, str) else value for field, value in fields.items()
        }
        encoders.build(*settings(given))
    assert str(error.value).startswith(said.format(tmp=tmp_path)) and "\n" not in str(error.value)


# Over many processes.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_pipeline.build(tmp_path_factory.mktemp("hf") / "tiny", shards=True))


def alone(folder, fields, captions):
    codecs = encoders.build(rank_encoders.config(folder, fields), rank_encoders.CFG, CPU)
    return [part.float().numpy() for part in codecs.encode_text(codecs.tokenize(captions))]


def test_t5_in_parts_encodes_bit_for_bit_as_the_whole(tiny):
    axes = ("replicate", "shard", "context")
    cases = [
        ((1, 4, 1), {}),
        ((1, 2, 2), {"numerics.compute": "bfloat16", "parallel.prefetch": 3}),
        ((2, 2, 1), {"text.random_init": True, "parallel.prefetch": 0}),
        ((4, 1, 1), {}),
    ]
    given = [(dict(zip(axes, sizes, strict=True)), fields) for sizes, fields in cases]
    shapes = tree.flatten(text.abstract(text.TextConfig("hf", tiny))["t5"])
    whole = sum(leaf.numel() for leaf in shapes.values())
    for rank, found in enumerate(ranks.run(4, rank_encoders.encodings, tiny, given)):
        for (sizes, fields), (txt, y, kept, rows) in zip(given, found, strict=True):
            expected = alone(tiny, fields, rank_encoders.CAPTIONS[: rank + 1])
            assert np.array_equal(txt, expected[0]) and np.array_equal(y, expected[1]) and np.abs(txt).mean() > 0.1
            # A process keeps its part and reads no more of a leaf at a time, which is what makes up such a part.
            parts = sizes["shard"] * sizes["context"]
            assert whole / parts <= sum(kept.values()) <= whole / parts * 1.02
            if not fields.get("text.random_init"):
                assert rows.keys() == kept.keys()
                assert all(rows[path] * leaf[0].numel() <= kept[path] for path, leaf in shapes.items())


def test_captions_of_each_process_are_encoded_ahead(tiny):
    captions = [["a red bird", "one two three", ""], [], ["Fruit!"], []]
    for mine, txt in zip(captions, ranks.run(4, rank_encoders.ahead, tiny, captions), strict=True):
        assert np.array_equal(txt, alone(tiny, {}, mine)[0]) if mine else not txt.size


def test_a_table_of_the_text_encoder_that_cannot_be_is_refused(tiny):
    fields = {"parallel.text_encoder": (("*", {"sahrd": 0}),)}
    with pytest.raises(UserError, match="parallel.text_encoder has the row .* there is no axis 'sahrd'"):
        encoders.build(rank_encoders.config(tiny, fields), rank_encoders.CFG, CPU)
