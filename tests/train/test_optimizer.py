import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import config, tree
from flux_func.errors import UserError
from flux_func.train import optimizer

SHAPES = {
    "img_in.weight": (6, 4),
    "img_in.bias": (6,),
    "double_blocks.0.img_mlp.0.weight": (5, 6),
    "double_blocks.1.img_mlp.0.weight": (5, 6),
    "final_layer.scale": (1,),
}


def make(seed=0, shapes=SHAPES, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return tree.unflatten({path: torch.randn(shape, generator=rng).to(dtype) for path, shape in shapes.items()})


def copy(t):
    return tree.map(torch.clone, t)


def equal(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    return a.keys() == b.keys() and all(torch.equal(a[path], b[path]) for path in a)


def shapes_of(t):
    return {path: (leaf.shape, leaf.dtype) for path, leaf in tree.flatten(t).items()}


def run(opt, params, steps, state=None, first=0):
    state = opt.init(params) if state is None else state
    for step in range(first, first + steps):
        params, state = opt.update(make(100 + step, dtype=tree.leaves(params)[0].dtype), state, params)
    return params, state


def run_torch(cls, params, steps, rate=None, **options):
    """The class itself, with a LambdaLR for the schedule."""
    leaves = [leaf.requires_grad_() for leaf in tree.leaves(params)]
    opt = cls(leaves, **options)
    scale = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 if rate is None else rate(step) / options["lr"])
    for step in range(steps):
        for leaf, grad in zip(leaves, tree.leaves(make(100 + step, dtype=leaves[0].dtype)), strict=True):
            leaf.grad = grad
        opt.step()
        scale.step()
    return tree.map(torch.Tensor.detach, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_adamw_is_torchs_bit_for_bit(dtype):
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    params = make(dtype=dtype)
    expected = run_torch(torch.optim.AdamW, copy(params), 20, **settings, fused=True)
    out, state = run(optimizer.adamw(**settings), params, 20)
    assert equal(out, expected) and state["step"] == 20 and state["step"].dtype == torch.float32
    assert all(leaf.dtype == dtype for leaf in tree.leaves(state["exp_avg"]) + tree.leaves(state["exp_avg_sq"]))


def test_adamw_is_the_paper_in_float64():
    params = {"w": torch.tensor([1.0, -3.0], dtype=torch.float64)}
    grads = [torch.tensor([0.5, -2.0], dtype=torch.float64), torch.tensor([-0.1, 4.0], dtype=torch.float64)]
    lr, (b1, b2), eps, decay = 0.1, (0.8, 0.9), 1e-3, 0.05
    x, m, v = params["w"].clone(), 0, 0
    opt = optimizer.adamw(lr, (b1, b2), eps, decay)
    state = opt.init(params)
    for n, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        x = x - lr * decay * x - lr * (m / (1 - b1**n)) / ((v / (1 - b2**n)).sqrt() + eps)
        opt.update({"w": g.clone()}, state, params)
    torch.testing.assert_close(params["w"], x, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear"])
def test_adamw_follows_a_schedule_as_torch_does(kind):
    rate = optimizer.schedule(kind, 1e-2, warmup_steps=5, decay_steps=18, final_lr_fraction=0.1)
    params = make()
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    expected = run_torch(torch.optim.AdamW, copy(params), 20, rate, **settings, fused=True)
    out, _ = run(optimizer.adamw(**{**settings, "lr": rate}), params, 20)
    for path, leaf in tree.flatten(out).items():
        torch.testing.assert_close(leaf, tree.flatten(expected)[path], rtol=1e-6, atol=1e-7)


def test_schedules_see_updates_counted_from_zero():
    seen = []

    def rate(step):
        seen.append(float(step))
        return 0.1

    for opt in (optimizer.adamw(rate), optimizer.from_torch(torch.optim.SGD, rate)):
        run(opt, make(), 3)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_a_schedule_that_hands_back_its_argument_is_read_before_the_count_moves():
    params = make()
    before = copy(params)
    opt = optimizer.adamw(lambda step: step, weight_decay=0.0)
    opt.update(make(1), opt.init(params), params)
    assert equal(params, before)  # lr is 0 at the first update


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.Adafactor, {}),
        (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
        (torch.optim.NAdam, {}),
        (torch.optim.Adagrad, {"initial_accumulator_value": 0.2}),
        (torch.optim.ASGD, {}),
        (torch.optim.Rprop, {}),
        (torch.optim.Adam, {"amsgrad": True}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_classes_step_for_step_and_resume_bit_for_bit(cls, options, dtype):
    rate = optimizer.schedule("linear", 1e-2, warmup_steps=2, decay_steps=12)
    opt, params = optimizer.from_torch(cls, rate, **options), make(dtype=dtype)
    # LambdaLR's product of lr and a factor is not exactly rate(step): set lr as the pair does.
    expected = copy(params)
    leaves = tree.leaves(expected)
    reference = cls(leaves, lr=rate(0), **options)
    for step in range(6):
        reference.param_groups[0]["lr"] = rate(step)
        for leaf, grad in zip(leaves, tree.leaves(make(100 + step, dtype=dtype)), strict=True):
            leaf.grad = grad
        reference.step()
    half, state = run(opt, copy(params), 3)
    # Shapes and types are there from the first, without memory too.
    abstract = opt.init(tree.map(lambda leaf: leaf.to("meta"), params))
    assert shapes_of(state) == shapes_of(opt.init(params)) == shapes_of(abstract)
    assert all(leaf.is_meta for leaf in tree.leaves(abstract.get("state", {})))
    # What a checkpoint does: flattened by dotted path, and back.
    saved = {path: leaf.clone() for path, leaf in tree.flatten({"params": half, "opt": state}).items()}
    restored = tree.unflatten(saved)
    out, end = run(opt, restored["params"], 3, restored["opt"], first=3)
    whole, whole_end = run(opt, params, 6)
    assert equal(out, whole) and equal(end, whole_end) and end["step"] == 6
    assert equal(out, expected)


def test_adamw_resumes_bit_for_bit_through_dotted_paths():
    opt, params = optimizer.adamw(optimizer.schedule("cosine", 1e-2, 2, 10)), make()
    assert shapes_of(opt.init(tree.map(lambda leaf: leaf.to("meta"), params))) == shapes_of(opt.init(params))
    half, state = run(opt, copy(params), 4)
    saved = {path: leaf.clone() for path, leaf in tree.flatten({"params": half, "opt": state}).items()}
    restored = tree.unflatten(saved)
    out, end = run(opt, restored["params"], 4, restored["opt"], first=4)
    whole, whole_end = run(opt, params, 8)
    assert equal(out, whole) and equal(end, whole_end)


@pytest.mark.parametrize(
    "opt", [optimizer.adamw(1e-2), optimizer.from_torch(torch.optim.SGD, 1e-2, momentum=0.9)], ids=["adamw", "sgd"]
)
def test_params_and_state_are_donated_and_nothing_is_left_on_them(opt):
    params, grads = tree.map(torch.Tensor.requires_grad_, make()), make(1)
    state, kept = opt.init(params), copy(grads)
    addresses = [leaf.data_ptr() for leaf in tree.leaves((params, state))]
    new_params, new_state = opt.update(grads, state, params)
    assert new_params is params and new_state is state and equal(grads, kept)
    assert addresses == [leaf.data_ptr() for leaf in tree.leaves((new_params, new_state))]
    assert all(leaf.grad is None and leaf.requires_grad for leaf in tree.leaves(params))


@pytest.mark.parametrize(
    "opt",
    [optimizer.adamw(1e-2), optimizer.from_torch(torch.optim.Adam, 1e-2, fused=True)],
    ids=["adamw", "fused Adam"],
)
def test_strides_of_a_gradient_do_not_matter(opt):
    # torch's fused kernel pairs elements by their place in memory.
    params, grad = {"w": torch.arange(12.0).view(3, 4)}, torch.arange(12.0).view(4, 3).square().T
    same = copy(params)
    opt.update({"w": grad}, opt.init(params), params)
    opt.update({"w": grad.contiguous()}, opt.init(same), same)
    assert not grad.is_contiguous() and equal(params, same)
    with pytest.raises(ValueError, match=r"parameter w has strides \(1, 3\): it should be contiguous"):
        opt.init({"w": grad})


def test_leaves_of_several_types_are_each_as_if_alone():
    opt = optimizer.adamw(1e-2)
    params = {"a": torch.randn(5), "b": torch.randn(4).bfloat16(), "c": torch.randn(3).double(), "d": torch.randn(2)}
    grads = tree.map(torch.randn_like, params)
    alone = {name: {name: leaf.clone()} for name, leaf in params.items()}
    opt.update(grads, opt.init(params), params)
    for name, one in alone.items():
        opt.update({name: grads[name]}, opt.init(one), one)
        assert torch.equal(one[name], params[name])


def test_trees_that_differ_are_an_error():
    opt, params = optimizer.adamw(1e-2), make()
    state, before = opt.init(params), copy(params)
    with pytest.raises(ValueError):
        opt.update({"w": torch.zeros(1)}, state, params)
    assert equal(params, before) and state["step"] == 0
    with pytest.raises(ValueError, match=r"betas is \(0.9, 1.0\): should be two numbers in \[0, 1\)"):
        optimizer.adamw(1e-2, betas=(0.9, 1.0))


def test_classes_that_cannot_be_pairs_say_so():
    with pytest.raises(ValueError, match="LBFGS needs a closure"):
        optimizer.from_torch(torch.optim.LBFGS, 1.0)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear"])
def test_schedule_is_its_closed_form(kind):
    lr, warmup, end, final = 3e-4, 7, 31, 0.2
    rate = optimizer.schedule(kind, lr, warmup, end, final)
    for step in range(45):
        n = step + 1
        expected = lr * n / warmup
        if n > warmup:
            progress = min((n - warmup) / (end - warmup), 1)
            left = {"constant": 1, "cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress}[kind]
            expected = lr if kind == "constant" else lr * (final + (1 - final) * left)
        assert isinstance(rate(step), float) and rate(step) == pytest.approx(expected, rel=1e-12)
        on_device = rate(torch.tensor(float(step)))
        assert on_device.dtype == torch.float32 and float(on_device) == pytest.approx(expected, rel=2e-6)
    assert optimizer.schedule("constant", lr)(0) == lr


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        ("cosine", lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=20)),
        ("linear", lambda opt: torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=20)),
    ],
)
def test_decay_is_torchs_one_update_later(kind, scheduler):
    # torch counts updates made; torchtitan, and we, the one about to be made, so that the last one ends the decay.
    rate = optimizer.schedule(kind, 0.5, 0, 20)
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = scheduler(opt)
    for step in range(20):
        opt.step()
        theirs.step()
        assert rate(step) == pytest.approx(opt.param_groups[0]["lr"], rel=1e-9, abs=1e-12)


def test_schedules_that_cannot_be():
    with pytest.raises(ValueError, match="schedule is 'cos': should be 'constant'"):
        optimizer.schedule("cos", 1.0)
    with pytest.raises(ValueError, match="decay_steps is 5: should be above warmup_steps, which is 5"):
        optimizer.schedule("linear", 1.0, 5, 5)


keys = st.sampled_from(["img_in", "norm", "lin", "0", "2"])
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
trees = st.recursive(shapes, lambda child: st.dictionaries(keys, child, min_size=1, max_size=3), max_leaves=6).filter(
    lambda t: isinstance(t, dict)
)


def fill(shape_tree, rng, dtype):
    if isinstance(shape_tree, tuple):
        return torch.randn(shape_tree, generator=rng, dtype=torch.float64).to(dtype)
    return {key: fill(child, rng, dtype) for key, child in shape_tree.items()}


@settings(max_examples=40, deadline=None)
@given(trees, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.floats(0.01, 10))
def test_clip_scales_any_tree_to_the_norm(shape_tree, dtype, max_norm):
    grads = fill(shape_tree, torch.Generator().manual_seed(0), dtype)
    before = [leaf.to(torch.float64, copy=True) for leaf in tree.leaves(grads)]
    exact = torch.cat([leaf.reshape(-1) for leaf in before]).norm()
    out, norm = optimizer.clip(grads, max_norm)
    assert norm.ndim == 0 and norm.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
    # In bfloat16 the factor and the product are each rounded, by at most 2**-8.
    rtol = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: (1 + 2**-8) ** 2 - 1 + 1e-6}[dtype]
    for leaf, old in zip(tree.leaves(out), before, strict=True):
        torch.testing.assert_close(leaf.double(), old * (max_norm / (exact + 1e-6)).clamp(max=1), rtol=rtol, atol=0)


