"""Collective operations between the processes of a group.

Torch's functional collectives underneath: they return new tensors, can be traced, and run on any backend. A group that
is None is one process alone.

`start_*` and `wait` are for those who overlap them with computation, without derivatives. The others wait. They are
linear in what all processes give together, so the vjp of each applies its transpose, which is one of them again, and
its jvp itself: derivatives of any order, by torch.func in eager mode and by torch.autograd inside torch.compile. As
with all of torch.distributed, every process of the group makes the same calls in the same order.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
_OPS = torch.ops._c10d_functional


# In flight: each returns at once, its result to be used after `wait`.


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the x [k, ...] of every process one after the other, [n * k, ...]."""
    return _start_all_gather(x, Members.of(group))


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns this process's part [k, ...] of the sum of every process's x [n * k, ...]."""
    return _start_reduce_scatter(x, Members.of(group))


def start_all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the sum of every process's x."""
    return _start_all_reduce(x, Members.of(group))


def wait(x: Tensor) -> Tensor:
    """Returns x once it is there."""
    return _OPS.wait_tensor(x)


# Differentiable.


def all_gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """Returns every process's x joined along `dim`. Its transpose is `reduce_scatter`."""
    return x if group is None else _apply(x, _AllGather(Members.of(group), dim % x.ndim))


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """Returns this process's part along `dim` of the sum of every process's x. Its transpose is `all_gather`.

    Raises:
      ValueError: the dimension does not divide by the number of processes.
    """
    if group is None:
        return x
    _check_divides(x, dim, group.size())
    return _apply(x, _ReduceScatter(Members.of(group), dim % x.ndim))


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Returns the sum of every process's x. It is its own transpose."""
    return x if group is None else _apply(x, _AllReduce(Members.of(group)))


def all_to_all(x: Tensor, split_dim: int, concat_dim: int, group: Group, among: int | None = None) -> Tensor:
    """Cuts x in equal parts along one dimension, sends each process its part, and joins what comes along another.

    Its transpose is itself with the dimensions exchanged, which is its inverse too.

    Args:
      x: the same shape on every process.
      split_dim: cut into as many parts as there are processes.
      concat_dim: along which the parts that come are joined, in the order of the processes.
      group: the processes.
      among: so many neighbours exchange between each other alone; None: all of the group.

    Raises:
      ValueError: the dimension does not divide by the number of processes.
    """
    if group is None:
        return x
    among = among or group.size()
    _check_divides(x, split_dim, among)
    return _apply(x, _AllToAll(Members.of(group), split_dim % x.ndim, concat_dim % x.ndim, among))


def ring_permute(x: Tensor, shift: int, group: Group) -> Tensor:
    """Returns the x of the process `shift` places before this one, round the end. Its transpose shifts back."""
    return x if group is None else _apply(x, _RingPermute(Members.of(group), shift))


def _check_divides(x: Tensor, dim: int, size: int) -> None:
    if x.shape[dim] % size:
        raise ValueError(f"dimension {dim} of {list(x.shape)} does not divide by the {size} processes")


# What was sent.

_tallies: list[Counter] = []


@contextlib.contextmanager
def tally() -> Iterator[Counter]:
    """Counts the bytes that this process sends while it is open, as algorithms on a ring send them.

    Returns:
      {(kind, name of the group): bytes}, the kinds being "all_gather", "reduce_scatter", "all_reduce", "all_to_all"
      and "permute". Fake tensors count as real ones do; inside torch.compile it is the tracing that counts.
    """
    counted: Counter = Counter()
    _tallies.append(counted)
    try:
        yield counted
    finally:
        _tallies[:] = [other for other in _tallies if other is not counted]


def _count(kind: str, members: "Members", x: Tensor, times: int, parts: int = 1) -> None:
    for counted in _tallies:
        counted[kind, members.name] += x.nbytes * times / parts


# Torch's operations.


@dataclass(frozen=True)
class Members:
    """A process group in plain numbers, which torch.compile and autograd.Function take as constants.

    Attributes:
      name: torch's name of the group.
      size: processes in it.
      rank: this one's place among them.
    """

    name: str
    size: int
    rank: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "Members":
        return cls(group.group_name, group.size(), group.rank())


def _start_all_gather(x: Tensor, members: Members) -> Tensor:
    _count("all_gather", members, x, members.size - 1)
    return _OPS.all_gather_into_tensor(x.contiguous(), members.size, members.name)


def _start_reduce_scatter(x: Tensor, members: Members) -> Tensor:
    _count("reduce_scatter", members, x, members.size - 1, members.size)
    return _OPS.reduce_scatter_tensor(x.contiguous(), "sum", members.size, members.name)


