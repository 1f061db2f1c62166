"""A run's steps, timed, and the records that are written of them."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_collections
import torch
from torch import Tensor

from flux_func.launch import processes
from flux_func.models import flops, flux
from flux_func.parallel.sharding import Sharding
from flux_func.parallel.timeline import phase
from flux_func.train import adapt, clock, metrics, transfer


@dataclass
class _Taken:
    """A step that was launched, and is perhaps not done yet."""

    step: int
    out: dict[str, Tensor]  # on its way to the host
    lap: clock.Lap
    memory: float
    replaced: int
    write: bool


class Meter:
    """Times steps, and writes their records: on a GPU each while the next step is computed, so that it never waits.

    Every process has one, and calls its methods when the others do.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        cfg: flux.FluxConfig,
        sharding: Sharding,
        device: torch.device,
        schedule: Callable[[int], float],
        writer: metrics.Metrics,
        replaced: int,
    ):
        """Counts replaced samples on from `replaced`; the rest stays the same through a run."""
        self._config, self._cfg, self._sharding, self._device = config, cfg, sharding, device
        self._schedule, self._writer = schedule, writer
        self._replaced, self._found = replaced, 0
        self._clock, self._one_late = clock.Clock(device), is_one_late(device)
        self._last: _Taken | None = None
        self._steps, self._spent = 0, dict.fromkeys((*clock.PHASES, clock.REST), 0.0)

    @property
    def listener(self) -> Callable[[str], contextlib.AbstractContextManager]:
        """What is to be told of phases."""
        return self._clock.phase

    def next(self, data: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """Returns the next batch."""
        with phase("data"):
            batch = next(data)
        self._found += len(batch["skipped"])
        return batch

    def took(self, step: int, out: dict[str, Tensor], write: bool) -> None:
        """Is told of a step that has been launched, and whether a record is due; writes that of the step before."""
        on_its_way = {name: transfer.to_host(value) for name, value in out.items()}
        memory = metrics.peak_memory_gib(self._device)
        taken = _Taken(step, on_its_way, self._clock.lap(), memory, self._found, write)
        self.flush()
        self._last = taken
        if not self._one_late:
            self.flush()

    def flush(self) -> None:
        """Waits for the last step, and writes its record if that is due."""
        taken, self._last = self._last, None
        if taken is None:
            return
        for name, seconds in clock.spent(taken.lap).items():
            self._spent[name] += seconds
        self._steps += 1
        if not taken.write:
            self._writer.advance(taken.step)
            return
        self._writer.write(taken.step, self._record(taken))
        self._steps, self._spent = 0, dict.fromkeys(self._spent, 0.0)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is done between steps, and is not to count as theirs."""
        yield
        self._clock.start()

    def _record(self, taken: _Taken) -> dict[str, Any]:
        """Returns the record of the steps since the last one, `metrics.TRAINING`."""
        config = self._config
        image_tokens, text_tokens = (config.data.image_size // 16) ** 2, config.text.max_length
        speed = self._steps * config.train.batch_size / sum(self._spent.values())
        each = flops.training_flops(self._cfg, image_tokens, text_tokens) * adapt.share_of_flops(config)
        tflops = speed * each / 1e12 / processes.world()
        spent, memory, found = zip(*processes.gather((self._spent, taken.memory, taken.replaced)), strict=True)
        # Processes that share a sequence read the same samples.
        repeats = processes.world() // self._sharding.mesh.size(self._sharding.batch_axes)
        peak, total = config.metrics.peak_tflops, sum(sum(each.values()) for each in spent)
        return {
            "loss": float(taken.out["loss"]),
            "grad_norm": float(taken.out["grad_norm"]),
            "lr": self._schedule(taken.step - 1),
            "images_per_s": speed,
            "tokens_per_s": speed * (image_tokens + text_tokens),
            "tflops": tflops,
            "mfu": tflops / peak if peak else None,
            "peak_memory_gib": max(memory),
            "data_wait_s": max(each["data"] for each in spent) / self._steps,
            "time_share": {name: sum(each[name] for each in spent) / total for name in self._spent},
            "samples_skipped": self._replaced + sum(found) // repeats,
        }


def is_one_late(device: torch.device) -> bool:
    """Returns whether records are written while the next step is computed: a CPU's step is done when it returns."""
    return device.type == "cuda"