@settings(max_examples=20, deadline=None)
@given(trees, st.sampled_from([torch.float32, torch.float64]), st.floats(0.01, 10))
def test_clip_is_torchs_on_any_tree(shape_tree, dtype, max_norm):
    grads = fill(shape_tree, torch.Generator().manual_seed(0), dtype)
    reference = [torch.zeros_like(leaf).requires_grad_() for leaf in tree.leaves(grads)]
    for leaf, grad in zip(reference, tree.leaves(grads), strict=True):
        leaf.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(reference, max_norm)
    out, _ = optimizer.clip(grads, max_norm)
    for leaf, expected in zip(tree.leaves(out), reference, strict=True):
        torch.testing.assert_close(leaf, expected.grad, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)


@settings(max_examples=25, deadline=None)
@given(trees, st.sampled_from([torch.float32, torch.bfloat16]))
def test_adamw_is_torchs_on_any_tree(shape_tree, dtype):
    rng = torch.Generator().manual_seed(0)
    params, grads = fill(shape_tree, rng, dtype), fill(shape_tree, rng, dtype)
    reference = [leaf.clone().requires_grad_() for leaf in tree.leaves(params)]
    for leaf, grad in zip(reference, tree.leaves(grads), strict=True):
        leaf.grad = grad
    theirs = torch.optim.AdamW(reference, lr=0.1, fused=True)
    opt = optimizer.adamw(0.1)
    state = opt.init(params)
    for _ in range(2):
        theirs.step()
        params, state = opt.update(grads, state, params)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(params), reference, strict=True))


