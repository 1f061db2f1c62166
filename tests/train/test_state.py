"""The train state: what it holds, in which types, what it starts from, and that its outline needs no memory."""

import dataclasses
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_func import tree
from flux_func.errors import UserError
from flux_func.models import flux
from flux_func.train import optimizer, state
from tests.helpers import tiny_pipeline, tiny_run
from tests.helpers.tiny_run import CPU

RUNS = [
    {},
    {"ema.decay": 0.9},
    {"model.guidance_embed": True, "numerics.param": "bfloat16", "ema.decay": 0.9},
    {"optimizer.name": "SGD", "optimizer.options": "momentum=0.9"},
]


@pytest.mark.parametrize("fields", RUNS, ids=lambda fields: next(iter(fields), "default"))
def test_the_outline_is_the_state_without_memory(fields):
    config = tiny_run.config(fields)
    chosen = optimizer.from_config(config)
    cfg = state.model_config(config)
    made, outline = state.create(config, cfg, chosen, CPU), state.abstract(config, cfg, chosen)
    forms = [{path: (leaf.shape, leaf.dtype) for path, leaf in tree.flatten(each).items()} for each in (made, outline)]
    assert forms[0] == forms[1]
    assert all(leaf.is_meta for leaf in tree.leaves(outline) if leaf.ndim)
    assert state.size_in_bytes(made) == state.size_in_bytes(outline)
    assert state.size_in_bytes(made) == sum(leaf.untyped_storage().nbytes() for leaf in tree.leaves(made))


def test_weights_are_the_configs():
    config = tiny_run.config({"train.seed": 5, "model.guidance_embed": True, "numerics.param": "bfloat16"})
    cfg = state.model_config(config)
    made = state.create(config, cfg, optimizer.from_config(config), CPU)
    expected = flux.init(cfg, seed=5, dtype=torch.bfloat16, scheme="nonzero")
    assert cfg.guidance_embed and "guidance_in" in made["params"] and made.keys() == {"params", "opt"}
    assert all(map(torch.equal, tree.leaves(made["params"]), tree.leaves(expected)))


def test_a_flavors_own_guidance_stands_unless_it_is_overruled():
    assert state.model_config(tiny_run.config({"model.flavor": "flux-dev"})).guidance_embed
    assert not state.model_config(
        tiny_run.config({"model.flavor": "flux-dev", "model.guidance_embed": False})
    ).guidance_embed
    assert not state.model_config(tiny_run.config()).guidance_embed


def test_the_average_starts_at_the_weights_in_float32_and_memory_of_its_own():
    for param in ("float32", "bfloat16"):
        config = tiny_run.config({"ema.decay": 0.9, "numerics.param": param})
        made = state.create(config, state.model_config(config), optimizer.from_config(config), CPU)
        assert state.averaged(made) is made["ema"]
        for mean, leaf in zip(tree.leaves(made["ema"]), tree.leaves(made["params"]), strict=True):
            assert mean.dtype == torch.float32 and torch.equal(mean, leaf.float())
            assert mean.data_ptr() != leaf.data_ptr()
    config = tiny_run.config()
    made = state.create(config, state.model_config(config), optimizer.from_config(config), CPU)
    assert state.averaged(made) is made["params"]


