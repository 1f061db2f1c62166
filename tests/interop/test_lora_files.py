"""LoRA files: what we write, diffusers with PEFT and BFL's own code compute with as we do, and the other way round."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import flux_func as ff
from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import diffusers as layouts
from flux_func.interop import lora_files, lora_layers
from flux_func.models import flux
from flux_func.transforms import lora
from flux_func.transforms.lora import LowRank

CFG = ff.FluxConfig(
    hidden_size=48,
    num_heads=3,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 6, 6),
    vec_in_dim=20,
    context_in_dim=28,
    guidance_embed=True,
)
F64 = torch.float64


def adapter(patterns=("*",), rank=3, alpha=6.0, cfg=CFG, dtype=torch.float32):
    rng = np.random.default_rng(0)
    fresh = lora.init(ff.abstract(cfg, dtype), patterns, rank, alpha)
    return tree.map(lambda leaf: torch.from_numpy(0.3 * rng.standard_normal(leaf.shape)).to(dtype), fresh)


def params(dtype=F64):
    return ff.init(CFG, dtype=dtype, scheme="nonzero")


def inputs(dtype=F64):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    return dict(
        img=normal(2, 4, 64),
        img_ids=flux.image_ids(4, 4),
        txt=normal(2, 3, CFG.context_in_dim),
        txt_ids=flux.text_ids(3),
        timesteps=torch.tensor([0.2, 0.7], dtype=dtype),
        y=normal(2, CFG.vec_in_dim),
        guidance=torch.tensor([3.5, 1.0], dtype=dtype),
    )


def ours(tree_of_lora):
    double = tree.map(torch.Tensor.double, tree_of_lora)
    return lora.apply(ff.apply)(params(), double, CFG, **inputs())


def deltas(updates):
    """{path: what is added to the weight, float64}."""
    return {path: tree.map(torch.Tensor.double, each).weight() for path, each in lora.updates(updates).items()}


def assert_same_change(one, other, bound=1e-12):
    one, other = deltas(one), deltas(other)
    assert one.keys() == other.keys()
    for path, expected in other.items():
        assert (one[path] - expected).norm() <= bound * expected.norm(), path


def apart(seed=0):
    """A FLUX in diffusers' own class, with our weights, in float64."""
    diffusers = pytest.importorskip("diffusers")
    layout, flat = layouts.transformer(CFG), tree.flatten(params())
    with torch.random.fork_rng(devices=[]):
        model = diffusers.FluxTransformer2DModel(
            **{k: v for k, v in layouts.transformer_json(CFG).items() if k != "_class_name"}
        )
    named = {name: layout.tensor(name, lambda path, a, b: flat[path][a:b]) for name in layout.theirs}
    model.double().load_state_dict(named)
    return model


def theirs(model):
    given = inputs()
    with torch.no_grad():
        return model(
            hidden_states=given["img"],
            img_ids=given["img_ids"][0],
            encoder_hidden_states=given["txt"],
            txt_ids=given["txt_ids"][0],
            timestep=given["timesteps"],
            pooled_projections=given["y"],
            guidance=given["guidance"],
            return_dict=False,
        )[0]


def pipeline(model):
    pytest.importorskip("peft")
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    empty = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **empty)


# With PEFT, through diffusers.


@pytest.mark.parametrize("patterns", [("*",), ("*_attn.*", "single_blocks.*.linear1"), ("final_layer*",)])
def test_diffusers_loads_what_we_write(tmp_path, patterns):
    made, model = adapter(patterns), apart()
    before = theirs(model)
    torch.testing.assert_close(before, ff.apply(params(), CFG, **inputs()), rtol=0, atol=1e-4)
    lora_files.save(tmp_path / "made.safetensors", made, "diffusers")
    pipeline(model).load_lora_weights(tmp_path / "made.safetensors")
    after, expected = theirs(model), ours(made)
    # diffusers takes the sinusoids of time in float32.
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert (after - before).abs().max() > 1e-2


