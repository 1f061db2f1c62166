"""What lives where: tables from path patterns to mesh axes, and the placement of every leaf that they come to.

A table's row is (pattern, {mesh axis: tensor dimension}): the leaves that the pattern fits are split along that
dimension over that axis, and repeated over the axes that are not named. The first row that fits counts. So FSDP, HSDP,
DDP and ZeRO are rows, as sharding rules are in google-research/big_vision and in JAX's PartitionSpecs:

  (("*", {"shard": 0, "context": 0}),)    parameters in equal parts along their rows: FSDP, or HSDP with `replicate`
  (("*", {}),)                            each process has them whole: DDP

A dimension that does not divide gives way to the next that does.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flux_func import tree
from flux_func.errors import UserError
from flux_func.parallel.mesh import AXES, Mesh

# From a number's place in a process's part of a leaf to its place in the leaf: (first, run, gap), see `Placement.span`.
Span = tuple[int, int, int]
Row = tuple[str, Mapping[str, int]]
Table = Sequence[Row]

# What a leaf of a block, and of its stream, begins with.
_BLOCK_OF = re.compile(rf"\b({'|'.join(tree.LISTS)})\.\d+\.(img_|txt_)?")

# Of the bytes of a tree, how many may be repeated because no dimension divides.
MOST_UNASKED = 0.05
# Numbers that may be read at a time, however small a process's part: `flux.drawing` draws blocks of so many.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Placement:
    """Where one leaf is.

    Attributes:
      shape: of the whole leaf.
      dtype: of the leaf.
      axes: the mesh axes it is split over, outermost first; none: every process has it whole.
      dim: the dimension that is split.
      note: why it is not as its row says; "" where it is.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: tuple[str, ...] = ()
    dim: int = 0
    note: str = ""

    def local(self, mesh: Mesh) -> tuple[slice, ...]:
        """Returns what this process has of the leaf, a slice for each dimension."""
        slices = [slice(0, size) for size in self.shape]
        if self.axes:
            size, index = self.shape[self.dim] // mesh.size(self.axes), mesh.index(self.axes)
            slices[self.dim] = slice(index * size, (index + 1) * size)
        return tuple(slices)

    def local_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """Returns the shape of what each process has of the leaf."""
        return tuple(part.stop - part.start for part in self.local(mesh))

    def local_bytes(self, mesh: Mesh) -> int:
        """Returns the bytes of what each process has of the leaf."""
        return math.prod(self.local_shape(mesh)) * self.dtype.itemsize

    def span(self, mesh: Mesh) -> Span:
        """Returns where this process's numbers are among the leaf's, both in the order of memory.

        The first one's place, how many follow on each other in the leaf, and how many of others' come after those.
        """
        if not self.axes:
            return 0, math.prod(self.shape), 0
        whole = math.prod(self.shape[self.dim :])
        run = whole // mesh.size(self.axes)
        return mesh.index(self.axes) * run, run, whole - run

    def torch(self) -> list[Any]:
        """Returns it as DTensor says it: a placement for each axis of the mesh."""
        from torch.distributed.tensor import Replicate, Shard  # takes a second to import, and is for many processes

        return [Shard(self.dim) if axis in self.axes else Replicate() for axis in AXES]


def resolve(table: Table, leaves: Mapping[str, Tensor], mesh: Mesh, field: str) -> dict[str, Placement]:
    """Returns the placement of every leaf.

    Args:
      table: rows, of which the first that fits counts; a leaf that none fits is repeated.
      leaves: {dotted path: tensor}, meta tensors too.
      mesh: the processes.
      field: the table's name in messages, such as "parallel.params".

    Raises:
      UserError: a row that cannot be, that fits no leaf, or that names a dimension which none of its leaves has; or
        more than `MOST_UNASKED` of the bytes repeated since nothing divides: the line says which sizes would.
    """
    check(table, {path: leaf.ndim for path, leaf in leaves.items()}, field)
    found = {path: _place(table, path, leaf, mesh) for path, leaf in leaves.items()}
    repeated = _unasked(table, leaves, mesh.sizes)
    if repeated > MOST_UNASKED:
        path = max(
            (path for path in found if not found[path].axes and found[path].note), key=lambda p: leaves[p].nbytes
        )
        axes = _split_axes(row(table, path), mesh.sizes)
        sizes = " x ".join(f"{axis}={mesh.sizes[axis]}" for axis in axes)
        raise UserError(
            f"{field} splits over {sizes}: {repeated:.0%} of the bytes have no dimension that divides by "
            f"{mesh.size(axes)}, such as {path} {list(found[path].shape)}; "
            f"{_sizes_that_would(table, leaves, mesh, axes)}"
        )
    return found


