"""One of torch.optim's classes as functions of its state, which it keeps nothing of between two steps."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_func import tree
from flux_func.tree import Tree

# Shape, type and device.
Form = tuple[torch.Size, torch.dtype, Any]


class Stateless(NamedTuple):
    """A class of torch.optim and its arguments but the learning rate."""

    cls: type[torch.optim.Optimizer]
    options: Mapping[str, Any]

    def zeros(self, params: Tree) -> Tree:
        """Returns the parameters' tree, each leaf a dict of what the class keeps for it, in its shape and type.

        Raises:
          ValueError: it keeps something that is not a tensor.
        """
        known: dict[tuple, dict[str, Form]] = {}

        def kept(leaf: Tensor) -> dict[str, Tensor]:
            kind = (leaf.shape, leaf.dtype, leaf.device)
            if kind not in known:
                known[kind] = self._forms(leaf)
            of = known[kind].items()
            return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype, device) in of}

        return tree.map(kept, params)

    def step(
        self, leaves: Sequence[Tensor], grads: Sequence[Tensor], kept: Sequence[dict], rate: float, first: bool
    ) -> None:
        """Takes one step, in the leaves and in what is kept for each; the first makes that anew."""
        optimizer, aliases = self._build(leaves, grads, rate)
        if not first:
            optimizer.state.update({alias: dict(own) for own, alias in zip(kept, aliases, strict=True)})
        optimizer.step()
        for own, alias in zip(kept, aliases, strict=True):
            for name, value in own.items():
                if optimizer.state[alias][name] is not value:
                    value.copy_(optimizer.state[alias][name])

    def home(self, leaf: Tensor) -> Tensor:
        """Returns a tensor of the state where the class wants it: a count on the CPU, if no kernel reads it."""
        on_device = bool(self.options.get("capturable") or self.options.get("fused"))
        counts = leaf.ndim == 0 and not (on_device and leaf.is_floating_point())
        return leaf.cpu() if counts else leaf

    def _build(
        self, leaves: Sequence[Tensor], grads: Sequence[Tensor], rate: float
    ) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        # Aliases, so that neither .grad nor anything else is left on the caller's tensors.
        aliases = [leaf.detach() for leaf in leaves]
        for alias, grad in zip(aliases, grads, strict=True):
            alias.grad = grad
        return self.cls(aliases, lr=rate, **self.options), aliases

    def _forms(self, leaf: Tensor) -> dict[str, Form]:
        """Returns what the class keeps for such a leaf: a step on zeros shows it."""
        zeros = torch.zeros_like(leaf, device="cpu" if leaf.is_meta else None)
        optimizer, [alias] = self._build([zeros], [zeros.clone()], 1e-3)
        optimizer.step()
        kept = {name: value for name, value in optimizer.state[alias].items() if value is not None}
        for name, value in kept.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{self.cls.__name__} keeps {name} as {type(value).__name__}, which is not a tensor")
        return {name: (x.shape, x.dtype, "meta" if leaf.is_meta else x.device) for name, x in kept.items()}
