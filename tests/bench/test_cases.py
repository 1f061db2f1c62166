import json

import pytest
import torch
from safetensors.torch import load_file

from flux_func import tree
from flux_func.bench import cases
from flux_func.bench.cases import Side
from flux_func.errors import UserError
from flux_func.models import flux
from tests.helpers import tiny_bench


def test_every_combination_is_a_case_those_of_a_model_together():
    asked = cases.product(
        flavor=["flux-tiny"], depth=[(1, 1), (2, 4)], work=["forward"], image_size=[32, 64], tokens=[5], batch=[1, 2]
    )
    assert [case.cfg.depth_single_blocks for case in asked] == [1] * 4 + [4] * 4
    assert [(case.image_size, case.batch) for case in asked[:4]] == [(32, 1), (32, 2), (64, 1), (64, 2)]
    assert str(asked[-1]) == "forward of flux-tiny 2+4: batch 2, 64 pixels, 5 tokens"


def test_sides_are_peers_in_every_type_and_ours_under_every_policy():
    found = cases.sides(["bfl", "ours"], ["float32", "bfloat16"], ["none", "full"])
    names = ["bfl", "ours", "ours, remat full", "bfl bfloat16", "ours bfloat16", "ours bfloat16, remat full"]
    assert [str(side) for side in found] == names


def test_operations():
    small = tiny_bench.case("forward", batch=1).flops(4)
    assert tiny_bench.case("forward", batch=3).flops(4) == 3 * small
    assert tiny_bench.case("sample", batch=1).flops(4) == 4 * small
    assert 2.5 * small < tiny_bench.case("train_step", batch=1).flops(4) < 3 * small
    assert tiny_bench.case("compile").flops(4) == 0
    # What FLUX costs to train at 256 pixels with 256 tokens, by MLPerf's own count: 20.3 TFLOP.
    whole = cases.Case("flux-schnell", (19, 38), "train_step", 256, 256, 1)
    assert whole.flops(4) == pytest.approx(20.3e12, rel=1e-2)


def test_memory():
    gib = 2**30
    # 4 bytes forward, 16 in training, of 258,286,144 parameters.
    for work, count, size in (("forward", 3, 12), ("train_step", 3, 48), ("compile", 3, 16)):
        asked = [tiny_bench.case(work, flavor="flux-debug", depth=(2, 2))]
        cases.check_memory(asked, count, size * 258_286_144)
        with pytest.raises(UserError, match=rf"^--peers: {work} of flux-debug 2\+2: .* all at once hold"):
            cases.check_memory(asked, count, size * 258_286_144 - 1)
    with pytest.raises(UserError, match=f"{16 * 258_286_144 / gib:.1f} GiB, without activations, and 1.0 GiB are free"):
        cases.check_memory(asked, 1, gib)


def test_torchtitan_has_neither_guidance_nor_an_unshifted_sampler():
    guided = tiny_bench.case(flavor="flux-dev")
    cases.check([guided, tiny_bench.case("sample")], ["ours", "bfl", "diffusers"])
    with pytest.raises(UserError, match="--flavor is 'flux-dev': torchtitan has no guidance embedding"):
        cases.check([guided], ["ours", "torchtitan"])
    with pytest.raises(UserError, match="--work is 'sample': torchtitan always shifts"):
        cases.check([tiny_bench.case("sample")], ["torchtitan"])


def test_weights_are_one_draw_in_each_one_s_names(tmp_path):
    cfg = tiny_bench.case().cfg
    paths = cases.write_weights(cfg, cases.PEERS, 1, tmp_path)
    assert paths["ours"] == paths["bfl"] and len({*paths.values()}) == 3
    params = tree.flatten(flux.init(cfg, 1, scheme="nonzero"))
    stored = {peer: load_file(path) for peer, path in paths.items()}
    assert all(torch.equal(stored["bfl"][path], leaf) for path, leaf in params.items())
    assert all(leaf.abs().max() > 0 for leaf in params.values())
    names = ("single_blocks.0.norm.key_norm", "single_transformer_blocks.0.attn.norm_k")
    key = params[f"{names[0]}.scale"]
    assert torch.equal(stored["torchtitan"][f"{names[0]}.weight"], key)
    assert torch.equal(stored["diffusers"][f"{names[1]}.weight"], key)


def test_threads_draw_what_ff_init_draws():
    cfg = tiny_bench.case().cfg
    drawn, expected = cases.draw(cfg, 3, torch.bfloat16), flux.init(cfg, 3, torch.bfloat16, scheme="nonzero")
    pairs = zip(tree.flatten(drawn).items(), tree.flatten(expected).items(), strict=True)
    assert all(path == other and torch.equal(leaf, same) for (path, leaf), (other, same) in pairs)


def test_too_little_room(tmp_path, monkeypatch):
    monkeypatch.setattr(cases.shutil, "disk_usage", lambda path: type("", (), {"free": 2**28}))
    with pytest.raises(UserError, match="has 0.2 GiB free, .* name a folder with more room in .* TMPDIR"):
        cases.write_weights(tiny_bench.case().cfg, ["ours"], 0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_inputs():
    asked = tiny_bench.case(batch=10)
    found, again = cases.inputs(asked, 3), cases.inputs(asked, 3)
    assert all(torch.equal(found[name], again[name]) for name in found)
    shapes = {"latents": (10, 16, 4, 4), "noise": (10, 16, 4, 4), "timesteps": (10,), "txt": (10, 5, 4096)}
    assert {name: tuple(value.shape) for name, value in found.items()} == shapes | {"y": (10, 768)}
    # Not rounded, neither they nor a thousand times them, in the narrowest type that they are told in.
    thousands = 1000 * found["timesteps"]
    assert torch.equal(thousands.bfloat16().float(), thousands) and thousands.max() == 500
    guided = cases.inputs(tiny_bench.case(flavor="flux-dev"), 3)
    assert guided["guidance"].tolist() == [cases.GUIDANCE] * 2


def test_requests_differ_in_what_is_a_side_s_own(tmp_path):
    asked = [Side("ours"), Side("ours", "bfloat16", "full"), Side("diffusers")]
    requests = [json.loads(path.read_text()) for path in tiny_bench.ask(tiny_bench.case(), asked, tmp_path)]
    differ = {name for request in requests for name in request if request[name] != requests[0][name]}
    assert differ == {"model", "weights", "dtype", "remat"}
    assert requests[1]["dtype"] == "bfloat16" and requests[1]["remat"] == "full"
    assert requests[2]["model"]["num_single_layers"] == 1 and requests[0]["model"]["depth_single_blocks"] == 1
    assert requests[0]["optimizer"]["betas"] == [0.9, 0.95] and requests[0]["sampler"]["guidance"] is None


@pytest.mark.parametrize(("work", "given", "compiled"), [("compile", False, True), ("forward", True, True)])
def test_what_measures_compilation_compiles(work, given, compiled, tmp_path):
    [path] = tiny_bench.ask(tiny_bench.case(work), [Side("ours")], tmp_path, compile=given)
    assert json.loads(path.read_text())["compile"] is compiled
