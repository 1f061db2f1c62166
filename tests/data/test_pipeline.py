"""Samples as pure functions of their position, whatever reads them; epochs, draws and replacements.

Worker processes have a file of their own, test_pipeline_workers.py.
"""

import dataclasses
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flux_func import random
from flux_func.data import images, pipeline, sources
from flux_func.data.images import Unusable
from flux_func.errors import UserError
from tests.helpers import tiny_data
from tests.helpers.tiny_data import encoded, members, picture, tokenize, write_tar

ARRAYS = ("image", "t5_tokens", "clip_tokens", "noise", "latent_noise", "uniform", "position")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A source of `count` pictures of which those in `broken` cannot be used."""

    count: int
    broken: frozenset = frozenset()

    def __len__(self):
        return self.count

    def name(self, index):
        return f"picture {index}"

    def __getitem__(self, index):
        assert 0 <= index < self.count
        if index in self.broken:
            raise Unusable("broken")
        return picture(index), f"caption {index}"


def recipe(source, seed=0, training=True, **data):
    config = tiny_data.settings(**data)
    config.train.seed = seed
    return pipeline.recipe(config, source, tokenize, training=training, posterior_noise=True)


def batches(source, steps, seed=0, batch_size=6, **options):
    config = tiny_data.settings()
    config.train.seed = seed
    iterator = pipeline.batches(config, source, tokenize, batch_size=batch_size, posterior_noise=True, **options)
    out = list(itertools.islice(iterator, steps))
    iterator.close()
    return out


def joined(parts, key):
    return np.concatenate([part[key] for part in parts])


def assert_same(parts, others):
    for key in ARRAYS:
        np.testing.assert_array_equal(joined(parts, key), joined(others, key))
    for key in ("caption", "skipped"):
        assert sum((part[key] for part in parts), []) == sum((part[key] for part in others), [])


# Purity


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**12), st.integers(0, 2**62))
def test_a_batch_is_the_samples_of_its_positions(step, seed):
    source = Pictures(7, frozenset({2, 3}))
    (batch,) = batches(source, 1, seed=seed, start_step=step)
    made = recipe(source, seed=seed)
    assert batch["position"].tolist() == list(range(6 * step, 6 * step + 6))
    samples = [pipeline.sample(pickle.loads(pickle.dumps(made)), 6 * step + i) for i in reversed(range(6))][::-1]
    assert_same([batch], [pipeline.stack(samples)])


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 5), st.sampled_from([1, 2, 3, 6]))
def test_start_and_ranks_change_nothing(start, world):
    source = Pictures(9, frozenset({4}))
    whole = batches(source, 7)
    ranks = [batches(source, 7 - start, start_step=start, rank=rank, world=world) for rank in range(world)]
    assert_same(whole[start:], [rank[step] for step in range(7 - start) for rank in ranks])
    assert all(len(batch["position"]) == 6 // world for rank in ranks for batch in rank)


def test_types_and_shapes():
    (batch,) = batches(Pictures(5), 1)
    kinds = {key: (batch[key].dtype, batch[key].shape) for key in ARRAYS}
    assert kinds == {
        "image": (np.float32, (6, 3, 16, 16)),
        "t5_tokens": (np.int64, (6, 8)),
        "clip_tokens": (np.int64, (6, 3)),
        "noise": (np.float32, (6, 16, 2, 2)),
        "latent_noise": (np.float32, (6, 16, 2, 2)),
        "uniform": (np.float64, (6,)),
        "position": (np.int64, (6,)),
    }
    assert len(batch["caption"]) == 6 and batch["skipped"] == []
    plain = pipeline.recipe(tiny_data.settings(), Pictures(5), tokenize)
    assert "latent_noise" not in pipeline.sample(plain, 0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**62), st.integers(0, 1000))
def test_each_epoch_is_a_permutation(count, seed, epoch):
    made = recipe(Pictures(count), seed=seed)
    firsts = [next(pipeline.candidates(made, epoch * count + i)) for i in range(count)]
    assert sorted(firsts) == list(range(count))


def test_epochs_and_seeds_differ():
    def order(seed, epoch):
        made = recipe(Pictures(30), seed=seed)
        return tuple(next(pipeline.candidates(made, epoch * 30 + i)) for i in range(30))

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


# Draws


def test_draws_are_those_of_their_purposes():
    made = recipe(Pictures(5), seed=3)
    for position in (0, 5, 77):
        out = pipeline.sample(made, position)
        np.testing.assert_array_equal(out["noise"], random.normal(3, "noise", position, (16, 2, 2)))
        np.testing.assert_array_equal(out["latent_noise"], random.normal(3, "latent", position, (16, 2, 2)))
        assert out["uniform"] == random.uniform(3, "timestep", position)


def test_noise_is_standard_normal_and_timesteps_uniform():
    parts = batches(Pictures(5), 60)
    noise, latent = joined(parts, "noise").ravel(), joined(parts, "latent_noise").ravel()
    for draws in (noise, latent):
        assert stats.kstest(draws, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(noise, latent)[0, 1]) < 4 / np.sqrt(noise.size)
    neighbours = joined(parts, "noise").reshape(360, -1)
    assert abs(np.corrcoef(neighbours[:-1].ravel(), neighbours[1:].ravel())[0, 1]) < 4 / np.sqrt(noise.size)
    assert stats.kstest(joined(parts, "uniform"), "uniform").pvalue > 1e-4


def test_crops_are_drawn_along_the_longer_side():
    made = recipe(Pictures(1), crop="random")
    crops = {offset: images.square(picture(0), 16, (offset + 0.5) / 5) for offset in range(5)}  # 24x20: 5 places
    seen = []
    for position in range(300):
        image = pipeline.sample(made, position)["image"]
        seen += [offset for offset, crop in crops.items() if np.array_equal(crop, image)]
    assert len(seen) == 300
    assert stats.chisquare(np.bincount(seen, minlength=5)).pvalue > 1e-4
    center = pipeline.sample(recipe(Pictures(1), crop="center"), 0)["image"]
    np.testing.assert_array_equal(center, crops[2])


def test_prompts_are_dropped_in_training_alone():
    parts = batches(Pictures(5), 50, seed=1)
    t5 = (joined(parts, "t5_tokens") == 0).all(axis=1)
    clip = (joined(parts, "clip_tokens") == 0).all(axis=1)
    assert 0 < t5.sum() < 75 and 0 < clip.sum() < 75 and (t5 != clip).any()
    assert all(caption.startswith("caption") for part in parts for caption in part["caption"])  # as before dropout
    evaluated = batches(Pictures(5), 50, seed=1, training=False)
    assert (joined(evaluated, "t5_tokens") != 0).any(axis=1).all()


# Evaluation


@pytest.mark.parametrize(("limit", "sizes"), [(0, []), (4, [4]), (6, [6]), (13, [6, 6, 1])])
def test_limit(limit, sizes):
    parts = batches(Pictures(5), 99, training=False, limit=limit)
    assert [len(part["position"]) for part in parts] == sizes
    if limit:
        assert joined(parts, "position").tolist() == list(range(limit))
        captions = [caption for part in parts for caption in part["caption"]]
        assert captions == [f"caption {i % 5}" for i in range(limit)]  # in order
        np.testing.assert_array_equal(parts[0]["image"][0], images.square(picture(0), 16))  # from the center


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 40), st.integers(0, 6))
def test_ranks_share_the_positions_below_a_limit(world, share, limit, start):
    seen = []
    for rank in range(world):
        positions = pipeline.Positions(world * share, rank, world, start, limit)
        seen += [positions[i] for i in range(len(positions))]
    assert sorted(seen) == list(range(start * world * share, limit))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 9))
def test_whole_batches_are_dealt_to_workers(workers, share, world, start):
    plain = pipeline.Positions(share * world, world - 1, world, start)
    dealt = pipeline.Positions(share * world, world - 1, world, start, None, workers)
    for worker in range(workers):
        own = [dealt[worker + i * workers] for i in range(3 * share)]  # as grain slices it
        steps = [worker, worker + workers, worker + 2 * workers]
        assert own == [plain[step * share + i] for step in steps for i in range(share)]


def test_batches_that_do_not_divide():
    with pytest.raises(ValueError, match="multiple of the number of ranks"):
        batches(Pictures(5), 1, world=4)


# Replacements


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(0, 500), st.integers(0, 2**62), st.booleans())
def test_candidates_are_all_samples_once(count, position, seed, training):
    made = recipe(Pictures(count), seed=seed, training=training)
    assert sorted(pipeline.candidates(made, position)) == list(range(count))


def test_candidates_are_bounded_and_each_position_has_its_own():
    made = recipe(Pictures(2000))
    first, second = list(pipeline.candidates(made, 0)), list(pipeline.candidates(made, 1))
    assert len(set(first)) == len(first) == pipeline.MOST_TRIED == 256
    assert len(set(first[1:]) & set(second[1:])) < 80  # 32 by chance
    np.testing.assert_allclose(np.mean(first), 1000, atol=4 * 2000 / np.sqrt(12 * 256))


@settings(max_examples=15, deadline=None)
@given(st.sets(st.integers(0, 9), max_size=9), st.integers(0, 100))
def test_unusable_samples_are_replaced_and_named(broken, position):
    made = recipe(Pictures(10, frozenset(broken)))
    out = pipeline.sample(made, position)
    order = list(pipeline.candidates(made, position))
    usable = next(i for i, index in enumerate(order) if index not in broken)
    assert out["caption"] == f"caption {order[usable]}"
    assert out["skipped"] == [f"picture {index}: broken" for index in order[:usable]]
    whole = pipeline.sample(recipe(Pictures(10)), position)
    for key in ("noise", "latent_noise", "uniform"):  # the position's own, whichever sample it has
        np.testing.assert_array_equal(out[key], whole[key])


def test_one_broken_image_among_photographs_of_all_kinds(tmp_path):
    files = members(6)
    files["001.png"] = files["001.png"][:90]
    files["002.png"] = encoded(picture(2, (15, 40)))
    del files["003.txt"]
    config = tiny_data.settings(source="wds", path=str(write_tar(tmp_path / "a.tar", files)), validation_fraction=0.0)
    source = sources.build(config, "train")
    iterator = pipeline.batches(config, source, tokenize, batch_size=6)
    skipped = [line for batch in itertools.islice(iterator, 10) for line in batch["skipped"]]
    iterator.close()
    seen = {line.partition(".tar:")[2] for line in skipped}
    damaged = {line for line in seen if line.startswith("001: cannot be decoded")}
    assert len(damaged) == 1
    assert seen - damaged == {"002: 15x40 is below 16 pixels", "003: no caption"}
    assert len(skipped) >= 30  # each of the three is due once an epoch


def test_names_that_are_not_utf8_can_be_printed():
    class Odd(Pictures):
        def name(self, index):
            return "caf\udce9.png"

    with pytest.raises(UserError, match="such as caf.udce9.png: broken"):
        pipeline.sample(recipe(Odd(1, frozenset({0}))), 0)


@pytest.mark.parametrize("count", [1, 3, 400])
def test_a_source_without_usable_samples(count):
    made = dataclasses.replace(recipe(Pictures(count, frozenset(range(count)))), path="some/where")
    tried = min(count, 256)
    message = rf"^data.path is 'some/where': every sample is unusable \({tried} tried\), such as picture \d+: broken$"
    with pytest.raises(UserError, match=message):
        pipeline.sample(made, 2)


def test_the_error_arrives_through_threads():
    with pytest.raises(UserError, match="every sample is unusable") as caught:
        batches(Pictures(2, frozenset({0, 1})), 1)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_taken_for_broken_samples():
    class Defective(Pictures):
        def __getitem__(self, index):
            raise ZeroDivisionError("a defect of ours")

    with pytest.raises(ZeroDivisionError, match="a defect of ours"):
        batches(Defective(2), 1)


@pytest.mark.skipif(not tiny_data.PHOTOGRAPHS.exists(), reason=f"{tiny_data.PHOTOGRAPHS.name} is not there")
def test_photographs():
    config = tiny_data.settings(source="wds", path=str(tiny_data.PHOTOGRAPHS), image_size=256)
    source = sources.build(config, "train")
    assert len(source) == 29
    iterator = pipeline.batches(config, source, tokenize, batch_size=29)
    batch = next(iterator)
    iterator.close()
    assert batch["image"].shape == (29, 3, 256, 256) and len(set(batch["caption"])) >= 28 - len(batch["skipped"])
    assert np.abs(batch["image"]).max() <= 1 and 0.3 < batch["image"].std() < 1
