"""What each process of a mesh encodes with its part of T5."""

from typing import Any

import numpy as np
import torch

from flux_func import tree
from flux_func.models import flux, text
from flux_func.parallel import collectives, mesh, placements
from flux_func.train import encoders
from tests.helpers import tiny_run

# As wide as the encoders of `tiny_pipeline.build`.
CFG = flux.FluxConfig(48, 3, 1, 1, (4, 6, 6), context_in_dim=32, vec_in_dim=24)
CAPTIONS = ["a red bird", "", "Fruit: apples, pears!", "one two three"]


def config(folder: str, fields: dict[str, Any]) -> Any:
    """Returns a config whose text encoders are those in a folder."""
    return tiny_run.config({"text.kind": "hf", "text.path": folder, "text.max_length": 12, **fields})


Case = tuple[dict[str, int], dict[str, Any]]


def encodings(rank: int, folder: str, cases: list[Case]) -> list[tuple]:
    """Returns `encoded` in each case: the sizes of a mesh, and fields of the config."""
    return [encoded(rank, folder, *case) for case in cases]


def encoded(
    rank: int, folder: str, sizes: dict[str, int], fields: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, dict[str, int], dict[str, int]]:
    """Returns txt and y of rank + 1 captions, {leaf of T5: numbers kept}, and {leaf: most rows read at a time}."""
    kept, rows_read = {}, {}
    load, reader = text.load, text.t5_rows

    def watched_load(*args: Any) -> Any:
        params = load(*args)
        kept.update({path: leaf.numel() for path, leaf in tree.flatten(params["t5"]).items()})
        return params

    def watched_rows(*args: Any) -> Any:
        return {path: _counting(rows, path, rows_read) for path, rows in reader(*args).items()}

    text.load, text.t5_rows, placements.BLOCK = watched_load, watched_rows, 1
    made = mesh.build(sizes)
    codec = encoders.build(config(folder, fields), CFG, torch.device("cpu"), made)
    first = codec.encode_text(codec.tokenize(CAPTIONS[: rank + 1]))
    with collectives.tally() as counted:
        again = codec.encode_text(codec.tokenize(CAPTIONS[: rank + 1]))
    text.load, text.t5_rows = load, reader
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert bool(counted) == (sizes["shard"] * sizes["context"] > 1)
    txt, y = first
    return txt.float().numpy(), y.float().numpy(), kept, rows_read


def _counting(rows: text.Rows, path: str, most: dict[str, int]) -> text.Rows:
    def counted(first: int, last: int) -> torch.Tensor:
        most[path] = max(most.get(path, 0), last - first)
        return rows(first, last)

    return counted


def ahead(rank: int, folder: str, captions: list[list[str]]) -> np.ndarray:
    """Returns txt of each process's own captions, encoded ahead; some have fewer than others, or none."""
    made = mesh.build({"replicate": 1, "shard": -1, "context": 1})
    codec = encoders.build(config(folder, {}), CFG, torch.device("cpu"), made)
    known = encoders.ahead(codec, captions[rank], batch_size=2)
    return known.encode_text(known.tokenize(captions[rank]))[0].numpy() if captions[rank] else np.zeros(0)