# Starting from weights


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One model as a pipeline, with and without a guidance embedding, and flux-tiny as BFL's and torchtitan's files."""
    root = tmp_path_factory.mktemp("weights")
    tiny_pipeline.whole(root / "guided")
    tiny_pipeline.whole(root / "plain", guidance=False)
    tiny_pipeline.whole(root / "fill", transformer={"in_channels": 384, "out_channels": 64})
    flat = tree.flatten(flux.init(flux.flavor("flux-tiny"), seed=8, scheme="nonzero"))
    save_file(flat, root / "bfl.safetensors")
    save_file({path.replace("norm.scale", "norm.weight"): leaf for path, leaf in flat.items()}, root / "tt.safetensors")
    return root


def start(fields):
    config = tiny_run.config({"model.init": "pretrain", **fields})
    weights = state.find_weights(config.model.weights, "transformer", "model.weights")
    cfg = state.model_config(config, weights)
    return cfg, state.create(config, cfg, optimizer.from_config(config), CPU, weights)


@pytest.mark.parametrize("param", ["float32", "bfloat16"])
def test_a_run_starts_from_the_weights_of_a_pipeline_and_so_does_its_average(files, param):
    fields = {"model.flavor": "", "model.weights": str(files / "guided"), "numerics.param": param, "ema.decay": 0.9}
    cfg, made = start(fields)
    assert (cfg.hidden_size, cfg.num_heads, cfg.guidance_embed, cfg.context_in_dim) == (48, 3, True, 32)
    theirs = load_file(files / "guided" / "transformer" / "diffusion_pytorch_model.safetensors")
    dtype = state.DTYPES[param]
    qkv = torch.cat([theirs[f"transformer_blocks.1.attn.to_{name}.weight"] for name in "qkv"])
    scale, shift = theirs["norm_out.linear.bias"].chunk(2)
    for member, kind in (("params", dtype), ("ema", torch.float32)):
        tree_of = made[member]
        assert {leaf.dtype for leaf in tree.leaves(tree_of)} == {kind}
        assert torch.equal(tree_of["double_blocks"][1]["img_attn"]["qkv"]["weight"], qkv.to(dtype).to(kind))
        last = tree_of["final_layer"]["adaLN_modulation"]["1"]["bias"]
        assert torch.equal(last, torch.cat([shift, scale]).to(dtype).to(kind))
        guidance = tree_of["guidance_in"]["in_layer"]["weight"]
        name = "time_text_embed.guidance_embedder.linear_1.weight"
        assert torch.equal(guidance, theirs[name].to(dtype).to(kind))
    count = sum(leaf.numel() for leaf in tree.leaves(made["params"]))
    assert count == sum(leaf.numel() for leaf in theirs.values())


@pytest.mark.parametrize("flavor", ["flux-tiny", ""])
def test_the_flavor_may_be_named_or_left_to_the_weights(files, flavor):
    cfg, made = start({"model.flavor": flavor, "model.weights": str(files / "bfl.safetensors")})
    assert cfg == flux.flavor("flux-tiny")
    expected = flux.init(cfg, seed=8, scheme="nonzero")
    assert all(map(torch.equal, tree.leaves(made["params"]), tree.leaves(expected)))


def test_the_epsilon_is_the_weights_unless_it_is_set(files):
    fields = {"model.weights": str(files / "tt.safetensors")}
    assert start(fields)[0] == dataclasses.replace(flux.flavor("flux-tiny"), qk_norm_eps=1e-5)
    assert start({**fields, "model.qk_norm_eps": 1e-6})[0].qk_norm_eps == 1e-6
    assert start({"model.weights": str(files / "bfl.safetensors"), "model.qk_norm_eps": 1e-5})[0].qk_norm_eps == 1e-5
    assert state.model_config(tiny_run.config({"model.qk_norm_eps": 1e-5})).qk_norm_eps == 1e-5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"model.flavor": "flux-tiny", "model.weights": "{}/guided"},
            "model.flavor is 'flux-tiny': the weights in {}/guided have hidden_size 48 (not 128), num_heads 3 (not 8), "
            "vec_in_dim 24 (not 768), context_in_dim 32 (not 4096); set --config.model.flavor= (empty) to take their",
        ),
        (
            {"model.flavor": "", "model.weights": "{}/guided", "model.guidance_embed": False},
            "model.guidance_embed is False: the weights in {}/guided have a guidance embedding; "
            "set --config.model.guidance_embed=True, or leave it out",
        ),
        (
            {"model.flavor": "", "model.weights": "{}/plain", "model.guidance_embed": True},
            "model.guidance_embed is True: the weights in {}/plain lack a guidance embedding; "
            "set --config.model.guidance_embed=False, or leave it out",
        ),
        (
            {"model.flavor": "", "model.weights": "{}/fill"},
            "model.weights is '{}/fill': the transformer takes 384 channels, not 64: it is told more than text as ",
        ),
        ({"model.weights": "{}/none"}, "model.weights is '{}/none': there is no such file or folder"),
        ({"model.weights": "{}/guided/vae"}, "model.weights is '{}/guided/vae': "),
    ],
)
def test_weights_that_do_not_serve_are_named(files, fields, said):
    with pytest.raises(UserError) as raised:
        start({name: value.format(files) if isinstance(value, str) else value for name, value in fields.items()})
    assert str(raised.value).startswith(said.format(files)) and "\n" not in str(raised.value)


def test_what_is_left_out_is_said(tmp_path, caplog):
    found = tree.flatten(flux.init(flux.flavor("flux-tiny")))
    found = {f"model.diffusion_model.{name}": leaf for name, leaf in found.items()}
    save_file(found | {"vae.decoder.conv_in.bias": torch.zeros(3)}, tmp_path / "all.safetensors")
    with caplog.at_level(logging.WARNING, logger="flux_func"):
        state.find_weights(str(tmp_path / "all.safetensors"), "transformer", "model.weights")
    assert f"{tmp_path}/all.safetensors: left out: vae (1 tensors)" in caplog.text


def test_a_guidance_embedding_that_is_asked_for_and_there_is_no_conflict(files):
    for embed, name in ((True, "guided"), (False, "plain")):
        fields = {"model.flavor": "", "model.weights": str(files / name), "model.guidance_embed": embed}
        assert start(fields)[0].guidance_embed == embed
