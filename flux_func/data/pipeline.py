"""Positions to batches, by grain: every sample is a function of its position, so a run's data state is its step.

Position p is sample (p mod batch size) of step (p div batch size), over all ranks. In each epoch the samples are
permuted anew; one that cannot be used is replaced by the next in the position's own sequence.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

import grain
import ml_collections
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchDatasetIterator

from flux_func import random
from flux_func.data import captions, images, sources
from flux_func.data.images import Unusable
from flux_func.errors import UserError

MOST_TRIED = 256  # samples in a row that may be unusable before a run is stopped


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a sample depends on besides its position; picklable.

    Attributes:
      source: where images and captions come from.
      tokenize: captions to {"t5": int64 [B, L], "clip": int64 [B, K]}; picklable.
      seed: of every draw.
      path: data.path, for the error.
      size: pixels of a side.
      shuffle: each epoch in an order of its own; False: in the source's.
      random_crop: False: from the center.
      prompt_dropout: probability of an empty caption, for each text encoder.
      noise_shape: of the latents, (channels, H/8, W/8).
      posterior_noise: whether the autoencoder's posterior is drawn from.
    """

    source: sources.Source | sources.Stream
    tokenize: captions.Tokenize
    seed: int
    path: str
    size: int
    shuffle: bool
    random_crop: bool
    prompt_dropout: float
    noise_shape: tuple[int, int, int]
    posterior_noise: bool


def recipe(
    config: ml_collections.ConfigDict,
    source: sources.Source | sources.Stream,
    tokenize: captions.Tokenize,
    *,
    training: bool = True,
    latent_channels: int = 16,
    posterior_noise: bool = False,
) -> Recipe:
    """Returns the recipe of a config; for arguments see `batches`."""
    data, side = config.data, config.data.image_size // 8
    return Recipe(
        source=source,
        tokenize=tokenize,
        seed=config.train.seed,
        path=data.path,
        size=data.image_size,
        shuffle=training,
        random_crop=training and data.crop == "random",
        prompt_dropout=data.prompt_dropout if training else 0.0,
        noise_shape=(latent_channels, side, side),
        posterior_noise=posterior_noise,
    )


def sample(recipe: Recipe, position: int) -> dict[str, Any]:
    """Returns the sample at a position of a source read by index.

    Returns:
      {"image": float32 [3, H, W] in [-1, 1], "t5_tokens": int64 [L], "clip_tokens": int64 [K],
      "noise": standard normal float32 [C, H/8, W/8], "latent_noise": another such (with posterior_noise alone),
      "uniform": float64 in [0, 1), to draw the timestep from, "position": int64, "caption": str before dropout,
      "skipped": "name: reason" of each unusable sample that was replaced}.

    Raises:
      UserError: the first `MOST_TRIED` candidates, or all there are, are unusable.
    """
    source = recipe.source
    tries = ((source.name(i), functools.partial(source.__getitem__, i)) for i in candidates(recipe, position))
    return _first_usable(recipe, position, tries)


def candidates(recipe: Recipe, position: int) -> Iterator[int]:
    """Yields the indices that a position may take its sample from, the first usable one counting, none twice."""
    count = len(recipe.source)
    epoch, first = divmod(position, count)
    if recipe.shuffle:
        first = sources.shuffled(first, count, recipe.seed, "shuffle", epoch)
    yield first
    for attempt in range(min(count, MOST_TRIED) - 1):
        other = sources.shuffled(attempt, count - 1, recipe.seed, "replacement", position)
        yield other + (other >= first)


def _first_usable(recipe: Recipe, position: int, tries: Iterable[tuple[str, Callable]]) -> dict[str, Any]:
    """Returns `sample` of the first of (name, function that reads it) that can be read and is large enough."""
    seed, skipped = recipe.seed, []
    along = random.uniform(seed, "crop", position) if recipe.random_crop else 0.5
    for name, read in itertools.islice(tries, MOST_TRIED):
        try:
            picture, caption = read()
            image = images.square(picture, recipe.size, along)
            break
        except Unusable as reason:
            # A file's name may hold bytes that are no UTF-8; logs must not fail on them.
            skipped.append(f"{name}: {reason}".encode(errors="backslashreplace").decode())
    else:
        tried = f"every sample is unusable ({len(skipped)} tried), such as {skipped[0]}"
        raise UserError(f"data.path is {recipe.path!r}: {tried}")
    dropped = captions.drop(caption, seed, position, recipe.prompt_dropout)
    t5_tokens, clip_tokens = captions.tokens(recipe.tokenize, *dropped)
    out = {
        "image": image,
        "t5_tokens": t5_tokens,
        "clip_tokens": clip_tokens,
        "noise": random.normal(seed, "noise", position, recipe.noise_shape),
        "uniform": np.float64(random.uniform(seed, "timestep", position)),
        "position": np.int64(position),
        "caption": caption,
        "skipped": skipped,
    }
    if recipe.posterior_noise:
        out["latent_noise"] = random.normal(seed, "latent", position, recipe.noise_shape)
    return out


@dataclasses.dataclass(frozen=True)
class Positions:
    """The positions of one rank, in the order in which grain is to be given them.

    grain deals single elements out to its worker processes in turn, and each process batches what it has got. So that
    the batches are the same for any number of processes, whole batches are dealt out: to `workers` processes,
    elements 0, workers, 2 * workers, ... are the first process's, hence one batch after another of those it is due.

    Attributes:
      batch_size: over all ranks.
      rank, world: this rank, of how many.
      start_step: whose first position is the first.
      limit: positions end before this one; None: they do not end. With one worker alone.
      workers: processes, at least 1.
    """

    batch_size: int
    rank: int = 0
    world: int = 1
    start_step: int = 0
    limit: int | None = None
    workers: int = 1

    @property
    def share(self) -> int:
        """Samples in each batch of this rank."""
        return self.batch_size // self.world

    def __len__(self) -> int:
        if self.limit is None:
            return 1 << 62
        steps, rest = divmod(self.limit, self.batch_size)
        last = min(max(rest - self.rank * self.share, 0), self.share)
        return max((steps - self.start_step) * self.share + last, 0)

    def __getitem__(self, element: int) -> int:
        dealt, worker = divmod(element, self.workers)
        turn, index = divmod(dealt, self.share)
        step = self.start_step + turn * self.workers + worker
        return step * self.batch_size + self.rank * self.share + index


