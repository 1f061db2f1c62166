"""Optimizers over the parameter tree: (init, update) pairs in optax's spirit, schedules, and clipping.

    opt = optimizer.adamw(lr=1e-4)
    state = opt.init(params)
    params, state = opt.update(grads, state, params)

`update` takes over the old params and state: it writes into their tensors and returns the same trees. Arithmetic is
torch's own kernels, but where numbers are kept narrower than they are updated in (`moments.py`); a state is a tree of
tensors, so a checkpoint holds it like any other tree.
"""

import ast
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_func import tree
from flux_func.errors import UserError
from flux_func.parallel.placements import Span
from flux_func.train import moments as formats
from flux_func.train.stateless import Stateless
from flux_func.transforms.norms import global_norm
from flux_func.tree import Tree

# From the number of updates already made (a number, or a scalar tensor) to the learning rate of the next.
Schedule = Callable[[Any], Any]


class Optimizer(NamedTuple):
    """A pair of functions.

    Attributes:
      init: `params -> state`.
      update: `(grads, state, params, scale=None, spans=None) -> (params, state)`; params and state are donated. `scale`
        is a scalar tensor that the gradients are first multiplied by, which may be done in place; `spans` say by path
        where params are in leaves of which they are parts.
    """

    init: Callable[[Tree], Tree]
    update: Callable[..., tuple[Tree, Tree]]


def adamw(
    lr: float | Schedule,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    moments: str = "",
    rounding: str = "nearest",
    seed: int = 0,
    compiled: Mapping[str, Any] | None = None,
) -> Optimizer:
    """Returns AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).

    The state is {"exp_avg", "exp_avg_sq": trees like the parameters, of tensors or of {"codes", "scale"}; "step":
    float32 scalar, the updates made}. The step stays on the parameters' device, so that an update waits for nothing.

    A leaf whose moments have its type, and that is rounded to the nearest, is updated by torch's fused kernel. There is
    no other to fall back to: a device or type that it does not know is torch's error, and
    `from_torch(torch.optim.AdamW, ...)` the slower way. Any other leaf is updated by `moments.py`.

    Args:
      lr: the learning rate, or a schedule that is handed "step", a scalar tensor.
      betas: decay of the two moments, in [0, 1).
      eps: added to the root of the second moment.
      weight_decay: decoupled, times lr.
      moments: "float32", "bfloat16", or "8bit" by torchao, of matrices; "": the parameters' type.
      rounding: of what is kept in bfloat16: "nearest", or "stochastic", which loses nothing on average.
      seed: of stochastic rounding, whose draws count a number's place in the leaf and the updates made.
      compiled: torch.compile's options, for leaves that the fused kernel does not take; None: they are not compiled.

    Raises:
      ValueError: betas out of range, moments or rounding that there is not; parameters that are not contiguous (in
        `init`); trees that differ (in `update`). ImportError: moments in 8 bits without torchao.
    """
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas is {tuple(betas)}: should be two numbers in [0, 1)")
    formats.check(moments, rounding)
    advance = formats.updater(betas, eps, weight_decay, rounding, seed, compiled)

    def init(params: Tree) -> Tree:
        zeros = functools.partial(formats.zeros, moments)
        made = {name: tree.map(zeros, _contiguous(params)) for name in ("exp_avg", "exp_avg_sq")}
        return {**made, "step": torch.zeros((), device=tree.leaves(params)[0].device)}

    @torch.no_grad()
    def update(
        grads: Tree, state: Tree, params: Tree, scale: Tensor | None = None, spans: Mapping[str, Span] | None = None
    ) -> tuple[Tree, Tree]:
        step, rows = state["step"], []
        rate = lr(step) if callable(lr) else lr
        if isinstance(rate, Tensor):
            rate = rate.to(step.device, torch.float32)
        tree.map(lambda *row: rows.append(row), params, _like(grads, params), state["exp_avg"], state["exp_avg_sq"])
        advance(dict(zip(tree.flatten(params), rows, strict=True)), step, rate, scale, spans or {})
        step.copy_(step + 1)
        return params, state

    return Optimizer(init, update)