def check(table: Table, leaves: Mapping[str, int], field: str) -> None:
    """Checks the rows of a table; UserError names the field and the row.

    Args:
      table: the rows.
      leaves: {path: dimensions} of what they are to fit; none: not looked at.
      field: the table's name.
    """
    for entry in table:
        where = f"{field} has the row {entry!r}"
        if not (isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], str)):
            raise UserError(f'{where}: should be (pattern, {{axis: dimension}}), such as ("*", {{"shard": 0}})')
        if not isinstance(entry[1], Mapping):
            raise UserError(f'{where}: its second part should be {{axis: dimension}}, such as {{"shard": 0}}')
        for axis, dim in entry[1].items():
            if axis not in AXES:
                raise UserError(f"{where}: there is no axis {axis!r}; the mesh has {', '.join(AXES)}")
            if type(dim) is not int or dim < 0:
                raise UserError(f"{where}: the dimension of {axis!r} is {dim!r}; should be 0, 1, ...")
        if len(set(entry[1].values())) > 1:
            raise UserError(f"{where}: its axes split different dimensions; they should split one")
        if leaves:
            _check_fits(entry, leaves, where)


def _check_fits(entry: Row, leaves: Mapping[str, int], where: str) -> None:
    fitting = {path: dims for path, dims in leaves.items() if tree.match((entry[0],), path)}
    if not fitting:
        near = ", ".join(difflib.get_close_matches(entry[0], leaves, n=3, cutoff=0.0))
        raise UserError(f"{where}: its pattern fits nothing; the nearest are {near}")
    wanted = max(entry[1].values(), default=0)
    if wanted and wanted >= max(fitting.values()):
        raise UserError(f"{where}: nothing that it fits has a dimension {wanted}; they are counted from 0")


def _unasked(table: Table, leaves: Mapping[str, Tensor], sizes: Mapping[str, int]) -> float:
    """Returns the share of the bytes that a mesh would have repeated, though their rows split them."""
    unasked = 0
    for path, leaf in leaves.items():
        count = math.prod(sizes[axis] for axis in _split_axes(row(table, path), sizes))
        if leaf.ndim and all(size % count for size in leaf.shape):
            unasked += leaf.nbytes
    return unasked / max(1, sum(leaf.nbytes for leaf in leaves.values()))


def _sizes_that_would(table: Table, leaves: Mapping[str, Tensor], mesh: Mesh, axes: Sequence[str]) -> str:
    """Returns which sizes of the longest of some axes would divide, the others as they are."""
    longest = max(axes, key=mesh.sizes.__getitem__)
    size, found = mesh.sizes[longest], []
    for other in sorted(range(1, 2 * size + 1), key=lambda n: abs(n - size)):
        if _unasked(table, leaves, {**mesh.sizes, longest: other}) <= MOST_UNASKED:
            found.append(other)
        if len(found) == 4:
            break
    return f"sizes of {longest} that would: {', '.join(map(str, sorted(found)))}"


def _place(table: Table, path: str, leaf: Tensor, mesh: Mesh) -> Placement:
    placement, named = Placement(tuple(leaf.shape), leaf.dtype), row(table, path)
    axes = _split_axes(named, mesh.sizes)
    if not axes or not leaf.ndim:
        return placement
    wanted, size = next(iter(named.values())), mesh.size(axes)
    for dim in sorted(range(leaf.ndim), key=lambda dim: (dim - wanted) % leaf.ndim):
        if leaf.shape[dim] and leaf.shape[dim] % size == 0:
            because = "there is no dimension" if wanted >= leaf.ndim else f"{size} does not divide dimension"
            return replace(placement, axes=axes, dim=dim, note="" if dim == wanted else f"{because} {wanted}")
    return replace(placement, note=f"{size} divides no dimension")


def row(table: Table, path: str) -> Mapping[str, int]:
    """Returns {mesh axis: dimension} of the first row that fits a path, {} where none does."""
    return next((axes for pattern, axes in table if tree.match((pattern,), path)), {})