def test_a_gradient_of_two_leaves_is_clipped_once_and_stays_as_it_was():
    shared = torch.ones(2)
    out, norm = optimizer.clip({"a": shared, "b": shared}, 1.0)
    torch.testing.assert_close(norm, torch.tensor(2.0))
    assert shared.tolist() == [1, 1]
    torch.testing.assert_close(out["a"], torch.full((2,), 0.5))
    torch.testing.assert_close(out["b"], torch.full((2,), 0.5))


def test_a_norm_that_is_not_finite_shows():
    for bad in (math.inf, math.nan):
        grads, norm = optimizer.clip({"a": torch.tensor([1.0, bad]), "b": torch.ones(2)}, 1.0)
        assert not norm.isfinite() and grads["a"].isnan().any()


def test_a_largest_norm_of_zero_means_not_clipped():
    grads = make()
    out, norm = optimizer.clip(copy(grads), 0.0)
    assert equal(out, grads) and norm > 1


def settings_of(**optimizer_fields):
    c = config.default()
    c.optimizer.update(optimizer_fields)
    return c


def test_from_config_reads_every_field():
    c = settings_of(
        lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, schedule="cosine", warmup_steps=2, decay_steps=6
    )
    params = make()
    expected = run(optimizer.adamw(optimizer.schedule("cosine", 1e-2, 2, 6), (0.8, 0.9), 1e-6, 0.3), copy(params), 6)
    assert equal(run(optimizer.from_config(c), params, 6), expected)
    c = settings_of(name="SGD", options="momentum=0.9, nesterov=True", lr=1e-2)
    expected = run(optimizer.from_torch(torch.optim.SGD, 1e-2, momentum=0.9, nesterov=True), make(), 3)
    assert equal(run(optimizer.from_config(c), make(), 3), expected)