def _start_all_reduce(x: Tensor, members: Members) -> Tensor:
    _count("all_reduce", members, x, 2 * (members.size - 1), members.size)
    return _OPS.all_reduce(x.contiguous(), "sum", members.name)


def start_exchange(x: Tensor, members: Members, among: int) -> Tensor:
    """Returns row i of x [among, ...] of each of `among` neighbours, i being this one's place; in flight."""
    first = members.rank - members.rank % among
    rows = [int(first <= rank < first + among) for rank in range(members.size)]
    _count("all_to_all", members, x, among - 1, among)
    return _OPS.all_to_all_single(x.contiguous(), rows, rows, members.name)


def start_permute(x: Tensor, shift: int, members: Members) -> Tensor:
    """Returns the x [k, ...] of the process `shift` places before this one, round the end; in flight."""
    to, of = (members.rank + shift) % members.size, (members.rank - shift) % members.size
    sent, got = ([x.shape[0] if rank == place else 0 for rank in range(members.size)] for place in (to, of))
    _count("permute", members, x, int(to != members.rank))
    # There is no functional send and receive; an all-to-all whose other parts are empty is the same.
    return _OPS.all_to_all_single(x.contiguous(), got, sent, members.name)


# Linear operations: each is a function of a tensor, knows its transpose, and itself with one more dimension in front.


@dataclass(frozen=True)
class _AllGather:
    members: Members
    dim: int

    def __call__(self, x: Tensor) -> Tensor:
        parts = wait(_start_all_gather(x[None], self.members))
        return parts.movedim(0, self.dim).flatten(self.dim, self.dim + 1)

    def transpose(self) -> "_ReduceScatter":
        return _ReduceScatter(self.members, self.dim)

    def batched(self) -> "_AllGather":
        return replace(self, dim=self.dim + 1)


@dataclass(frozen=True)
class _ReduceScatter:
    members: Members
    dim: int

    def __call__(self, x: Tensor) -> Tensor:
        parts = x.unflatten(self.dim, (self.members.size, -1)).movedim(self.dim, 0)
        return wait(_start_reduce_scatter(parts, self.members)).squeeze(0)

    def transpose(self) -> "_AllGather":
        return _AllGather(self.members, self.dim)

    def batched(self) -> "_ReduceScatter":
        return replace(self, dim=self.dim + 1)


@dataclass(frozen=True)
class _AllReduce:
    members: Members

    def __call__(self, x: Tensor) -> Tensor:
        return wait(_start_all_reduce(x, self.members))

    def transpose(self) -> "_AllReduce":
        return self

    def batched(self) -> "_AllReduce":
        return self


@dataclass(frozen=True)
class _AllToAll:
    members: Members
    split_dim: int
    concat_dim: int
    among: int

    def __call__(self, x: Tensor) -> Tensor:
        parts = x.unflatten(self.split_dim, (self.among, -1)).movedim(self.split_dim, 0)
        parts = wait(start_exchange(parts, self.members, self.among))
        return parts.movedim(0, self.concat_dim).flatten(self.concat_dim, self.concat_dim + 1)

    def transpose(self) -> "_AllToAll":
        return replace(self, split_dim=self.concat_dim, concat_dim=self.split_dim)

    def batched(self) -> "_AllToAll":
        return replace(self, split_dim=self.split_dim + 1, concat_dim=self.concat_dim + 1)


@dataclass(frozen=True)
class _RingPermute:
    members: Members
    shift: int

    def __call__(self, x: Tensor) -> Tensor:
        return wait(start_permute(x[None], self.shift, self.members)).squeeze(0)

    def transpose(self) -> "_RingPermute":
        return replace(self, shift=-self.shift)

    def batched(self) -> "_RingPermute":
        return self


class _Linear(torch.autograd.Function):
    """A linear operation; its derivatives are operations of the same kind, so those have derivatives too."""

    @staticmethod
    def forward(x: Tensor, operation: Any) -> Tensor:
        return operation(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.operation = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _apply(grad, ctx.operation.transpose()), None


class _LinearEverywhere(_Linear):
    """With forward mode and vmap, whose mere presence torch.compile refuses."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _apply(tangent, ctx.operation)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, operation: Any) -> tuple[Tensor, int]:
        return _apply(x.movedim(in_dims[0], 0), operation.batched()), 0


def _apply(x: Tensor, operation: Any) -> Tensor:
    return (_Linear if torch.compiler.is_compiling() else _LinearEverywhere).apply(x, operation)