def _split_axes(named: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(axis for axis in AXES if axis in named and sizes[axis] > 1)


def _bytes(placement: Placement) -> int:
    return math.prod(placement.shape) * placement.dtype.itemsize


# Leaves.


def local(leaf: Tensor) -> Tensor:
    """Returns what this process has of a leaf: the tensor itself where it is no DTensor. It shares the memory."""
    return leaf.to_local() if hasattr(leaf, "to_local") else leaf


@torch.no_grad()
def shards(state: tree.Tree) -> tree.Tree:
    """Returns what this process has of every leaf of a tree; see `local`."""
    return tree.map(local, state)


def distribute(shard: Tensor, placement: Placement, mesh: Mesh) -> Tensor:
    """Returns the leaf whose part on this process is `shard`: a DTensor over its memory; itself on one process.

    So does a single number: torch would move a count that an optimizer keeps on the CPU to the mesh's device.
    """
    if mesh.devices is None or not placement.shape:
        return shard
    from torch.distributed.tensor import DTensor

    strides = torch.empty(placement.shape, device="meta").stride()
    return DTensor.from_local(
        shard, mesh.devices, placement.torch(), run_check=False, shape=torch.Size(placement.shape), stride=strides
    )


def read(
    placement: Placement,
    mesh: Mesh,
    rows: Callable[[int, int], Tensor],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Returns this process's part of a leaf [...], read by no more rows at a time than make up such a part, or `BLOCK`.

    Args:
      placement: of the leaf.
      mesh: the processes.
      rows: (first, last) to those rows of the whole leaf, in any type.
      device: of the result, which has the placement's type.
    """
    part = placement.local(mesh)
    out = torch.empty(placement.local_shape(mesh), dtype=placement.dtype, device=device)
    if not placement.shape:
        return out.copy_(rows(0, 1).reshape(()))
    first, last = part[0].start, part[0].stop
    share = max(1, math.prod(out.shape) // math.prod(placement.shape[1:]), BLOCK // math.prod(placement.shape[1:]))
    share = share if placement.dim else max(1, last - first)
    for start in range(first, last, share):
        stop = min(start + share, last)
        out[start - first : stop - first].copy_(rows(start, stop)[(slice(None), *part[1:])])
    return out


# The table as it came out.


def describe(placements: Mapping[str, Placement], mesh: Mesh) -> list[tuple[str, str, str, int]]:
    """Returns (leaf group, shape, placement, bytes per process), a group being the same leaf of every block.

    A group is named by a pattern that fits it, so that a row for it can be copied from here.
    """
    groups: dict[tuple, list[Placement]] = {}
    for path, placement in placements.items():
        name = _BLOCK_OF.sub(lambda found: f"{found[1]}.*{'_' if found[2] else '.'}", path)
        groups.setdefault((name, placement), []).append(placement)
    return [
        (
            name if len(members) == 1 else f"{name} (x{len(members)})",
            f"{str(placement.dtype).removeprefix('torch.')}{list(placement.shape)}",
            say(placement, mesh),
            sum(member.local_bytes(mesh) for member in members),
        )
        for (name, placement), members in groups.items()
    ]


def say(placement: Placement, mesh: Mesh) -> str:
    """Returns a placement in words: `dimension 0 over shard=4 x context=2`."""
    split = " x ".join(f"{axis}={mesh.sizes[axis]}" for axis in placement.axes)
    words = f"dimension {placement.dim} over {split}" if split else "repeated"
    return f"{words} ({placement.note})" if placement.note else words


def whole(leaves: Mapping[str, Tensor]) -> dict[str, Placement]:
    """Returns the placement of leaves that every process has whole."""
    return {path: Placement(tuple(leaf.shape), leaf.dtype) for path, leaf in leaves.items()}


def of_state(
    state: Mapping[str, Tensor], params: Mapping[str, Placement], grads: Mapping[str, Placement]
) -> dict[str, Placement]:
    """Returns the placement of every leaf of a train state {dotted path: tensor}, meta tensors too.

    Parameters and their average are placed as `params` say; what an optimizer keeps of a parameter's shape, or for each
    block of its last dimension, as `grads` say; the rest, such as counts of steps, is in every process.
    """
    found = {}
    for path, leaf in state.items():
        member, _, rest = path.partition(".")
        place = (
            params.get(rest) if member != "opt" else next((grads[name] for name in _named(rest) if name in grads), None)
        )
        shape = tuple(leaf.shape)
        fits = place is not None and _is_of(shape, place.shape)
        found[path] = replace(place, shape=shape, dtype=leaf.dtype) if fits else Placement(shape, leaf.dtype)
    return found


def _is_of(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Returns whether a shape is a leaf's, or that of a number for each block of the leaf's last dimension."""
    blocks = len(shape) == len(whole) > 1 and shape[:-1] == whole[:-1] and shape[-1] and whole[-1] % shape[-1] == 0
    return shape == whole or bool(blocks)


def spans(places: tree.Tree, mesh: Mesh) -> dict[str, Span]:
    """Returns {dotted path: `Placement.span`} of a tree of placements."""
    return {path: place.span(mesh) for path, place in tree.flatten(places).items()}


def _named(path: str) -> Iterator[str]:
    """Yields what in a path of an optimizer's state may be a parameter's: exp_avg.PATH, or state.PATH.exp_avg."""
    rest = path.partition(".")[2]
    yield rest
    yield rest.rpartition(".")[0]
