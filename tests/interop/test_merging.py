"""Weights with LoRAs added as they are read: what `lora.merge` makes of the trees, and diffusers of the files."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import flux_func as ff
from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import diffusers as layouts
from flux_func.interop import lora_files, merging, recognize
from flux_func.interop.merging import Adapter
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
CONTROL = dataclasses.replace(CFG, in_channels=128)


def adapter(patterns, rank=3, seed=0, cfg=CFG, biased=False):
    rng = np.random.default_rng(seed)

    def drawn(*shape):
        return torch.from_numpy(0.3 * rng.standard_normal(shape)).float()

    def trained(update):
        bias = drawn(len(update.B)) if biased else None
        return LowRank(drawn(*update.A.shape), drawn(*update.B.shape), update.alpha, bias)

    return {
        path: trained(each) for path, each in lora.updates(lora.init(ff.abstract(cfg), patterns, rank, 6.0)).items()
    }


def base(tmp_path, dtype=torch.float32, cfg=CFG, format="bfl"):
    params = ff.init(cfg, dtype=dtype, scheme="nonzero")
    path = tmp_path / ("base.safetensors" if format == "bfl" else "base")
    ff.save(path, params, cfg, format=format)
    return params, recognize.find(path)


ADAPTERS = [
    Adapter("all", adapter(("*",)), 0.5),
    Adapter("some", adapter(("*.1.*", "img_in"), 2, 1, biased=True), -1.5),
]


def by_trees(params, dtype=None):
    given = tree.map(lambda leaf: leaf.to(dtype or leaf.dtype), params)
    return lora.merge(given, [(lora.place(each.updates, params), each.weight) for each in ADAPTERS])


@pytest.mark.parametrize("format", ["bfl", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", [1 << 22, 100])
def test_merged_is_what_merge_makes_of_the_trees(tmp_path, monkeypatch, format, dtype, numbers):
    monkeypatch.setattr(merging, "_NUMBERS", numbers)
    params, stored = base(tmp_path, dtype, format=format)
    found, expected = tree.flatten(merging.merged(stored, ADAPTERS).params()), tree.flatten(by_trees(params))
    assert list(found) == list(expected)
    for path, leaf in expected.items():
        assert found[path].dtype == dtype
        torch.testing.assert_close(found[path], leaf, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)
        assert numbers < 1000 or torch.equal(found[path], leaf)
    assert not torch.equal(expected["img_in.bias"], params["img_in"]["bias"])


def test_a_wider_type_is_not_rounded_on_the_way(tmp_path):
    params, stored = base(tmp_path, torch.bfloat16)
    found, expected = (
        tree.flatten(merging.merged(stored, ADAPTERS, torch.float32).params()),
        by_trees(params, torch.float32),
    )
    for path, leaf in tree.flatten(expected).items():
        assert torch.equal(found[path].float(), leaf), path
    assert found["single_blocks.0.norm.query_norm.scale"].dtype == torch.bfloat16  # left to whoever writes it


def test_any_rows_of_any_leaf(tmp_path):
    params, stored = base(tmp_path)
    both, whole = merging.merged(stored, ADAPTERS), tree.flatten(by_trees(params))
    for path, first, last in (("single_blocks.1.linear1.weight", 40, 200), ("img_in.bias", 3, 4)):
        torch.testing.assert_close(both.rows(path, first, last), whole[path][first:last], rtol=1e-6, atol=1e-6)


# Of the kind of FLUX.1 Canny and Depth: twice the input channels, biases, and norms in the place of the base's.

SCALES = {path: 1 + 0.1 * torch.arange(16.0) for path in tree.flatten(ff.abstract(CFG)) if path.endswith(".scale")}


def control_file(tmp_path, format):
    named = lora_files.tensors(adapter(("*",), cfg=CONTROL, biased=True), format)
    for path, scale in SCALES.items():
        (theirs,) = layouts.names(path)
        named[path if format == "bfl" else f"transformer.{theirs}"] = scale
    save_file({name: tensor.clone() for name, tensor in named.items()}, tmp_path / f"{format}.safetensors")
    return tmp_path / f"{format}.safetensors"


def test_a_control_lora_is_merged_as_diffusers_adds_it(tmp_path):
    theirs = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    params, stored = base(tmp_path)
    updates, scales = lora_files.read_all(control_file(tmp_path, "diffusers"))
    merged = merging.merged(stored, [Adapter("control", updates, 1.0, scales)])
    assert merged.cfg == CONTROL and scales.keys() == SCALES.keys()
    said = {name: value for name, value in layouts.transformer_json(CFG).items() if name != "_class_name"}
    with torch.random.fork_rng(devices=[]):
        model = theirs.FluxTransformer2DModel(**said)
    layout, flat = layouts.transformer(CFG), tree.flatten(params)
    model.load_state_dict({name: layout.tensor(name, lambda path, a, b: flat[path][a:b]) for name in layout.theirs})
    empty = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = theirs.FluxControlPipeline(scheduler=theirs.FlowMatchEulerDiscreteScheduler(), transformer=model, **empty)
    pipe.load_lora_weights(tmp_path / "diffusers.safetensors")
    rng = np.random.default_rng(1)
    img, txt, y = (
        torch.from_numpy(rng.standard_normal(shape)).float()
        for shape in ((2, 4, 128), (2, 3, CFG.context_in_dim), (2, CFG.vec_in_dim))
    )
    ids, t, guidance = (flux.image_ids(4, 4), flux.text_ids(3)), torch.tensor([0.2, 0.7]), torch.tensor([3.5, 1.0])
    with torch.no_grad():
        expected = model(
            hidden_states=img,
            img_ids=ids[0][0],
            encoder_hidden_states=txt,
            txt_ids=ids[1][0],
            timestep=t,
            pooled_projections=y,
            guidance=guidance,
            return_dict=False,
        )[0]
    found = ff.apply(
        merged.params(), CONTROL, img=img, img_ids=ids[0], txt=txt, txt_ids=ids[1], timesteps=t, y=y, guidance=guidance
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_black_forest_labs_names_say_the_same(tmp_path):
    one, other = (lora_files.read_all(control_file(tmp_path, format)) for format in ("bfl", "diffusers"))
    assert one[1].keys() == other[1].keys() == SCALES.keys()
    assert all(torch.equal(one[1][path], SCALES[path]) and torch.equal(other[1][path], SCALES[path]) for path in SCALES)
    assert one[0].keys() == other[0].keys()
    for path, update in one[0].items():
        torch.testing.assert_close(update.weight(), other[0][path].weight(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(update.bias, other[0][path].bias, rtol=1e-5, atol=1e-5)


def test_new_columns_begin_at_zero_and_others_keep_to_theirs(tmp_path):
    params, stored = base(tmp_path)
    wide, narrow = adapter(("img_in",), cfg=CONTROL), adapter(("img_in",), seed=1)
    merged = merging.merged(stored, [Adapter("wide", wide), Adapter("narrow", narrow)])
    first = merged.leaf("img_in.weight")
    torch.testing.assert_close(first[:, 64:], wide["img_in"].weight()[:, 64:])
    expected = params["img_in"]["weight"] + wide["img_in"].weight()[:, :64] + narrow["img_in"].weight()
    torch.testing.assert_close(first[:, :64], expected)


NORM = "double_blocks.0.img_attn.norm.query_norm.scale"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([Adapter("x", adapter(("*",), cfg=dataclasses.replace(CFG, hidden_size=64, num_heads=4)))],
         r"^x: the LoRA has A \[3, 64\] and B .* whose weight is \[\d+, \d+\] in the base"),
        ([Adapter("x", adapter(("single_blocks.3.linear1",), cfg=dataclasses.replace(CFG, depth_single_blocks=4)))],
         "^x: the LoRA adapts single_blocks.3.linear1, a linear .* that the base has not"),
        ([Adapter("x", adapter(("img_in",), cfg=dataclasses.replace(CFG, in_channels=384)))], r"A \[3, 384\]"),
        ([Adapter("x", {"img_in": LowRank(torch.ones(1, 64), torch.ones(48, 1), 1.0, torch.ones(40))})],
         r"^x: the LoRA has a bias \[40\] for img_in, and the base has \[48\]"),
        ([Adapter("x", {}, 1.0, {NORM: torch.ones(8)})], r"^x: replaces .*, \[8\], and the base has \[16\]"),
        ([Adapter("x", {}, 1.0, {NORM: torch.ones(16)}), Adapter("y", {}, 1.0, {NORM: torch.ones(16)})],
         "^y: replaces .*, as x does; give one of them"),
    ],
)  # fmt: skip
def test_what_does_not_fit(tmp_path, given, says):
    _, stored = base(tmp_path)
    with pytest.raises(UserError, match=says):
        merging.merged(stored, given)