def test_decay_ends_with_the_run_unless_told_otherwise():
    c = settings_of(schedule="linear", lr=1.0, final_lr_fraction=0.25)
    assert optimizer.schedule_from_config(c)(c.train.steps - 1) == 0.25
    c.optimizer.decay_steps = 40
    assert optimizer.schedule_from_config(c)(19) == pytest.approx(1 - 0.75 / 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adamm"}, "optimizer.name is 'adamm': did you mean 'adamw'?"),
        ({"name": "Optimizer"}, "optimizer.name is 'Optimizer': "),
        ({"name": "LBFGS"}, "optimizer.name is 'LBFGS': LBFGS needs a closure"),
        ({"name": "SparseAdam"}, "optimizer.name is 'SparseAdam': SparseAdam does not support dense"),
        ({"name": "Muon"}, "optimizer.name is 'Muon': Muon only supports 2D"),
        ({"name": "SGD", "options": "momentum 0.9"}, "optimizer.options is 'momentum 0.9': should be arguments"),
        ({"name": "SGD", "options": "momentum=open('x')"}, "should be arguments with plain values"),
        ({"name": "SGD", "options": "momentum=1)(lr=2"}, "should be arguments with plain values"),
        ({"name": "SGD", "options": "0.9"}, "should be arguments with plain values"),
        ({"name": "SGD", "options": "momentun=0.9"}, "for 'momentun', did you mean 'momentum'?"),
        ({"name": "SGD", "options": "lr=0.9"}, "for 'lr', should be one of 'momentum'"),
        ({"name": "SGD", "options": "momentum=-1"}, "SGD says: Invalid momentum value: -1"),
        ({"name": "SGD", "options": "momentum='a'"}, "SGD says: "),
        ({"name": "SGD", "weight_decay": 0.3}, "optimizer.weight_decay is 0.3: is read by 'adamw' alone"),
        ({"options": "amsgrad=True"}, "optimizer.options is 'amsgrad=True': should be empty"),
        ({"betas": (1.0, 0.9)}, r"optimizer.betas is (1.0, 0.9): should be two numbers in [0, 1)"),
        ({"schedule": "cosine", "warmup_steps": 30}, "train.steps (where decay ends"),
        (
            {"schedule": "cosine", "warmup_steps": 30, "decay_steps": 20},
            "optimizer.decay_steps is 20: should be above optimizer.warmup_steps, which is 30",
        ),
    ],
)
def test_bad_settings_are_one_line(fields, message):
    with pytest.raises(UserError) as raised:
        optimizer.from_config(settings_of(**fields))
    assert message in str(raised.value) and "\n" not in str(raised.value)
