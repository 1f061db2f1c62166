"""Counts what torch does: bytes that are alive, operations, seconds they would take, and what is sent to others.

Under torch's fake tensors too, so that what a machine would do is counted without the machine.
"""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from flux_func.parallel import collectives
from flux_func.plan.devices import Device

_COLLECTIVES = torch.ops._c10d_functional


def _cpu_attention(q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _cpu_attention_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


# torch counts the operations of flash attention on CUDA alone; fake tensors that are computed with are the CPU's.
_OPERATIONS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}
# Make a tensor without writing it.
_EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class Compute(NamedTuple):
    """Kernels one after the other."""

    seconds: float
    operations: float


class Send(NamedTuple):
    """A collective that starts: its number, what it is, the group's name, and the bytes that this process sends."""

    number: int
    kind: str
    group: str
    sent: float


class Wait(NamedTuple):
    """Until the collective of that number has ended."""

    number: int


@dataclass(frozen=True)
class Cost:
    """What something took.

    Attributes:
      kept: bytes alive after it, less those before.
      peak: the most that were alive in it, less those before.
      events: what was computed, sent and waited for, in order.
    """

    kept: int = 0
    peak: int = 0
    events: tuple = ()

    @property
    def operations(self) -> float:
        """Returns the floating-point operations."""
        return sum(event.operations for event in self.events if isinstance(event, Compute))

    @property
    def seconds(self) -> float:
        """Returns the time that computing takes."""
        return sum(event.seconds for event in self.events if isinstance(event, Compute))


class Meter(TorchDispatchMode):
    """While it is entered, counts; inside of a FakeTensorMode, if there is one.

    Attributes:
      live: bytes of the tensors made since it was entered that are still alive.
      peak: the most there were.
      events: what was computed, sent and waited for.
    """

    def __init__(self, device: Device | None = None):
        """Takes the device whose time is counted; None: no time is."""
        super().__init__()
        self.live = self.peak = 0
        self.events: list = []
        self._device = device
        self._known: dict[int, weakref.ref] = {}
        # What is in flight holds what it sends: the backends keep that until it has arrived.
        self._flying: dict[int, tuple[int, tuple]] = {}
        self._sent, self._before, self._numbers = {}, {}, 0

    def __enter__(self) -> "Meter":
        self._tally = collectives.tally()
        self._sent, self._before = self._tally.__enter__(), {}
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._tally.__exit__(*error)

    def cost(self, fn: Callable, *args: Any) -> tuple[Any, Cost]:
        """Returns fn(*args) and what it took."""
        before, highest, first = self.live, self.peak, len(self.events)
        self.peak = before
        out = fn(*args)
        peak, self.peak = self.peak - before, max(self.peak, highest)
        return out, Cost(self.live - before, peak, _joined(self.events[first:]))

    def drain(self) -> tuple:
        """Returns the events so far, and forgets them."""
        events = _joined(self.events)
        self.events.clear()
        return events

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func is _COLLECTIVES.wait_tensor.default:
            return self._wait(func, args[0])
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for leaf in given:
            self._adopt(leaf, outside=True)
        # Torch has no stand-in for the fused optimizers, which write in place and return nothing.
        fused = func._overloadpacket.__name__.startswith("_fused_") and _is_abstract(given[0])
        out = None if fused else func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        fresh = [leaf for leaf in made if self._adopt(leaf)]
        if func.namespace == "_c10d_functional":
            self._send(made[0], args)
        elif self._device is not None and (fresh or func._schema.is_mutable):
            self._compute(func, args, kwargs or {}, out, given, fresh)
        return out

    def _adopt(self, leaf: Tensor, outside: bool = False) -> bool:
        """Counts a tensor's memory, where it is new and not from outside."""
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        size = 0 if outside else storage.nbytes()
        self._known[key] = weakref.ref(storage, functools.partial(self._free, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)
        return True

    def _free(self, key: int, size: int, _: Any) -> None:
        del self._known[key]
        self.live -= size

    def _compute(self, func: Any, args: tuple, kwargs: dict, out: Any, given: list, fresh: list) -> None:
        packet = func._overloadpacket
        if packet.__name__ in _EMPTY:
            return
        count = _OPERATIONS.get(packet)
        operations = count(*args, **kwargs, out_val=out) if count else 0
        written = [arg for arg, spec in zip(args, func._schema.arguments, strict=False) if _is_written(spec)]
        read = sum(_bytes(leaf) for leaf in given)
        moved = read + sum(_bytes(leaf) for leaf in (*fresh, *tree_leaves(written)))
        dtype = given[0].dtype if given else torch.float32
        seconds = self._device.seconds(operations, moved, dtype, "attention" in packet.__name__)
        self.events.append(Compute(seconds, operations))

    def _send(self, out: Tensor, args: tuple) -> None:
        # What was counted since the last one is this one.
        before, self._before = self._before, dict(self._sent)
        for (kind, group), sent in self._before.items():
            if sent != before.get((kind, group), 0):
                number = self._numbers = self._numbers + 1
                self._flying[out.untyped_storage()._cdata] = (number, args)
                self.events.append(Send(number, kind, group, sent - before.get((kind, group), 0)))

    def _wait(self, func: Any, x: Tensor) -> Tensor:
        number, _ = self._flying.pop(x.untyped_storage()._cdata, (None, None))
        if number is not None:
            self.events.append(Wait(number))
        # Torch's stand-in for tensors without memory returns a copy, which no backend makes.
        return x if _is_abstract(x) else func(x)


def _is_abstract(x: Tensor) -> bool:
    return isinstance(x, FakeTensor) or x.is_meta


def _is_written(spec: Any) -> bool:
    return spec.alias_info is not None and spec.alias_info.is_write


def _bytes(leaf: Any) -> int:
    if not isinstance(leaf, Tensor):
        return 0
    return min(leaf.numel() * leaf.itemsize, leaf.untyped_storage().nbytes())


def _joined(events: list) -> tuple:
    """Returns events with what is computed in a row added up."""
    joined: list = []
    for event in events:
        if isinstance(event, Compute) and joined and isinstance(joined[-1], Compute):
            joined[-1] = Compute(joined[-1].seconds + event.seconds, joined[-1].operations + event.operations)
        else:
            joined.append(event)
    return tuple(joined)
