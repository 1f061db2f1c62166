import functools
import json

import pytest
import torch

from flux_func import plan_main, tree
from flux_func.models import autoencoder, text
from flux_func.parallel import placements
from flux_func.parallel.sharding import Sharding
from flux_func.plan import devices, encoding, predict
from flux_func.plan.meter import Send

H100 = devices.DEVICES["h100"]
TABLE = (("*", {"shard": 0, "context": 0}),)
KL, DCT = (autoencoder.AutoencoderConfig(kind=kind) for kind in ("kl", "dct"))


@pytest.fixture
def cfg(tmp_path):
    """Text encoders of four blocks, config.json alone."""
    small = dict(d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=4, vocab_size=512)
    clip = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=512)
    for part, form in (("text_encoder_2", plan_main.T5 | small), ("text_encoder", plan_main.CLIP | clip)):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(form))
    return text.TextConfig(kind="hf", path=str(tmp_path), max_length=8)


def split(cfg, shard):
    mesh = predict.Planned({"replicate": 1, "shard": shard, "context": 1})
    shapes = tree.flatten(text.abstract(cfg, torch.bfloat16).get("t5", {}))
    places = placements.resolve(TABLE, shapes, mesh, "parallel.text_encoder")
    return Sharding(mesh, tree.unflatten(places), device=torch.device("meta"))


def taken(cfg, shard=1, image=DCT, count=2):
    return list(encoding.steps(cfg, image, split(cfg, shard), count, 64, torch.bfloat16, H100))


def operations(steps):
    return sum(step.cost.operations for step in steps)


def test_t5_is_gathered_whole_once(cfg):
    sends = [event for step in taken(cfg, 4) for event in step.cost.events if isinstance(event, Send)]
    size = sum(leaf.nbytes for leaf in tree.leaves(text.abstract(cfg, torch.bfloat16)["t5"]))
    assert sum(event.sent for event in sends) == size * 3 / 4
    assert {(event.kind, event.group) for event in sends} == {("all_gather", "shard")}
    assert sum(step.cost.kept for step in taken(cfg, 4)) == 0


def test_computation_is_that_of_every_stage_and_of_clip(cfg):
    t5 = 4 * (4 * 64 * 64 + 3 * 64 * 128) * 2 * 8 * 2 + 4 * 4 * 8 * 8 * 64 * 2
    clip = 2 * (4 * 32 * 32 + 2 * 32 * 64) * 2 * 77 * 2 + 2 * 4 * 77 * 77 * 32 * 2
    pixels = operations(taken(text.TextConfig()))
    assert operations(taken(cfg)) == operations(taken(cfg, 4)) == t5 + clip + pixels


def test_the_autoencoder_grows_with_the_batch():
    alone = functools.partial(taken, text.TextConfig(), image=KL)
    assert operations(alone(count=4)) == 2 * operations(alone(count=2)) > 0
    assert operations(taken(text.TextConfig())) > 0  # the block transform, of pixels alone


def test_weights(cfg):
    found = encoding.weights(cfg, KL, split(cfg, 4), torch.bfloat16)
    shapes = text.abstract(cfg, torch.bfloat16)
    assert found["CLIP"] == sum(leaf.nbytes for leaf in tree.leaves(shapes["clip"]))
    assert found["T5"] == sum(leaf.nbytes for leaf in tree.leaves(shapes["t5"])) / 4
    assert encoding.weights(text.TextConfig(), DCT, split(text.TextConfig(), 4), torch.bfloat16) == {}