def batches(
    config: ml_collections.ConfigDict,
    source: sources.Source | sources.Stream,
    tokenize: captions.Tokenize,
    *,
    batch_size: int,
    start_step: int = 0,
    training: bool = True,
    limit: int | None = None,
    latent_channels: int = 16,
    posterior_noise: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Iterator[dict[str, Any]]:
    """Returns an iterator of batches; its `close()` ends the threads and processes that it reads by.

    Args:
      config: of the run.
      source: as `sources.build` returns it.
      tokenize: captions to {"t5": int64 [B, L], "clip": int64 [B, K]}; picklable.
      batch_size: over all ranks; a multiple of `world`.
      start_step: the step that the first batch is for.
      training: shuffled, cropped as data.crop says, prompts dropped, and read by data.workers processes. False: in
        the source's order, cropped from the center, each with its caption, and read by threads.
      limit: positions in all, the last batch being as small as that makes it; None: without end. Only where
        `training` is False or data.workers is 0.
      latent_channels: of the noise.
      posterior_noise: whether "latent_noise" is drawn too.
      rank, world: which part of each batch is this process's, of how many equal ones.

    Returns:
      An iterator of dicts with the keys of `sample`, arrays stacked on a first axis, captions a list, and skipped one
      list of the whole batch.
    """
    if batch_size % world:
        raise ValueError(f"batch_size is {batch_size}: should be a multiple of the number of ranks, {world}")
    workers = config.data.workers if training else 0
    if limit is not None and workers:
        raise ValueError("limit is for reading by threads: training False, or no data.workers")
    noise = {"latent_channels": latent_channels, "posterior_noise": posterior_noise}
    made = recipe(config, source, tokenize, training=training, **noise)
    positions = Positions(batch_size, rank, world, start_step, limit, max(workers, 1))
    if hasattr(source, "__len__"):
        if workers and not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # outside of absl's programs: grain looks into its own flags
        return _closing(iter(_dataset(made, positions, workers)), workers)
    stream = _StreamBatches(_read_stream(made, positions))
    return _closing(ThreadPrefetchDatasetIterator(stream, prefetch_buffer_size=2))


def stack(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the batch of some samples; see `batches`."""
    batch = {key: [each[key] for each in samples] for key in samples[0]}
    batch["skipped"] = list(itertools.chain(*batch["skipped"]))
    return {key: values if key in ("caption", "skipped") else np.stack(values) for key, values in batch.items()}


def _dataset(recipe: Recipe, positions: Positions, workers: int) -> grain.IterDataset:
    threads = min(8, max(1, (os.cpu_count() or 1) // max(1, workers)))
    if workers:
        _start_tracker()
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, positions.share))
    samples = grain.MapDataset.source(positions).map(functools.partial(sample, recipe))
    dataset = samples.to_iter_dataset(options).batch(positions.share, batch_fn=stack)
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_init_worker)


def _start_tracker() -> None:
    """Starts multiprocessing's resource tracker, told to be quiet about what it is for.

    A worker that grain ends may have a batch in shared memory that nobody has taken yet; the tracker removes it, and
    would print a warning after the program's last line.
    """
    quiet = "ignore:resource_tracker"
    sys.warnoptions.append(quiet)
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(quiet)


def _init_worker(index: int, count: int) -> None:
    """Makes a worker process outlive its parent's signals, and never its parent."""
    del index, count
    # Signals often go to a whole process group. The parent then saves a checkpoint and ends its workers itself;
    # the alarm is for one that it lost sight of.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(120))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _read_stream(recipe: Recipe, positions: Positions) -> Iterator[dict[str, Any]]:
    """Yields batches of a stream, from the row on that a run without unusable rows would have come to."""
    first = positions.start_step * positions.batch_size + positions.rank
    rows = itertools.islice(enumerate(recipe.source), first, None, positions.world)
    tries = ((f"row {i}", functools.partial(recipe.source.read, row)) for i, row in rows)
    samples = (_first_usable(recipe, positions[i], tries) for i in range(len(positions)))
    while some := list(itertools.islice(samples, positions.share)):
        yield stack(some)


class _StreamBatches:
    """An iterator as grain's prefetching wants it; a stream has no state that one could go back to."""

    def __init__(self, batches: Iterator[dict[str, Any]]):
        self._batches = batches

    def __next__(self) -> dict[str, Any]:
        return next(self._batches)

    def get_state(self) -> dict:
        return {}


def _closing(iterator: grain.DatasetIterator, workers: int = 0) -> Iterator[dict[str, Any]]:
    try:
        for batch in iterator:
            yield {key: _own(value) for key, value in batch.items()}
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        # Worker processes are killed where memory runs out, or the room in /dev/shm that batches are passed through.
        remedy = "should be smaller, or the machine's memory or /dev/shm larger"
        raise UserError(f"data.workers is {workers}: {remedy}: {error}") from error
    finally:
        iterator.close()


def _own(value: Any) -> Any:
    """Returns an array in shared memory as a plain copy, which may outlive the iterator and the program's end."""
    return np.array(value) if isinstance(value, grain.multiprocessing.SharedMemoryArray) else value