def from_torch(cls: type[torch.optim.Optimizer], lr: float | Schedule, **options: Any) -> Optimizer:
    """Returns any of torch's optimizers as a pair: SGD, Adafactor, RMSprop, NAdam and so on.

    The state is {"step": int64 scalar on the CPU, the updates made; "state": the parameters' tree, each leaf replaced
    by a dict of what the class keeps for it}. It has its final shapes from `init` on (of meta parameters too), so that
    a checkpoint can be restored into it; its first values are left to the class's first step.

    Args:
      cls: an optimizer class whose `step` needs no closure and that keeps tensors alone.
      lr: the learning rate, or a schedule that is handed the updates made, an int.
      options: the class's other arguments.

    Raises:
      ValueError: the class needs a closure; it keeps something that is not a tensor (in `init`). What the class
        itself says of its options or the parameters is passed on.
    """
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{cls.__name__} needs a closure that computes the loss again, which a pair cannot give it")

    stateless = Stateless(cls, options)

    def init(params: Tree) -> Tree:
        return {"state": stateless.zeros(_contiguous(params)), "step": torch.zeros((), dtype=torch.int64)}

    @torch.no_grad()
    def update(
        grads: Tree, state: Tree, params: Tree, scale: Tensor | None = None, spans: Mapping[str, Span] | None = None
    ) -> tuple[Tree, Tree]:
        del spans
        if scale is not None:
            torch._foreach_mul_(tree.leaves(grads), scale)
        if state["step"].device.type != "cpu":  # restored with all else: each look at a count would wait for the device
            state = tree.map(stateless.home, state)
        made = int(state["step"])
        rate = float(lr(made)) if callable(lr) else lr
        leaves, grads = tree.flatten(params), tree.flatten(_like(grads, params))
        kept: dict[str, dict[str, Tensor]] = {path: {} for path in leaves}
        for key, value in tree.flatten(state.get("state", {})).items():
            path, _, name = key.rpartition(".")
            kept[path][name] = value
        # The first step makes its state anew; leaf by leaf, so that it is never in memory twice.
        for paths in [list(leaves)] if made else [[path] for path in leaves]:
            columns = ([column[path] for path in paths] for column in (leaves, grads, kept))
            stateless.step(*columns, rate, first=not made)
        state["step"] += 1
        return params, state

    return Optimizer(init, update)


def _contiguous(params: Tree) -> Tree:
    for path, leaf in tree.flatten(params).items():
        if not leaf.is_contiguous():
            raise ValueError(f"parameter {path} has strides {leaf.stride()}: it should be contiguous")
    return params


def _like(grads: Tree, params: Tree) -> Tree:
    """Returns the gradients laid out as the parameters are; ValueError where the trees differ."""
    # torch's fused kernels walk through memory whatever the strides, and are silently wrong where those differ.
    return tree.map(lambda _, grad: grad.contiguous(), params, grads)


