"""Hugging Face data sets written on the spot: by row, as streams, and what they may lack."""

import dataclasses
import itertools
import pickle

import numpy as np
import pytest

from flux_func.data import pipeline, sources
from flux_func.data.images import Unusable
from flux_func.errors import UserError
from tests.helpers import tiny_data
from tests.helpers.tiny_data import encoded, picture, tokenize

datasets = pytest.importorskip("datasets")


def table(indices, image="image", text="caption"):
    """Returns a Dataset whose row i is `picture(i)` and "caption i"."""
    columns = {image: [{"bytes": encoded(picture(i)), "path": None} for i in indices]}
    columns[text] = [f"caption {i}" for i in indices]
    features = datasets.Features({image: datasets.Image(), text: datasets.Value("string")})
    return datasets.Dataset.from_dict(columns, features=features)


def settings(path, **data):
    return tiny_data.settings(source="hf", path=str(path), validation_fraction=0.25, **data)


def captions_of(source):
    return [source[i][1] for i in range(len(source))]


def test_rows(tmp_path):
    table(range(12)).save_to_disk(tmp_path)
    parts = [sources.build(settings(tmp_path), split) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [9, 3]
    assert sorted(captions_of(parts[0]) + captions_of(parts[1])) == sorted(f"caption {i}" for i in range(12))
    rows = pickle.loads(pickle.dumps(parts[0])).source
    for i in range(12):
        image, caption = rows[i]
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(i)))
        assert (rows.name(i), caption) == (f"row {i}", f"caption {i}")


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_its_own(tmp_path, streaming):
    splits = {"train": table(range(5)), "validation": table(range(5, 8)), "test": table([9])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    config = settings(tmp_path, streaming=streaming)
    for split, indices in (("train", range(5)), ("validation", range(5, 8))):
        source = sources.build(config, split)
        rows = itertools.islice(source, len(indices)) if streaming else ()
        seen = [source.read(row)[1] for row in rows] if streaming else captions_of(source)
        assert seen == [f"caption {i}" for i in indices]


def test_one_split_is_divided(tmp_path):
    datasets.DatasetDict({"train": table(range(8)), "test": table([9])}).save_to_disk(tmp_path)
    parts = [sources.build(settings(tmp_path), split) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [6, 2]


def test_other_columns(tmp_path):
    columns = {
        "jpg": [encoded(picture(0)), str(tmp_path / "a.png"), {"bytes": None, "path": str(tmp_path / "a.png")}],
        "texts": [["first", "second"], "only", ""],
    }
    (tmp_path / "a.png").write_bytes(encoded(picture(1)))
    for i, (image, text) in enumerate(zip(*columns.values(), strict=True)):
        row = {"jpg": image, "texts": text}
        source = sources.hub.Rows([row], "jpg", "texts")
        if i == 2:
            with pytest.raises(Unusable, match="empty"):
                source[0]
            continue
        got, caption = source[0]
        np.testing.assert_array_equal(np.asarray(got), np.asarray(picture(i)))
        assert caption == ["first", "only"][i]


@pytest.mark.parametrize("value", [None, 3, {"bytes": None, "path": None}, "/nowhere/at/all.png", b"broken"])
def test_unusable_images(value):
    with pytest.raises(Unusable):
        sources.hub.Rows([{"image": value, "caption": "x"}], "image", "caption")[0]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("field", "wrong", "near"), [("image_key", "imgae", "image"), ("caption_key", "cap", "caption")]
)
def test_unknown_columns(tmp_path, streaming, field, wrong, near):
    table(range(4)).save_to_disk(tmp_path)
    config = settings(tmp_path, streaming=streaming, **{field: wrong})
    with pytest.raises(UserError, match=f"^data.{field} is '{wrong}': did you mean '{near}'"):
        sources.build(config, "train")


def test_paths_that_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match="data.path is .*cannot be loaded .*should be a folder written by save_to_disk"):
        sources.build(settings(tmp_path / "none"), "train")
    datasets.DatasetDict({"test": table([0])}).save_to_disk(tmp_path / "split")
    with pytest.raises(UserError, match="has the splits test: should have one named train"):
        sources.build(settings(tmp_path / "split"), "train")


def test_a_stream_that_breaks_off_is_said(tmp_path, monkeypatch):
    table(range(4)).save_to_disk(tmp_path)
    source = sources.build(settings(tmp_path, streaming=True), "train")

    class Broken:
        """One row, and then no network; at once, where it does not say what columns it has."""

        column_names, features = None, None

        def __init__(self, rows):
            self._rows = rows

        def __iter__(self):
            yield from self._rows
            raise ConnectionError("no network")

    with pytest.raises(UserError, match=r"data.path is .*: its stream broke off \(no network\): start again"):
        list(dataclasses.replace(source, table=Broken(itertools.islice(source.table, 1))))
    monkeypatch.setattr(datasets.Dataset, "to_iterable_dataset", lambda self: Broken([]))
    with pytest.raises(UserError, match=r"data.path is .*: cannot be loaded \(no network\): should be a folder"):
        sources.build(settings(tmp_path, streaming=True), "train")