def test_diffusers_loads_kohyas_form_of_ours(tmp_path):
    made, model = adapter(("double_blocks.*",), rank=4, alpha=2.0), apart()
    lora_files.save(tmp_path / "made.safetensors", made, "kohya")
    pipeline(model).load_lora_weights(tmp_path / "made.safetensors")
    expected = ours(made)
    torch.testing.assert_close(theirs(model), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# diffusers' conversion has FLUX.1's width written into it.
WIDE = dataclasses.replace(flux.flavor("flux-dev"), depth=1, depth_single_blocks=1)


@pytest.mark.parametrize("form", ["kohya", "bfl"])
def test_the_full_width_against_diffusers_own_conversion(form):
    from diffusers.loaders import lora_conversion_utils as theirs

    patterns = ("*",) if form == "bfl" else ("double_blocks.*", "single_blocks.*")
    made = adapter(patterns, rank=2, alpha=3.0, cfg=WIDE)
    named, ours = lora_files.tensors(made, form), lora_files.tensors(made, "diffusers")
    if form == "kohya":
        converted = theirs._convert_kohya_flux_lora_to_diffusers(named)
    else:
        norms = [name for name in tree.flatten(flux.declare(WIDE)) if name.endswith(".scale")]
        with pytest.MonkeyPatch.context() as patch:
            # It wants all of FLUX.1's blocks; this FLUX has one of each kind.
            patch.setattr(theirs, "range", lambda count: range(1), raising=False)
            converted = theirs._convert_bfl_flux_control_lora_to_diffusers({**named, **dict.fromkeys(norms)})
        # Its halves of the last modulation are swapped in A too, whose rows are no halves.
        swapped = converted["transformer.norm_out.linear.lora_A.weight"]
        converted["transformer.norm_out.linear.lora_A.weight"] = swapped.flip(0)
    assert ours.keys() == {name for name in converted if name.endswith(("lora_A.weight", "lora_B.weight"))}
    for name in [name for name in ours if ".lora_A." in name]:
        other = name.replace(".lora_A.", ".lora_B.")
        # Random inputs tell two updates apart as their products, of ten million numbers, would.
        x = torch.randn(ours[name].shape[1], 4, dtype=F64, generator=torch.Generator().manual_seed(0))
        found, expected = (each[other].double() @ (each[name].double() @ x) for each in (ours, converted))
        error = float((found - expected).norm() / expected.norm())
        assert error <= 1e-6, name


@pytest.mark.parametrize(("says_alpha", "biased"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(
    "targets",
    [
        ["to_q", "to_k", "to_v", "to_out.0"],  # the MLP of single blocks, a part of our linear1, is left as it is
        ["to_q", "add_v_proj", "proj_mlp", "ff.net.2", "norm1.linear", "x_embedder", "norm_out.linear"],
    ],
)
def test_we_load_what_diffusers_and_peft_save(tmp_path, says_alpha, biased, targets):
    peft, model = pytest.importorskip("peft"), apart()
    pipe = pipeline(model)
    torch.manual_seed(0)
    # Without a word of alpha, it is the rank: so diffusers reads such a file.
    alpha = 10 if says_alpha else 4
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights=False, lora_bias=biased)
    model.add_adapter(config)
    metadata = {"transformer_lora_adapter_metadata": config.to_dict()} if says_alpha else {}
    pipe.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(model), **metadata)
    found = lora_files.load(tmp_path, CFG)
    expected = theirs(model)
    torch.testing.assert_close(ours(found), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert (expected - ff.apply(params(), CFG, **inputs())).abs().max() > 1e-2


def test_we_load_pefts_own_folder(tmp_path):
    peft, model = pytest.importorskip("peft"), apart()
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=["to_q", "ff.net.2"],
        rank_pattern={"to_q": 2},
        alpha_pattern={"transformer_blocks.0.attn.to_q": 3},
        use_rslora=True,
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path)
    found = lora_files.load(tmp_path, CFG)
    expected = theirs(wrapped)
    torch.testing.assert_close(ours(found), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# With Black Forest Labs' own code.


def test_bfl_loads_what_we_write(tmp_path):
    model = pytest.importorskip("fluxbfl.model")
    from fluxbfl.modules.lora import replace_linear_with_lora

    fields = {k: v for k, v in dataclasses.asdict(CFG).items() if k != "qk_norm_eps"}
    theirs = model.Flux(model.FluxParams(**{**fields, "axes_dim": list(CFG.axes_dim)})).double()
    theirs.load_state_dict(tree.flatten(params()))
    replace_linear_with_lora(theirs, max_rank=3)
    made = adapter(alpha=4.5)
    lora_files.save(tmp_path / "made.safetensors", made, "bfl")
    missing, unexpected = theirs.load_state_dict(load_file(tmp_path / "made.safetensors"), strict=False)
    assert not unexpected and not [name for name in missing if "lora" in name]
    with torch.no_grad():
        out = theirs(**{k: v.expand(2, *v.shape[1:]) if "ids" in k else v for k, v in inputs().items()})
    expected = ours(made)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# Among the forms.


@pytest.mark.parametrize("format", lora_files.FORMATS)
@pytest.mark.parametrize("alpha", [6.0, 3.0, 0.7])
def test_there_and_back(tmp_path, format, alpha):
    made = adapter(alpha=alpha)
    lora_files.save(tmp_path / "made.safetensors", made, format)
    found = lora_files.load(tmp_path / "made.safetensors", CFG)
    assert optree_paths(found) == optree_paths(made)
    # A scale that is a power of two is taken into B without rounding, and kohya's form says alpha itself.
    exact = alpha != 0.7 or format == "kohya"
    assert_same_change(found, made, 1e-15 if exact and alpha != 0.7 else 1e-7)
    for update, other in zip(lora.updates(found).values(), lora.updates(made).values(), strict=True):
        assert torch.equal(update.A, other.A)
        assert format != "kohya" or torch.equal(update.B, other.B)


@pytest.mark.parametrize("format", ["bfl", "diffusers"])
def test_biases_there_and_back(tmp_path, format):
    rng = np.random.default_rng(3)
    made = {
        path: dataclasses.replace(update, bias=torch.from_numpy(rng.standard_normal(len(update.B))).float())
        for path, update in lora.updates(adapter(alpha=6.0)).items()
    }
    lora_files.save(tmp_path / "made.safetensors", made, format)
    found = lora_files.read(tmp_path / "made.safetensors")
    assert found.keys() == made.keys()
    for path, update in made.items():
        assert torch.equal(found[path].scale * found[path].bias, update.scale * update.bias)
    with pytest.raises(UserError, match="format is 'kohya': has no place for the bias"):
        lora_files.save(tmp_path / "other.safetensors", made, "kohya")
    assert not (tmp_path / "other.safetensors").exists()


def optree_paths(adapter):
    return list(tree.flatten(adapter))


@pytest.mark.parametrize(
    ("format", "some"),
    [
        ("bfl", "single_blocks.1.linear1.lora_B.weight"),
        ("diffusers", "transformer.single_transformer_blocks.1.proj_mlp.lora_B.weight"),
        ("kohya", "lora_unet_single_blocks_1_linear1.lora_up.weight"),
    ],
)
def test_names(tmp_path, format, some):
    named = lora_files.tensors(adapter(), format)
    assert some in named
    linears = len(lora.linears(ff.abstract(CFG)))
    apart = 4 * 2 + 2 * 3  # more of them: q, k and v of four attentions; and proj_mlp beside them of two blocks
    assert len(named) == {"bfl": 3 * linears, "kohya": 3 * linears, "diffusers": 2 * (linears + apart)}[format]


def test_rows_are_those_of_the_weights_layout():
    spans = layouts.transformer(CFG).spans
    for path, weight in lora.linears(ff.abstract(CFG)).items():
        mine = [(span.name, span.rows) for span in spans if span.path == f"{path}.weight"]
        if path.startswith("final_layer.adaLN"):
            assert [span.name_start for span in spans if span.path == f"{path}.weight"] == [48, 0]
            continue
        assert mine == [
            (f"{name}.weight", rows)
            for name, rows in zip(lora_layers.names(path), lora_layers.rows(path, *weight.shape[::-1]), strict=True)
        ]


QKV = ["attn.to_q", "attn.to_k", "attn.to_v"]
LINEAR1 = [*QKV, "proj_mlp"]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(
        [("transformer_blocks", "double_blocks", "img_attn.qkv", QKV)] * 1
        + [("single_transformer_blocks", "single_blocks", "linear1", LINEAR1)]
    ),
    st.data(),
)
def test_parts_are_joined_and_taken_apart(tmp_path_factory, where, data):
    theirs, block, layer, names = where
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    present = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    one_rank, shared = data.draw(st.booleans()), data.draw(st.booleans())
    fan_in, rank, with_alpha = 8, data.draw(st.integers(1, 3)), data.draw(st.booleans())
    first, named, expected = rng.standard_normal((rank, fan_in)), {}, []
    for name in names:
        out = 32 if name == "proj_mlp" else fan_in
        if name not in present:
            expected.append(np.zeros((out, fan_in)))
            continue
        r = rank if one_rank or shared else data.draw(st.integers(1, 4))
        a, b = first.copy() if shared else rng.standard_normal((r, fan_in)), rng.standard_normal((out, r))
        prefix = f"transformer.{theirs}.3.{name}"
        named |= {f"{prefix}.lora_A.weight": torch.from_numpy(a), f"{prefix}.lora_B.weight": torch.from_numpy(b)}
        scale = 1.0
        if with_alpha:
            scale = data.draw(st.sampled_from([0.5, 1.0, 3.0]))
            named[f"{prefix}.alpha"] = torch.tensor(scale * r)
        expected.append(scale * b @ a)
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(named, file)
    found = lora_files.read(file)
    assert list(found) == [f"{block}.3.{layer}"]
    np.testing.assert_allclose(found[f"{block}.3.{layer}"].weight().numpy(), np.concatenate(expected), atol=1e-12)
    again = lora_files.tensors(found, "diffusers")
    back = {
        name: again[f"transformer.{theirs}.3.{name}.lora_B.weight"]
        @ again[f"transformer.{theirs}.3.{name}.lora_A.weight"]
        for name in names
    }
    for part, name in zip(expected, names, strict=True):
        np.testing.assert_allclose(back[name].numpy(), part, atol=1e-12)
    if set(present) == set(names) and (one_rank or shared) and not with_alpha:
        assert again.keys() == named.keys() and all(torch.equal(again[name], named[name]) for name in named)


def variants(made):
    """One LoRA as other programs name it."""
    bfl = {name: t for name, t in lora_files.tensors(made, "bfl").items() if "bias" not in name}
    kohya, peft = lora_files.tensors(made, "kohya"), lora_files.tensors(made, "diffusers")
    return {
        "ComfyUI": {f"diffusion_model.{name}": t for name, t in bfl.items()},
        "PEFT": {f"base_model.model.{name}": t for name, t in peft.items()},
        "no prefix": {name.removeprefix("transformer."): t for name, t in peft.items()},
        "older diffusers": {name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t
                            for name, t in peft.items()},
        "kohya's names of diffusers' parts": {
            "lora_transformer_" + name.removeprefix("transformer.").replace(".", "_")
            .replace("_lora_A_weight", ".lora_down.weight").replace("_lora_B_weight", ".lora_up.weight"): t
            for name, t in peft.items()
        },
        "with text encoders": {**kohya, "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1),
                               "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())},
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(variants(adapter(("double_blocks.0.*",)))))
def test_other_programs_names(tmp_path, kind):
    made = adapter()
    save_file({name: t.clone() for name, t in variants(made)[kind].items()}, tmp_path / "lora.safetensors")
    assert lora_files.is_lora(tmp_path / "lora.safetensors")
    assert_same_change(lora_files.load(tmp_path / "lora.safetensors", CFG), made, 1e-7)


def test_kohya_without_alpha(tmp_path):
    named = {name: t for name, t in lora_files.tensors(adapter(), "kohya").items() if not name.endswith(".alpha")}
    save_file(named, tmp_path / "lora.safetensors")
    assert {update.scale for update in lora_files.read(tmp_path / "lora.safetensors").values()} == {1.0}


def test_types(tmp_path):
    made = adapter()
    lora_files.save(tmp_path / "half.safetensors", made, "kohya", torch.bfloat16)
    found = lora_files.load(tmp_path / "half.safetensors", CFG)
    assert {leaf.dtype for leaf in tree.leaves(found)} == {torch.bfloat16}
    wide = lora_files.load(tmp_path / "half.safetensors", CFG, torch.float32)
    assert {leaf.dtype for leaf in tree.leaves(wide)} == {torch.float32}
    assert_same_change(wide, made, 5e-3)


# What is refused, each in one sentence that says what it is.

LAYER = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({f"{LAYER}.dora_scale": (5,)}, "is a DoRA"),
        ({f"{LAYER}.lokr_w1": (2, 2)}, "is a LoKr"),
        ({f"{LAYER}.hada_w1_a": (2, 2)}, "is a LoHa"),
        ({"double_blocks.0.processor.qkv_lora1.down.weight": (2, 2)}, "XLabs"),
        ({"double_blocks.0.img_attn.norm.query_norm.scale": (16,)}, "Canny's and Depth's.*convert_main --from=BASE"),
        ({f"{LAYER}.lora_B.bias": (40,)}, r"has a bias \[40\] .* should be \[48\]"),
        ({f"{LAYER}.bias": (48,)}, "is no part of a LoRA"),
        ({"lora_unet_img_in.diff_b": (48,)}, "changes whole weights"),
        ({"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": (3, 48)}, "has no B for"),
        ({"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": (2, 48),
          "transformer.transformer_blocks.0.attn.to_k.lora_B.weight": (48, 3)}, r"\[rank, in\] and \[out, rank\]"),
        ({"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": (2, 48),
          "transformer.transformer_blocks.0.attn.to_k.lora_B.weight": (40, 2)}, r"\[rank, 48\] and \[48, rank\]"),
        ({"unet.down_blocks.0.attn.to_k.lora_A.weight": (2, 48),
          "unet.down_blocks.0.attn.to_k.lora_B.weight": (48, 2)}, "which is no linear of FLUX.1"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (2, 48),
          "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": (144, 2)}, "img_attn.qkv twice"),
        ({"img_in.weight": (48, 64)}, "is no part of a LoRA"),
    ],
)  # fmt: skip
def test_what_is_not_read(tmp_path, more, says):
    shapes = {f"{LAYER}.lora_A.weight": (3, 48), f"{LAYER}.lora_B.weight": (48, 3), **more}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=says) as raised:
        lora_files.load(tmp_path / "lora.safetensors", CFG)
    assert str(raised.value).startswith(f"{tmp_path / 'lora.safetensors'}: ") and "\n" not in str(raised.value)