def schedule(
    kind: str, lr: float, warmup_steps: int = 0, decay_steps: int = 0, final_lr_fraction: float = 0.0
) -> Schedule:
    """Returns `step -> lr`, step counting the updates already made; torchtitan's convention.

    With n = step + 1, the update about to be made: lr * n / warmup_steps up to n = warmup_steps (so never 0); then
    constant, or falling to lr * final_lr_fraction at n = decay_steps, by half a cosine or a line, and staying there.

    Args:
      kind: "constant", "cosine" or "linear".
      lr: the learning rate after warm-up.
      warmup_steps: updates of linear warm-up; 0: none.
      decay_steps: the update at which decay ends, counted from the start of the run; "constant" does not look at it.
      final_lr_fraction: share of lr that is left then.

    Returns:
      A function of a number (to a number) or of a scalar tensor (to one of its type and device).

    Raises:
      ValueError: no such kind, or decay that would end before it begins.
    """
    if kind not in ("constant", "cosine", "linear"):
        raise ValueError(f"schedule is {kind!r}: should be 'constant', 'cosine' or 'linear'")
    if kind != "constant" and decay_steps <= warmup_steps:
        raise ValueError(f"decay_steps is {decay_steps}: should be above warmup_steps, which is {warmup_steps}")

    def at(step: Tensor | float) -> Tensor | float:
        n = 1 + (step if isinstance(step, Tensor) else torch.tensor(step, dtype=torch.float64))
        share = (n / max(warmup_steps, 1)).clamp(max=1)
        if kind != "constant":
            progress = ((n - warmup_steps) / (decay_steps - warmup_steps)).clamp(0, 1)
            left = (1 + torch.cos(math.pi * progress)) / 2 if kind == "cosine" else 1 - progress
            share = share * (final_lr_fraction + (1 - final_lr_fraction) * left)
        return lr * share if isinstance(step, Tensor) else lr * share.item()

    return at


def clip_scale(norm: Tensor, max_norm: float) -> Tensor | None:
    """Returns what gradients of a norm are to be multiplied by so that it is at most max_norm (0: None, by nothing).

    It is torch's clip_grad_norm_'s factor, a scalar tensor: nothing waits for the device. Of a norm that is not finite
    it spoils all gradients. `Optimizer.update` takes it.
    """
    return (max_norm / (norm + 1e-6)).clamp(max=1) if max_norm else None


@torch.no_grad()
def clip(grads: Tree, max_norm: float) -> tuple[Tree, Tensor]:
    """Returns gradients scaled so that their global norm is at most max_norm (0: as they are), and the norm before.

    See `clip_scale`, which `Optimizer.update` takes, and needs no second tree.
    """
    norm = global_norm(grads)
    scale = clip_scale(norm, max_norm)
    if scale is None:
        return grads, norm
    # Not in place: the gradients of two leaves may be one tensor, which would be scaled twice.
    scaled = iter(torch._foreach_mul(tree.leaves(grads), scale))
    return tree.map(lambda leaf: next(scaled).to(leaf.dtype), grads), norm


def is_elementwise(optimizer: Optimizer) -> bool:
    """Returns whether an update does the same to a leaf and to its parts, as steps on a matrix and its halves show.

    What it keeps of a leaf has to be shaped as the leaf, too, or be a single number.
    """
    rng = torch.Generator().manual_seed(0)
    draws = [torch.randn(4, 6, generator=rng, dtype=torch.float64) for _ in range(4)]

    def change(rows: slice) -> Tensor:
        params = {"weight": draws[0][rows].clone()}
        state, spans = optimizer.init(params), {"weight": (6 * rows.start, params["weight"].numel(), 0)}
        for grad in draws[1:]:
            params, state = optimizer.update({"weight": grad[rows].clone()}, state, params, None, spans)
        return params["weight"] - draws[0][rows]

    kept = tree.leaves(optimizer.init({"weight": draws[0].clone()}))
    if any(leaf.ndim and leaf.shape != draws[0].shape for leaf in kept):
        return False
    halves = torch.cat([change(slice(0, 2)), change(slice(2, 4))])
    return torch.allclose(change(slice(0, 4)), halves, rtol=1e-6, atol=0)


# From the config.


def schedule_from_config(config: Any) -> Schedule:
    """Returns the learning rate's schedule of a run; UserError if it would end before it begins."""
    o = config.optimizer
    field, decay_steps = "optimizer.decay_steps", o.decay_steps
    if not decay_steps:
        field, decay_steps = "train.steps (where decay ends, as optimizer.decay_steps is 0)", config.train.steps
    if o.schedule != "constant" and decay_steps <= o.warmup_steps:
        raise UserError(f"{field} is {decay_steps}: should be above optimizer.warmup_steps, which is {o.warmup_steps}")
    return schedule(o.schedule, o.lr, o.warmup_steps, decay_steps, o.final_lr_fraction)


