"""How a run is laid out over its processes: the sharding that its config comes to, checked, and in words."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import ml_collections
import torch
from torch import Tensor

from flux_func import tree
from flux_func.config import one_of
from flux_func.errors import UserError
from flux_func.launch import processor
from flux_func.models import flux, kernels, layers, products
from flux_func.models.layers import Ops
from flux_func.parallel import attention, placements, sharding
from flux_func.parallel.mesh import Mesh
from flux_func.parallel.placements import Placement
from flux_func.parallel.sharding import Sharding
from flux_func.train import moments
from flux_func.train import optimizer as optimizers
from flux_func.train.state import DTYPES, trained
from flux_func.transforms import compiled, quantized
from flux_func.transforms.remat import Policy


def build(
    config: ml_collections.ConfigDict,
    cfg: flux.FluxConfig,
    optimizer: optimizers.Optimizer,
    mesh: Mesh,
    device: torch.device,
) -> Sharding:
    """Returns the sharding of what a run trains, the parameters or a LoRA of them.

    Raises:
      UserError: sizes that do not divide (the line says which would), a table that cannot be honoured, or an optimizer
        that needs whole what is split.
    """
    made = of_weights(config, cfg, mesh, device)
    if config.lora.rank:
        made = _of_lora(config, cfg, made)
    _check_kernel(config, cfg, device)
    _check_patterns(config, cfg, "remat.keep", ("attention",))
    _check_batch(config, made)
    _check_sequence(config, cfg, made)
    _check_linear(config, cfg, made, device)
    _check_optimizer(config, optimizer, made)
    _check_blocks(config, made)
    return made


def of_weights(config: ml_collections.ConfigDict, cfg: flux.FluxConfig, mesh: Mesh, device: torch.device) -> Sharding:
    """Returns the sharding of the model's weights; under a LoRA they are kept in the type that they are computed in."""
    n = config.numerics
    kept = n.compute if config.lora.rank else n.param
    shapes = flux.abstract(cfg, DTYPES[kept])
    return sharding.from_config(config, shapes, mesh, DTYPES[n.compute], DTYPES[n.reduce], device)


def _of_lora(config: ml_collections.ConfigDict, cfg: flux.FluxConfig, base: Sharding) -> Sharding:
    shapes = trained(config, cfg)
    found = placements.resolve(config.parallel.lora, tree.flatten(shapes), base.mesh, "parallel.lora")
    each = iter(found.values())
    places = tree.map(lambda _: next(each), shapes)
    return dataclasses.replace(base, params=places, grads=places)


def ops(config: ml_collections.ConfigDict, cfg: flux.FluxConfig, made: Sharding) -> Ops:
    """Returns how a training step does the model's operations, over the processes of a sequence where it is split."""
    p, named = config.parallel, config.kernels.attention
    found = _attending(named)
    if made.splits:
        found = Ops(attention=attention.context_attention(p.attention, made.mesh, cfg.num_heads, p.ulysses, named))
    if config.numerics.linear:
        emulate = made.device.type == "cpu"
        linear = quantized.linear(config.numerics.linear, _quantized(config, cfg), emulate=emulate)
        found = dataclasses.replace(found, linear=linear)
    if config.compile.enabled:
        options = {"mode": config.compile.mode} if config.compile.mode else {}
        found = dataclasses.replace(found, wrap_stage=compiled.stages(backend=config.compile.backend, **options))
    return found


def evaluation(device: torch.device, kernel: str = "") -> Ops:
    """Returns how what takes no gradients, validation and sampling, does the model's operations on a device.

    Args:
      device: what is computed on.
      kernel: of attention, one of `kernels.KERNELS`; "": the one torch takes.
    """
    found = _attending(kernel)
    if device.type != "cpu" or not processor.prefers_onednn():
        return found
    return dataclasses.replace(found, linear=products.linear)


def _attending(kernel: str) -> Ops:
    return Ops(attention=functools.partial(layers.attention, kernel=kernel)) if kernel else Ops()


