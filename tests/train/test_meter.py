import itertools

import pytest
import torch

from flux_func.models import flops, flux
from flux_func.parallel.sharding import Sharding
from flux_func.parallel.timeline import listening, phase
from flux_func.train import clock, meter, metrics
from flux_func.train import step as steps
from tests.helpers import rank_runs, ranks, tiny_run
from tests.helpers.hand_clock import Hands, set_by_hand
from tests.helpers.tiny_run import identical, losses, records, stored, train

TIMES = {"images_per_s", "tokens_per_s", "tflops", "mfu", "peak_memory_gib", "data_wait_s", "time_share"}


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Half of a tiny run's time is curves.png."""
    monkeypatch.setattr(metrics, "draw_curves", lambda records, path: None)


class Writer:
    """What the meter writes to: (step, record), or (step, None) where the bar goes on."""

    def __init__(self):
        self.said = []

    def write(self, step, record):
        self.said.append((step, record))

    def advance(self, step):
        self.said.append((step, None))


def work(**seconds):
    """Lets so many seconds pass in each phase."""
    for name, passed in seconds.items():
        with phase(name):
            Hands.now += passed


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_record_is_of_the_steps_since_the_last_one(device, monkeypatch):
    config = tiny_run.config({"metrics.peak_tflops": 1e-3})
    monkeypatch.setattr(metrics, "peak_memory_gib", lambda device: Hands.now)
    batches = iter([{"skipped": ["a: bad"] * count} for count in (0, 2, 0, 1)])
    with set_by_hand():
        writer, began = Writer(), Hands.now
        given = flux.flavor("flux-tiny"), Sharding(), torch.device(device), lambda step: step / 10
        made = meter.Meter(config, *given, writer, 5)
        with listening(made.listener):
            for step in (1, 2, 3, 4):
                work(data=1.0)
                made.next(batches)
                work(encode=0.5, compute=4.0, optimizer=2.0)
                Hands.now += 0.5
                out = {"loss": torch.tensor(step / 4), "grad_norm": torch.tensor(step / 2)}
                made.took(step, out, step == 1 or step == 4)
                with made.aside():
                    work(compute=100.0)
            made.flush()
            made.flush()
    assert [(step, record is None) for step, record in writer.said] == [(1, False), (2, True), (3, True), (4, False)]
    (_, first), *_, (_, last) = writer.said
    share = {"data": 1 / 8, "encode": 1 / 16, "compute": 1 / 2, "gather": 0, "reduce": 0, "optimizer": 1 / 4}
    for step, record, skipped in ((1, first, 5), (4, last, 8)):
        assert tuple(record) == metrics.TRAINING
        assert record["loss"] == step / 4 and record["grad_norm"] == step / 2 and record["lr"] == (step - 1) / 10
        # Two images in eight seconds; 4 tokens of each are the image's, and 4 the text's.
        assert record["images_per_s"] == pytest.approx(1 / 4) and record["tokens_per_s"] == pytest.approx(2)
        flop = flops.training_flops(flux.flavor("flux-tiny"), 4, 4)
        assert record["tflops"] == pytest.approx(flop / 4e12) and record["mfu"] == pytest.approx(flop / 4e9)
        assert record["data_wait_s"] == pytest.approx(1)
        assert record["time_share"] == pytest.approx({**share, "other": 1 / 16})
        assert record["samples_skipped"] == skipped
    # What a step had of memory, not what there is when it is written.
    assert last["peak_memory_gib"] - began == pytest.approx(4 * 8 + 3 * 100)


@pytest.fixture
def events(monkeypatch):
    """What happens, in order: a step that is taken, a record that is written, a checkpoint."""
    seen, taken, write = [], steps.train_step, metrics.Metrics.write

    def stepping(current, batch, step, **given):
        seen.append(f"step {step + 1}")
        return taken(current, batch, step, **given)

    def writing(self, step, values):
        seen.append(f"{'record' if 'loss' in values else 'validation'} {step}")
        write(self, step, values)

    monkeypatch.setattr(steps, "train_step", stepping)
    monkeypatch.setattr(metrics.Metrics, "write", writing)
    return seen


def test_a_cpus_records_are_written_at_once(tmp_path, events):
    train(tmp_path, {"train.steps": 3})
    assert events == ["step 1", "record 1", "step 2", "record 2", "step 3", "record 3"]


def test_a_gpus_records_are_written_while_the_next_step_is_computed(tmp_path, events, monkeypatch):
    monkeypatch.setattr(meter, "is_one_late", lambda device: True)
    fields = {"train.steps": 6, "log.every": 1, "validate.every": 3, "validate.samples": 2, "checkpoint.every": 5}
    train(tmp_path, fields)
    assert events == [
        *("step 1", "step 2", "record 1", "step 3", "record 2", "record 3", "validation 3"),
        *("step 4", "step 5", "record 4", "record 5", "step 6", "record 6", "validation 6"),
    ]  # fmt: skip


@pytest.mark.parametrize("every", [0, 1, 2])
def test_when_records_are_written_changes_nothing_in_them(tmp_path, monkeypatch, every):
    fields = {"train.steps": 5, "log.every": every, "validate.every": 3, "validate.samples": 2, "checkpoint.every": 2}
    found = {}
    for one_late in (False, True):
        monkeypatch.setattr(meter, "is_one_late", lambda device, late=one_late: late)
        folder, calls = tmp_path / str(one_late), itertools.count()
        train(folder, fields, stop=lambda calls=calls: "SIGTERM" * (next(calls) > 2))
        train(folder, fields)
        found[one_late] = records(folder, "step")
        assert identical(stored(folder, 5), stored(tmp_path / "False", 5))
    timeless = [[{k: v for k, v in r.items() if k not in TIMES} for r in found[late]] for late in (False, True)]
    assert timeless[0] == timeless[1] and len(timeless[0]) >= 3
    assert [list(record) for record in found[False]] == [list(record) for record in found[True]]


def test_the_shares_of_one_process_are_of_all_its_time_and_none_is_sent(tmp_path):
    for record in train(tmp_path, {"train.accumulate": 2, "ema.decay": 0.5}):
        share = record["time_share"]
        assert tuple(share) == (*clock.PHASES, clock.REST) and sum(share.values()) == pytest.approx(1)
        assert share["gather"] == share["reduce"] == 0
        assert all(share[name] > 0 for name in ("data", "encode", "compute", "optimizer", "other"))


def test_processes_wait_for_each_other_and_say_so(tmp_path):
    ranks.run(2, rank_runs.train, str(tmp_path), {"replicate": 1, "shard": 2, "context": 1}, {"train.steps": 2})
    for record in records(tmp_path):
        assert sum(record["time_share"].values()) == pytest.approx(1)
        assert all(share > 0 for share in record["time_share"].values())
    assert len(losses(records(tmp_path))) == 2
