"""What cannot be laid out is refused with what could be; what can is said in a table."""

import math
import sys

import pytest
import torch

from flux_func import tree
from flux_func.errors import UserError
from flux_func.models import blocks, flux, layers, products
from flux_func.models.stages import bind
from flux_func.parallel.mesh import AXES, Mesh
from flux_func.train import layout, optimizer, state
from flux_func.transforms import quantized
from tests.helpers import tiny_run
from tests.helpers.tiny_run import CPU

WHOLE = (("*", {}),)


def mesh(*sizes):
    return Mesh(dict(zip(AXES, sizes, strict=True)))


def build(fields, over):
    config = tiny_run.config({"train.batch_size": 12, "data.image_size": 64, "text.max_length": 8, **fields})
    chosen = optimizer.from_config(config)
    return layout.build(config, state.model_config(config), chosen, over, CPU), config, chosen


def refusal(fields, *sizes):
    with pytest.raises(UserError) as error:
        build(fields, mesh(*sizes))
    return str(error.value)


def test_a_batch_that_does_not_divide_names_what_would():
    said = refusal({"train.accumulate": 2}, 2, 4, 1)
    assert said.startswith("train.batch_size is 12: does not divide into 2 micro-batches (train.accumulate) over ")
    assert said.endswith("replicate=2 x shard=4; 16 would, or replicate x shard of 1, 2, 3, 6")
    for count in (1, 2, 3, 6):
        build({"train.accumulate": 2, "parallel.params": WHOLE}, mesh(count, 1, 1))
    build({"train.accumulate": 2, "train.batch_size": 16}, mesh(2, 4, 1))


@pytest.mark.parametrize(
    "fields, sizes, said",
    [
        (
            {"data.image_size": 48},
            (1, 1, 2),
            "parallel.context is 2: does not divide the 9 tokens that data",
        ),
        ({"text.max_length": 7}, (1, 1, 2), "parallel.context is 2: does not divide the 7 tokens that text.max_length"),
        ({"parallel.attention": "ulysses", "parallel.ulysses": 3}, (1, 1, 4), "parallel.ulysses is 3: 3 should divide"),
        (
            {"parallel.attention": "ulysses", "parallel.ulysses": 2},
            (1, 2, 1),
            "no sequence is split, as",
        ),
        ({"parallel.attention": "ring", "parallel.activations": ()}, (1, 1, 2), "parallel.attention is 'ring': no seq"),
    ],
)
def test_a_sequence_that_cannot_be_split_so(fields, sizes, said):
    assert said in refusal(fields, *sizes)


def test_a_compiled_step_finds_again_what_was_compiled():
    config = tiny_run.config({"compile.enabled": True, "compile.backend": "aot_eager"})
    cfg = state.model_config(config)
    ops = layout.ops(config, cfg, layout.build(config, cfg, optimizer.from_config(config), mesh(1, 1, 1), CPU))
    first, second = (bind(flux.chain(cfg)[place], ops) for place in (1, 2))
    assert first.func is second.func is not blocks.double_block


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"remat.keep": ("attention", "*.linear3")}, "'*.linear3' fits no linear: "),
        ({"remat.keep": ("attentoin",)}, "did you mean 'attention'? should be one of 'attention', "),
        ({"remat.keep": ("single_block.linear1",)}, "did you mean 'single_blocks.linear1'?"),
    ],
)
def test_a_result_that_is_none_of_the_models_cannot_be_kept(fields, said):
    assert said in refusal({"remat.policy": "selective", **fields}, 1, 1, 1)


def test_a_kernel_that_the_device_has_not_is_no_silent_other_one():
    said = refusal({"kernels.attention": "flash3"}, 1, 1, 1)
    assert said == (
        "kernels.attention is 'flash3': kernel 'flash3' is none of a cpu's, which are 'flash', 'math'; "
        "choose another, or '' for torch's choice"
    )
    made, config, _ = build({"kernels.attention": "math"}, mesh(1, 1, 1))
    assert layout.ops(config, state.model_config(config), made).attention.keywords == {"kernel": "math"}


@pytest.mark.parametrize("faster", [True, False])
def test_evaluation_multiplies_by_what_is_faster_on_this_processor(monkeypatch, faster):
    monkeypatch.setattr(layout.processor, "prefers_onednn", lambda: faster)
    on_cpu, on_gpu = (layout.evaluation(torch.device(kind), "math") for kind in ("cpu", "cuda"))
    assert on_cpu.linear is (products.linear if faster else layers.linear) and on_gpu.linear is layers.linear
    assert on_cpu.attention.keywords == on_gpu.attention.keywords == {"kernel": "math"}


FLOAT8 = {"numerics.compute": "bfloat16", "numerics.linear": "float8_rowwise"}


@pytest.mark.parametrize(
    "fields, sizes, said",
    [
        ({"numerics.patterns": ("double_block.*",)}, (1, 1, 1), "'double_block.*' fits no linear: "),
        ({"numerics.patterns": ("*",)}, (1, 1, 1), "time_in.in_layer multiplies torch.float32 by torch"),
        ({"numerics.patterns": ("*_mod.lin",)}, (1, 1, 1), "double_blocks.txt_mod.lin has 12 rows of input: "),
        ({"text.max_length": 4, "train.accumulate": 2}, (1, 1, 1), "double_blocks.txt_attn.qkv has 24 rows of input"),
        ({"train.batch_size": 2}, (1, 2, 1), "double_blocks.txt_attn.qkv has 8 rows of input"),
        ({"train.batch_size": 2}, (1, 1, 2), "double_blocks.txt_attn.qkv has 8 rows of input"),
        ({"numerics.linear": "mxfp8", "train.batch_size": 2}, (1, 1, 1), "txt_attn.qkv has 16 rows of input: mxfp8"),
    ],
)
def test_linears_that_cannot_be_quantized_are_named(fields, sizes, said):
    assert said in refusal({**FLOAT8, **fields}, *sizes)