def test_streams_need_no_workers(tmp_path):
    table([0]).save_to_disk(tmp_path)
    with pytest.raises(UserError, match="data.workers is 2: should be 0 where data.streaming is True"):
        sources.build(settings(tmp_path, streaming=True, workers=2), "train")


def test_a_stream_is_divided(tmp_path):
    table(range(60)).save_to_disk(tmp_path)
    seen = {}
    for split in ("train", "validation"):
        source = sources.build(settings(tmp_path, streaming=True), split)
        rows = [source.read(row)[1] for row in itertools.islice(source, 120)]
        epoch = rows.index(rows[0], 1)
        assert rows[:epoch] == rows[epoch : 2 * epoch]  # the same in every epoch
        seen[split] = rows[:epoch]
    assert sorted(seen["train"] + seen["validation"]) == sorted(f"caption {i}" for i in range(60))
    assert abs(len(seen["validation"]) - 15) < 4 * np.sqrt(60 * 0.25 * 0.75)


def test_a_stream_from_parquet(tmp_path):
    table(range(3)).to_parquet(tmp_path / "rows.parquet")
    source = sources.build(settings(tmp_path, streaming=True), "train")
    rows = list(itertools.islice(source, 2))
    image, caption = source.read(rows[0])
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(int(caption.split()[1]))))


def stream_batches(config, steps, **options):
    batches = pipeline.batches(config, sources.build(config, "train"), tokenize, batch_size=4, **options)
    out = list(itertools.islice(batches, steps))
    batches.close()
    return out


def test_stream_batches_resume_by_skipping(tmp_path, caplog):
    datasets.DatasetDict({"train": table(range(10)), "validation": table([0])}).save_to_disk(tmp_path)
    config = settings(tmp_path, streaming=True)
    with caplog.at_level("WARNING"):
        whole = stream_batches(config, 5)
    assert "order and resume are exact only where data is read by index" in caplog.text
    order = [f"caption {i % 10}" for i in range(20)]
    assert [caption for batch in whole for caption in batch["caption"]] == order
    resumed = stream_batches(config, 2, start_step=3)
    ranks = [stream_batches(config, 5, rank=rank, world=2) for rank in (0, 1)]
    for step, batch in enumerate(resumed, 3):
        for key in ("image", "noise", "t5_tokens", "uniform", "position"):
            np.testing.assert_array_equal(batch[key], whole[step][key])
    for step in range(5):
        both = [caption for rank in ranks for caption in rank[step]["caption"]]
        assert sorted(both) == sorted(whole[step]["caption"])
        positions = np.concatenate([rank[step]["position"] for rank in ranks])
        np.testing.assert_array_equal(positions, whole[step]["position"])


def test_broken_rows_of_a_stream_are_replaced(tmp_path):
    rows = table(range(6)).cast_column("image", datasets.Image(decode=False))
    broken = rows.map(lambda row, i: {"image": {"bytes": b"x", "path": None}} if i == 2 else {}, with_indices=True)
    datasets.DatasetDict({"train": broken, "validation": table([0])}).save_to_disk(tmp_path)
    first, second = stream_batches(settings(tmp_path, streaming=True), 2)
    assert first["caption"] == [f"caption {i}" for i in (0, 1, 3, 4)]
    assert first["skipped"] == ["row 2: not an image"]
    assert second["caption"] == [f"caption {i}" for i in (5, 0, 1, 3)]


def test_a_stream_of_broken_rows_ends(tmp_path):
    rows = table(range(3)).cast_column("image", datasets.Image(decode=False))
    broken = rows.map(lambda row: {"image": {"bytes": b"x", "path": None}})
    datasets.DatasetDict({"train": broken, "validation": table([0])}).save_to_disk(tmp_path)
    with pytest.raises(UserError, match="every sample is unusable .256 tried., such as row 0: not an image"):
        stream_batches(settings(tmp_path, streaming=True), 1)


def test_a_stream_without_rows_ends(tmp_path):
    table([0]).select([]).to_parquet(tmp_path / "train.parquet")
    table([0]).to_parquet(tmp_path / "validation.parquet")
    with pytest.raises(UserError, match="data.path is .*should have rows for train; it came to its end without"):
        stream_batches(settings(tmp_path, streaming=True), 1)
