"""One side of a measurement, in a process of its own: it gets ready, and then takes a step whenever it is told to.

    PYTHON flux_func/bench/serve.py bfl|diffusers|torchtitan REQUEST.json

A program by itself, which imports nothing of flux_func but parity/references, so that PYTHON may be that of any
environment that has torch, safetensors and the reference; `ours.py` serves by it too. A line that it reads is a step;
it answers each, and being ready, by a line of JSON.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TextIO

import torch
from safetensors import safe_open
from torch import Tensor

Tensors = dict[str, Tensor]
REFERENCES = Path(__file__).parents[1] / "parity" / "references"


class Work(NamedTuple):
    """What is measured.

    Attributes:
      step: does it once, and returns a number that is the same for all sides: the loss, of a sample its mean square.
      kept: the tensors that outlast a step: weights and moments.
    """

    step: Callable[[], Tensor]
    kept: Callable[[], Iterable[Tensor]]


def serve(make: Callable[[dict, Tensors, Tensors], Work], distribution: str, path: Path, replies: TextIO) -> None:
    """Takes a step for every line that it reads.

    Args:
      make: (request, weights, inputs) to what is measured.
      distribution: whose version is told beside torch's.
      path: of the request, which `cases.ask` writes.
      replies: where answers go.
    """

    def reply(**answer: Any) -> None:
        print(json.dumps(answer), file=replies, flush=True)

    request = json.loads(path.read_text())
    device = request["device"]
    reset_peak(device)
    imported = peak_bytes(device)
    work = make(request, load(request["weights"], device), load(request["inputs"], device))
    reply(about=about(distribution, device), imported_bytes=imported)
    for _ in sys.stdin:
        reset_peak(device)
        seconds, loss = timed(work.step, device)
        kept = sum(tensor.nbytes for tensor in work.kept())
        reply(seconds=seconds, loss=loss, peak_bytes=peak_bytes(device), kept_bytes=kept)


def timed(step: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """Returns (seconds, loss) of a step, to the end of what it started on the device."""
    synchronize(device)
    start = time.perf_counter()
    loss = step()
    synchronize(device)
    return time.perf_counter() - start, float(loss)


def synchronize(device: str) -> None:
    """Waits for all that the device has been given."""
    if device == "cuda":
        torch.cuda.synchronize()


def load(path: str, device: str) -> Tensors:
    """Returns a file's tensors in memory of their own: as parts of the file, updates would copy them page by page."""
    with safe_open(path, framework="pt", device=device) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)


def reset_peak(device: str) -> None:
    """Lets the peak of memory count from what there is now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    # Linux alone can; elsewhere, or where it is forbidden, all since the start counts.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Returns the most memory since `reset_peak`: allocated on the GPU, or resident in the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def about(distribution: str, device: str) -> dict[str, Any]:
    """Returns what computes."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # as where it is run from a checkout
        versions[distribution] = importlib.metadata.version(distribution)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"versions": versions, "threads": torch.get_num_threads(), "device": name}


def claim_stdout() -> TextIO:
    """Returns what answers go to; whatever else is printed, by libraries too, goes where errors do."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


# The references.


def theirs(reference: ModuleType, question: Callable, request: dict, weights: Tensors, inputs: Tensors) -> Work:
    """Returns a reference's own model at work; what goes into it is made ready here, outside of its steps."""
    with torch.device("meta"):
        model = reference.transformer(request["model"])
    model.load_state_dict(weights, strict=True, assign=True)
    if request["compile"]:
        for block in [block for kind in reference.blocks(model) for block in kind]:
            block.compile()
    narrow = torch.autocast(request["device"], dtype=torch.bfloat16, enabled=request["dtype"] == "bfloat16")
    if request["work"] == "sample":

        def sample() -> Tensor:
            with torch.no_grad(), narrow:
                return reference.sample(model, inputs, request["sampler"]).float().square().mean()

        return Work(sample, model.parameters)
    given, target = question(reference, inputs)

    def loss() -> Tensor:
        with narrow:
            return (reference.velocity(model, given) - target).square().mean()

    if request["work"] == "forward":
        return Work(torch.no_grad()(loss), model.parameters)
    return _training(model, loss, request["optimizer"])


def _training(model: torch.nn.Module, loss: Callable[[], Tensor], settings: dict) -> Work:
    clip_norm = settings["clip_norm"]
    options = {name: value for name, value in settings.items() if name != "clip_norm"}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **options)

    def step() -> Tensor:
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    def kept() -> Iterable[Tensor]:
        moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
        return [*model.parameters(), *moments]

    return Work(step, kept)


def main(name: str, path: Path) -> None:
    """Serves a reference."""
    replies = claim_stdout()
    sys.path.insert(0, str(REFERENCES))
    reference, question = importlib.import_module(f"with_{name}"), importlib.import_module("answer").question
    serve(functools.partial(theirs, reference, question), reference.DISTRIBUTION, path, replies)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