def test_which_linears_are_quantized_is_a_table():
    x, layer = torch.randn(16, 128).bfloat16(), {"weight": torch.randn(16, 128).bfloat16()}

    def differ(path, **fields):
        made, config, _ = build({**FLOAT8, **fields}, mesh(1, 1, 1))
        ops = layout.ops(config, state.model_config(config), made)
        return not torch.equal(ops.linear(layer, x, path), flux.Ops().linear(layer, x, path))

    assert differ("double_blocks.img_mlp.0") and differ("single_blocks.linear2")
    assert not differ("double_blocks.img_mod.lin") and not differ("img_in")
    only = {"numerics.patterns": ("*.linear1",)}
    assert differ("single_blocks.linear1", **only) and not differ("single_blocks.linear2", **only)


def test_float8_without_torchao_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    quantized.linear.cache_clear()
    said = refusal(FLOAT8, 1, 1, 1)
    assert said.startswith("numerics.linear is 'float8_rowwise': needs torchao 0.18 or newer (")
    assert said.endswith("): pip install 'flux-func[quant]'")


def test_moments_in_8_bits_are_split_between_blocks_alone():
    eight = {"optimizer.moments": "8bit"}
    over = mesh(1, 4, 1)
    made, config, chosen = build(eight, over)
    flat = tree.flatten(state.abstract(config, state.model_config(config), chosen))
    places = state.placement(state.abstract(config, state.model_config(config), chosen), made)
    for path, place in places.items():
        # What a process makes of its part of a parameter is its part of what is made of the whole.
        assert place.shape == tuple(flat[path].shape) and place.dtype == flat[path].dtype
        if path.endswith((".codes", ".scale")) and path.startswith("opt.exp_avg."):
            assert place.axes == ("shard",) and place.dim == 0
    columns = {"parallel.params": (("single_blocks.*.weight", {"shard": 1}), ("*", {"shard": 0}))}
    said = refusal({**eight, **columns}, 1, 4, 1)
    assert said == (
        "optimizer.moments is '8bit': single_blocks.0.linear1.weight [896, 128] is dimension 1 over shard=4, 32 "
        "numbers of a row for a process, and 128 share a scale: split it over dimension 0, or choose 'bfloat16'"
    )
    build({"optimizer.moments": "bfloat16", **columns}, over)


def test_one_config_serves_any_size_of_context():
    for context in (1, 2, 4):
        made, config, _ = build({"parallel.attention": "ring"}, mesh(1, 1, context))
        assert bool(made.splits) == (context > 1)
        if context == 1:
            assert layout.ops(config, flux.flavor("flux-tiny"), made) == flux.Ops()


@pytest.mark.parametrize("lr", [{}, {"optimizer.warmup_steps": 5000, "optimizer.lr": 1e-5}])
def test_an_optimizer_that_mixes_a_leafs_numbers_wants_it_whole(lr):
    fields = {"optimizer.name": "Adafactor", **lr}
    said = refusal(fields, 1, 2, 1)
    assert said.startswith("optimizer.name is 'Adafactor': mixes the numbers of a leaf")
    assert "moments" not in said and said.endswith("""--config.parallel.params='(("*", {}),)'""")
    build({**fields, "parallel.params": WHOLE}, mesh(1, 2, 1))
    said = refusal({**fields, "parallel.params": WHOLE, "parallel.moments": (("*", {"shard": 0}),)}, 1, 2, 1)
    assert said.endswith("--config.parallel.moments='()'")


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax"])
def test_an_optimizer_of_single_numbers_may_be_split(name):
    made, _, _ = build({"optimizer.name": name}, mesh(1, 2, 1))
    assert all(place.axes for place in tree.leaves(made.grads))


def test_the_table_says_what_each_process_has():
    over = mesh(2, 4, 1)
    made, config, chosen = build({"train.batch_size": 8, "ema.decay": 0.9}, over)
    whole = state.abstract(config, flux.flavor("flux-tiny"), chosen)
    lines = layout.say(state.placement(whole, made), over).splitlines()
    assert lines[0].split() == ["leaf", "shape", "placement", "MB", "a", "process"]
    txt = next(line for line in lines if line.startswith("txt_in.weight"))
    assert "float32[128, 4096]" in txt and "dimension 0 over shard=4" in txt and txt.endswith(f"{128 * 4096 / 1e6:.3f}")
    share = sum(leaf.nbytes for leaf in tree.leaves(whole["params"])) / 4 / 1e6
    assert lines[-1] == (
        f"replicate=2 x shard=4 x context=1: a process has params {share:,.2f} MB, opt {2 * share:,.2f} MB, "
        f"ema {share:,.2f} MB"
    )
    assert sum(float(line.split()[-1]) for line in lines[1:-1]) == pytest.approx(share, abs=1e-3 * len(lines))


def test_moments_that_are_placed_otherwise_have_rows_of_their_own():
    over = mesh(1, 4, 1)
    made, config, chosen = build({"parallel.params": WHOLE, "parallel.moments": (("*", {"shard": 0}),)}, over)
    whole = state.abstract(config, flux.flavor("flux-tiny"), chosen)
    said = layout.say(state.placement(whole, made), over)
    assert "opt.exp_avg.txt_in.weight" in said and "txt_in.weight" in said
    kept = {path: place for path, place in state.placement(whole, made).items() if path.startswith("opt.exp_avg.")}
    assert all(math.prod(place.local_shape(over)) * 4 == math.prod(place.shape) for place in kept.values())
    assert {place.dtype for place in kept.values()} == {torch.float32}