def test_no_lora(tmp_path):
    ff.save(tmp_path / "model.safetensors", params(torch.float32), CFG)
    assert not lora_files.is_lora(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is no LoRA"):
        lora_files.read(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no such file"):
        lora_files.read(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="holds 0 safetensors files"):
        (tmp_path / "empty").mkdir()
        lora_files.read(tmp_path / "empty")
    (tmp_path / "lora.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="is a pickle"):
        lora_files.read(tmp_path / "lora.pt")


def test_of_another_model(tmp_path):
    file = tmp_path / "lora.safetensors"
    lora_files.save(file, adapter(("double_blocks.0.img_attn.qkv",)), "kohya")
    with pytest.raises(
        UserError, match=r"A \[3, 48\] and B \[144, 3\] for double_blocks\.0\.img_attn\.qkv.* \[384, 128\]"
    ):
        lora_files.load(file, ff.flavor("flux-tiny"))
    lora_files.save(tmp_path / "other.safetensors", adapter(("guidance_in.*",)), "kohya")
    with pytest.raises(UserError, match=r"guidance_in\.in_layer, a linear \[48, 256\] that the base has not"):
        lora_files.load(tmp_path / "other.safetensors", dataclasses.replace(CFG, guidance_embed=False))


def test_what_is_not_written(tmp_path):
    made, file = adapter(), tmp_path / "lora.safetensors"
    with pytest.raises(UserError, match="format is 'peft': a LoRA's should be one of bfl, diffusers, kohya"):
        lora_files.save(file, made, "peft")
    with pytest.raises(UserError, match="should end in .safetensors"):
        lora_files.save(tmp_path / "lora", made, "bfl")
    with pytest.raises(UserError, match="adapts nothing"):
        lora_files.save(file, {}, "bfl")
    lora_files.save(file, made, "bfl")
    with pytest.raises(UserError, match="is there already"):
        lora_files.save(file, made, "bfl")
    lora_files.save(file, made, "kohya", overwrite=True)


def test_damaged_metadata(tmp_path):
    named = lora_files.tensors(adapter(), "diffusers")
    file = tmp_path / "lora.safetensors"
    save_file(named, file, {"lora_adapter_metadata": "{"})
    with pytest.raises(UserError, match="what it says of alpha cannot be read"):
        lora_files.read(file)
    save_file(named, file, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.r": 3})})
    assert {update.scale for update in lora_files.read(file).values()} == {2.0}


def test_updates_may_be_flat(tmp_path):
    made = LowRank(torch.ones(1, 48), torch.ones(144, 1), 1.0)
    assert lora_files.tensors({"double_blocks.0.img_attn.qkv": made}, "bfl").keys() == {
        f"double_blocks.0.img_attn.qkv.lora_{end}" for end in ("A.weight", "B.weight", "B.bias")
    }