def remat(config: ml_collections.ConfigDict) -> str | Policy:
    """Returns the fold's policy of rematerialization."""
    return Policy(config.remat.keep) if config.remat.policy == "selective" else config.remat.policy


def say(places: Mapping[str, Placement], mesh: Mesh) -> str:
    """Returns the resolved table of a state: what is where, and how many bytes of it a process has.

    Rows are of the parameters, and of what an optimizer keeps where that is placed otherwise.
    """
    members: dict[str, dict[str, Placement]] = {}
    for path, place in places.items():
        member, _, rest = path.partition(".")
        members.setdefault(member, {})[rest] = place
    sizes = {member: sum(place.local_bytes(mesh) for place in found.values()) for member, found in members.items()}
    mesh_said = " x ".join(f"{axis}={size}" for axis, size in mesh.sizes.items())
    total = ", ".join(f"{member} {size / 1e6:,.2f} MB" for member, size in sorted(sizes.items(), reverse=True))
    last = f"{mesh_said}: a process has {total}"
    if mesh.size() == 1:
        return last
    split = {(place.shape, place.axes, place.dim) for place in members["params"].values()}
    shown = dict(members["params"])
    shown |= {
        f"opt.{path}": place
        for path, place in members.get("opt", {}).items()
        if place.axes and (place.shape, place.axes, place.dim) not in split
    }
    return f"{_table(placements.describe(shown, mesh))}\n{last}"


def _table(found: list[tuple[str, str, str, int]]) -> str:
    rows = [("leaf", "shape", "placement", "MB a process")]
    rows += [(name, shape, where, f"{size / 1e6:,.3f}") for name, shape, where, size in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _check_kernel(config: ml_collections.ConfigDict, cfg: flux.FluxConfig, device: torch.device) -> None:
    name = config.kernels.attention
    if not name or device.type == "meta":  # as where a plan is made, which knows of no kernels
        return
    try:
        if name == "flash3" and device.type == "cuda":
            torch.nn.attention.activate_flash_attention_impl("FA3")
        size = cfg.hidden_size // cfg.num_heads
        kernels.check(name, cfg.num_heads, size, DTYPES[config.numerics.compute], device)
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"kernels.attention is {name!r}: {reason}; choose another, or '' for torch's choice") from error


def _check_patterns(
    config: ml_collections.ConfigDict, cfg: flux.FluxConfig, field: str, beside: Sequence[str] = ()
) -> None:
    group, _, name = field.partition(".")
    patterns, known = tuple(config[group][name]), flux.linears(cfg)
    for pattern in patterns:
        if pattern not in beside and not any(tree.match([pattern], path) for path in known):
            raise UserError(f"{field} is {patterns}: {pattern!r} fits no linear: {one_of(pattern, (*beside, *known))}")


def _check_linear(
    config: ml_collections.ConfigDict, cfg: flux.FluxConfig, made: Sharding, device: torch.device
) -> None:
    recipe = config.numerics.linear
    if not recipe:
        return
    _check_patterns(config, cfg, "numerics.patterns")
    where, paths = f"numerics.linear is {recipe!r}", _quantized(config, cfg)
    try:
        if device.type != "meta":  # as where a plan is made
            quantized.check_device(recipe, device)
    except ImportError as error:
        raise UserError(f"{where}: needs torchao 0.18 or newer ({error}): pip install 'flux-func[quant]'") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error

    def linear(params: layers.Params, x: Tensor, path: str) -> Tensor:
        if path in paths:
            quantized.check(recipe, path, x, params["weight"])
        return layers.linear(params, x, path)

    try:
        _look(config, cfg, made, Ops(linear=linear))
    except ValueError as error:
        raise UserError(f"{where}: {error}; leave it out of numerics.patterns, or change train.batch_size") from error


def _quantized(config: ml_collections.ConfigDict, cfg: flux.FluxConfig) -> frozenset[str]:
    """Returns the paths of the linears that numerics.linear is for."""
    return frozenset(path for path in flux.linears(cfg) if tree.match(config.numerics.patterns, path))