def from_config(config: Any) -> Optimizer:
    """Returns the optimizer of a run.

    Raises:
      UserError: no such optimizer, options that it does not take, or settings of adamw's for another one.
    """
    from flux_func.config import one_of

    o, lr = config.optimizer, schedule_from_config(config)
    if o.name == "adamw":
        if o.options:
            raise UserError(f"optimizer.options is {o.options!r}: should be empty, adamw's settings have fields")
        try:
            return adamw(lr, tuple(o.betas), o.eps, o.weight_decay, moments=o.moments, **_narrow(config))
        except ValueError as error:
            raise UserError(f"optimizer.{error}") from error
        except ImportError as error:
            said = f"needs torchao 0.18 or newer ({error}): pip install 'flux-func[quant]'"
            raise UserError(f"optimizer.moments is {o.moments!r}: {said}") from error
    classes = {name: cls for name, cls in vars(torch.optim).items() if _is_optimizer(cls)}
    if o.name not in classes:
        raise UserError(f"optimizer.name is {o.name!r}: {one_of(o.name, ['adamw', *sorted(classes)])}")
    _check_adamw_fields(o)
    if config.numerics.param == "bfloat16" and config.numerics.rounding != "nearest":
        said = f"optimizer.name {o.name!r} rounds to the nearest; set 'nearest', or choose 'adamw'"
        raise UserError(f"numerics.rounding is {config.numerics.rounding!r}: {said}")
    cls = classes[o.name]
    try:
        _try_out(cls)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"optimizer.name is {o.name!r}: {error}; choose another") from error
    options = _options(cls, o.options)
    try:
        cls([torch.zeros(2, 2), torch.zeros(2)], lr=o.lr, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer.options is {o.options!r}: {o.name} says: {error}") from error
    return from_torch(cls, lr, **options)


def _narrow(config: Any) -> dict[str, Any]:
    """Returns how adamw rounds, and what with."""
    compiled = {"backend": config.compile.backend} if config.compile.enabled else None
    return {"rounding": config.numerics.rounding, "seed": config.train.seed, "compiled": compiled}


def _is_optimizer(value: Any) -> bool:
    base = torch.optim.Optimizer
    return inspect.isclass(value) and issubclass(value, base) and value is not base


def _check_adamw_fields(o: Any) -> None:
    from flux_func.config import default

    for field, value in default().optimizer.items():
        if field in ("betas", "eps", "weight_decay") and o[field] != value:
            raise UserError(
                f"optimizer.{field} is {o[field]!r}: is read by 'adamw' alone; for {o.name} leave it at {value!r} "
                f"and use optimizer.options"
            )


def _try_out(cls: type[torch.optim.Optimizer]) -> None:
    """Takes a step on a matrix and a vector: raises what the class says if it cannot train a whole tree."""
    opt = from_torch(cls, lr=1e-3)
    params = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    opt.update(tree.map(torch.zeros_like, params), opt.init(params), params)


def _options(cls: type[torch.optim.Optimizer], text: str) -> dict[str, Any]:
    """Returns the arguments written in optimizer.options; UserError if unreadable or not the class's."""
    from flux_func.config import one_of

    try:
        call = ast.parse(f"dict({text})", mode="eval").body
        options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if not isinstance(call.func, ast.Name) or call.args or None in options or len(options) < len(call.keywords):
            raise ValueError("not plain keyword arguments")
    except (SyntaxError, ValueError, TypeError, AttributeError) as error:
        remedy = 'should be arguments with plain values, such as "momentum=0.9, nesterov=True"'
        raise UserError(f"optimizer.options is {text!r}: {remedy}") from error
    known = [name for name in inspect.signature(cls).parameters if name not in ("params", "lr")]
    for name in options:
        if name not in known:
            raise UserError(f"optimizer.options is {text!r}: for {name!r}, {one_of(name, known)}")
    return options