def _look(config: ml_collections.ConfigDict, cfg: flux.FluxConfig, made: Sharding, ops: Ops) -> None:
    """Runs a block of each kind on a process's micro-batch without memory, for what the ops see of it."""
    batch = config.train.batch_size // (made.mesh.size(made.batch_axes) * config.train.accumulate)
    parts = made.mesh.sizes["context"] if made.splits else 1
    image, text = (config.data.image_size // 16) ** 2 // parts, config.text.max_length // parts
    cfg, make = dataclasses.replace(cfg, depth=1, depth_single_blocks=1), functools.partial(torch.empty, device="meta")
    flux.apply(
        flux.abstract(cfg, DTYPES[config.numerics.compute]),
        cfg,
        img=make(batch, image, cfg.in_channels),
        img_ids=make(1, image, len(cfg.axes_dim)),
        txt=make(batch, text, cfg.context_in_dim),
        txt_ids=make(1, text, len(cfg.axes_dim)),
        timesteps=make(batch),
        y=make(batch, cfg.vec_in_dim),
        guidance=make(batch) if cfg.guidance_embed else None,
        ops=ops,
    )


def _check_batch(config: ml_collections.ConfigDict, made: Sharding) -> None:
    size, micro = config.train.batch_size, config.train.accumulate
    count = made.mesh.size(made.batch_axes)
    if size % (count * micro):
        over = " x ".join(f"{axis}={made.mesh.sizes[axis]}" for axis in made.batch_axes)
        fits = ", ".join(str(n) for n in range(1, size // micro + 1) if size % (n * micro) == 0)
        near = max(count * micro, round(size / (count * micro)) * count * micro)
        raise UserError(
            f"train.batch_size is {size}: does not divide into {micro} micro-batches (train.accumulate) over {over}; "
            f"{near} would, or {' x '.join(made.batch_axes)} of {fits}"
        )


def _check_sequence(config: ml_collections.ConfigDict, cfg: flux.FluxConfig, made: Sharding) -> None:
    p, context = config.parallel, made.mesh.sizes["context"]
    if made.splits:
        lengths = (config.text.max_length, (config.data.image_size // 16) ** 2)
        attention.check(p.attention, context, p.ulysses, cfg.num_heads, *lengths)
        return
    for field, usual in (("attention", "all_gather"), ("ulysses", -1)):
        # One config serves any size of context, 1 too, but for a degree that this size has not.
        if p[field] != usual and (context > 1 or field == "ulysses"):
            why = "parallel.context is 1" if context == 1 else f"parallel.activations is {p.activations}"
            raise UserError(f"parallel.{field} is {p[field]!r}: no sequence is split, as {why}; leave it at {usual!r}")


def _check_optimizer(config: ml_collections.ConfigDict, optimizer: optimizers.Optimizer, made: Sharding) -> None:
    split = any(place.axes for place in tree.leaves(made.grads))
    if split and not optimizers.is_elementwise(optimizer):
        moments = " --config.parallel.moments='()'" if config.parallel.moments else ""
        table = "lora" if config.lora.rank else "params"
        raise UserError(
            f"optimizer.name is {config.optimizer.name!r}: mixes the numbers of a leaf, which are split over "
            f"processes; choose another, or have leaves whole: --config.parallel.{table}='((\"*\", {{}}),)'{moments}"
        )


def _check_blocks(config: ml_collections.ConfigDict, made: Sharding) -> None:
    if config.optimizer.moments != "8bit":
        return
    for path, place in tree.flatten(made.grads).items():
        local, size = place.local_shape(made.mesh), moments.block(place.shape)
        if moments.block(local) != size:
            raise UserError(
                f"optimizer.moments is '8bit': {path} {list(place.shape)} is {placements.say(place, made.mesh)}, "
                f"{local[-1]} numbers of a row for a process, and {size} share a scale: split it over dimension 0, or "
                f"choose 'bfloat16'"
            )
