"""Traps that other FLUX trainers fell into, each with the tests that keep this one out.

attention causal by default
    tests/models/test_layers.py::test_attention_is_full_and_not_causal
    tests/test_traps.py::test_attention_in_a_step_is_full_over_text_and_image
latents * (scale - shift) in place of scale * (latents - shift)
    tests/models/test_autoencoder.py::test_latents_are_scale_times_z_minus_shift
    tests/models/test_autoencoder.py::test_kl_equals_reference
    tests/test_sample_main_pipelines.py::test_pixels_are_diffusers
the resolution's shift applied to what the model is told but not to the noise, or twice
    tests/train/test_step.py::test_shift_is_applied_once_and_towards_noise
    tests/train/test_step.py::test_a_step_is_gradient_descent_on_path_loss_of_the_pipelines_batch
    tests/flow/test_sampler.py::test_sample_is_bfls_denoise
    tests/interop/test_pipelines.py::test_the_two_schedules_are_diffusers
text and image swapped in order
    tests/models/test_flux.py::test_text_comes_before_image_and_order_matters
    tests/models/test_flux.py::test_forward_and_gradients_are_bfls
rope's theta not passed; position ids or rope in bfloat16
    tests/models/test_layers.py::test_rope_turns_each_pair_by_position_times_frequency
    tests/models/test_layers.py::test_position_ids_and_rope_never_fall_below_float32
    tests/test_traps.py::test_rope_and_time_stay_in_float32_where_a_run_computes_in_bfloat16
    tests/parity/test_compare.py::test_forward_gradients_and_stages_at_shapes_that_trip_assumptions
guidance or time multiplied by 1000 twice; guidance dropped on load; guidance wrong above a batch of 1
    tests/interop/test_identify.py::test_the_guidance_embedder_is_never_dropped
    tests/interop/test_weights.py::test_diffusers_loads_our_folder_and_computes_the_same
    tests/train/test_loop_weights.py::test_the_first_loss_is_that_of_diffusers_model_told_the_same_guidance
    tests/models/test_flux.py::test_guidance_is_each_samples_own_and_not_scaled_twice
    tests/flow/test_sampler.py::test_guidance_reaches_each_sample_of_a_batch
    tests/train/test_step.py::test_guidance_is_told_where_the_model_has_the_embedding_and_only_there
    tests/train/test_checkpoint.py::test_a_leaf_that_this_run_lacks_is_named
    tests/test_traps.py::test_a_step_tells_the_model_a_thousand_times_time_and_guidance
shift and scale of the last modulation swapped between formats, or not swapped
    tests/models/test_flux.py::test_forward_and_gradients_are_bfls
    tests/interop/test_formats.py::test_the_last_modulation_is_turned_once_and_no_other
    tests/interop/test_weights.py::test_we_load_diffusers_folder
epsilon of the query and key norms lost between formats
    tests/interop/test_weights.py::test_another_epsilon_is_said
    tests/interop/test_identify.py::test_our_files_say_all_that_shapes_do_not
files that other tools cannot load, or that are not what they seem
    tests/interop/test_weights.py::test_the_way_through_all_formats_returns_every_byte
    tests/test_convert_main.py::test_a_run_becomes_what_diffusers_loads
    tests/faults/test_bad_weights.py::test_wrong_weights
    tests/faults/test_bad_weights.py::test_a_pickle_is_never_opened
replicas that draw the same noise
    tests/test_traps.py::test_no_two_positions_share_noise_on_any_rank_in_any_step
    tests/data/test_pipeline.py::test_start_and_ranks_change_nothing
    tests/distributed/test_equality.py::test_the_comparison_sees_what_is_wrong
prompt dropout joint in one place and independent in another
    tests/data/test_captions.py::test_dropout_is_independent
    tests/data/test_pipeline.py::test_prompts_are_dropped_in_training_alone
    tests/test_traps.py::test_a_runs_prompts_are_dropped_for_each_encoder_by_itself
a loss not split with the batch, or scaled by batch, resolution or accumulation
    tests/flow/test_path.py::test_loss_does_not_scale_with_batch_or_resolution
    tests/train/test_step.py::test_the_loss_does_not_scale_with_batch_or_resolution
    tests/train/test_step.py::test_accumulation_changes_nothing_but_rounding
a precision or batch size that is asked for and not used
    tests/train/test_step.py::test_the_precision_asked_for_is_what_linears_see
    tests/train/test_step.py::test_the_batch_size_and_recomputation_asked_for_are_what_linears_see
    tests/train/test_validate.py::test_it_computes_in_the_type_asked_for_and_keeps_no_graph
    tests/train/test_loop.py::test_every_step_has_the_whole_batch_of_its_own_positions
a setting that is ignored without a word
    tests/faults/test_bad_input.py::test_a_wrong_field
a resumed run whose loss jumps: generators, moments, average or place in the data lost, an epoch counted wrong
    tests/train/test_loop_resume.py::test_a_resumed_run_is_one_that_never_stopped
    tests/train/test_loop_resume.py::test_a_run_that_breaks_goes_on_from_its_last_checkpoint
    tests/faults/test_interrupted.py::test_a_kill_between_checkpoints_loses_the_steps_since_the_last
    tests/data/test_pipeline.py::test_each_epoch_is_a_permutation
a resumed run that may not change how many processes there are
    tests/distributed/test_runs.py::test_another_mesh_goes_on_with_the_losses_of_the_unbroken_run
    tests/distributed/test_runs.py::test_a_mesh_goes_on_where_one_process_stopped
validation that hangs, or pictures that processes write over each other's
    tests/train/test_validate.py::test_processes_of_any_mesh_find_what_one_finds
    tests/test_sample_main_ranks.py::test_pictures_are_those_of_one_process
    tests/distributed/test_runs.py::test_a_mesh_leaves_what_one_process_leaves
a checkpoint that the next step writes over while it is saved
    tests/train/test_checkpoint.py::test_state_may_be_changed_in_place_right_after_save
saving after validation fails; validation changes training, or writes over pictures
    tests/train/test_loop.py::test_validation_takes_no_part_in_training
    tests/train/test_loop.py::test_grids_are_the_checkpoints_pictures_in_the_runs_size
"""

import ast
import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from flux_func.data import pipeline, sources
from flux_func.flow import path
from flux_func.models import flux, kernels, layers
from flux_func.parallel import mesh, sharding
from flux_func.train import encoders, layout, optimizer, state, step
from tests.helpers import tiny_run
from tests.helpers.tiny_run import CPU

HELD = re.findall(r"^    (tests/\S+\.py)::(test_\w+)$", __doc__, re.MULTILINE)


def test_every_trap_has_a_test():
    traps = re.findall(r"^\S.*\n(?=    tests/)", __doc__, re.MULTILINE)
    assert len(traps) == 19 and len(HELD) >= 40
    assert len(HELD) == __doc__.count("::")


@pytest.mark.parametrize(("file", "name"), sorted(set(HELD)), ids="::".join)
def test_the_tests_named_are_there(file, name):
    tree = ast.parse((tiny_run.ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


class Calls(TorchFunctionMode):
    """Notes the arguments of every call of some functions of torch."""

    def __init__(self, *functions):
        super().__init__()
        self.functions, self.seen = functions, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.functions:
            self.seen.append((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def batches(config, count=1, **options):
    cfg = state.model_config(config)
    codecs = encoders.build(config, cfg, CPU)
    size = config.train.batch_size
    data = pipeline.batches(config, sources.build(config, "train"), codecs.tokenize, batch_size=size, **options)
    return cfg, codecs, list(itertools.islice(data, count))


def take_a_step(fields, *functions):
    """Returns the batch of a step, and the calls that it made of some functions."""
    config = tiny_run.config(fields)
    cfg, codecs, [batch] = batches(config)
    chosen = optimizer.from_config(config)
    current = state.create(config, cfg, chosen, CPU)
    with Calls(*functions) as calls:
        step.train_step(
            current,
            batch,
            0,
            cfg=cfg,
            config=config,
            encoders=codecs,
            optimizer=chosen,
            device=CPU,
            sharding=layout.build(config, cfg, chosen, mesh.ONE, CPU),
        )
    return batch, calls.seen


def test_attention_in_a_step_is_full_over_text_and_image(monkeypatch):
    seen, block = [], kernels.block

    def noting(*given):
        seen.append((given[:3], block(*given)))
        return seen[-1][1]

    monkeypatch.setattr(kernels, "block", noting)
    take_a_step({"data.image_size": 64})
    assert len(seen) == 4
    for (q, k, v), (out, _) in seen:
        assert [tuple(x.shape) for x in (q, k, v)] == [(2, 8, 4 + 16, 16)] * 3
        torch.testing.assert_close(out, (q @ k.mT / 4).softmax(-1) @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("compute", "tolerance"), [("float32", 1e-4), ("bfloat16", 2**-8)])
def test_a_step_tells_the_model_a_thousand_times_time_and_guidance(compute, tolerance):
    fields = {"model.guidance_embed": True, "train.guidance": 2.0, "train.batch_size": 3, "numerics.compute": compute}
    batch, seen = take_a_step(fields, F.linear)
    features = [args[0] for args, _ in seen if args[0].shape[-1] == 256 and args[1].shape == (128, 256)]
    omega = np.exp(-math.log(10_000) * np.arange(128) / 128)
    for found, value in zip(features, (batch["uniform"], np.full(3, 2.0)), strict=True):
        angle = 1000 * value.astype(np.float32).astype(np.float64)[:, None] * omega
        expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
        np.testing.assert_allclose(found.double(), expected, rtol=0, atol=tolerance)


def test_rope_and_time_stay_in_float32_where_a_run_computes_in_bfloat16():
    config, consts, carries = tiny_run.config({"numerics.compute": "bfloat16", "data.image_size": 64}), [], []
    cfg, codecs, [batch] = batches(config)
    inputs = step.train_batch(batch, codecs, config, cfg, CPU)
    carry, const = path.inputs(
        cfg, {**inputs, "latents": inputs["latents"].bfloat16(), "noise": inputs["noise"].bfloat16()}
    )
    params, stages = flux.init(cfg), flux.chain(cfg)
    ops = sharding.gathering(layout.build(config, cfg, optimizer.from_config(config), mesh.ONE, CPU), params, stages)
    for stage in stages:
        wrapped = ops.wrap_stage(
            lambda params, carry, const: (carries.append(carry), consts.append(const), carry)[-1], stage
        )
        wrapped(stage.select(params), carry, const)
    ids = torch.cat([flux.text_ids(4), flux.image_ids(8, 8)], dim=1)
    exact = layers.rope(ids, cfg.axes_dim, 10_000, torch.float64)
    for found in (part for const in consts for part in zip(const["rope"], exact, strict=True)):
        assert found[0].dtype == torch.float32
        torch.testing.assert_close(found[0].double(), found[1], rtol=0, atol=1e-7)
    assert {carry["timesteps"].dtype for carry in carries} == {torch.float32}


def test_no_two_positions_share_noise_on_any_rank_in_any_step():
    config = tiny_run.config({"train.batch_size": 4})
    ranks = [batches(config, 3, rank=rank, world=2)[2] for rank in range(2)]
    noise = np.concatenate([batch["noise"] for rank in ranks for batch in rank]).reshape(12, -1).astype(np.float64)
    positions = [int(p) for rank in ranks for batch in rank for p in batch["position"]]
    assert sorted(positions) == list(range(12))
    alike = np.abs(np.corrcoef(noise) - np.eye(12))
    assert alike.max() < 5 / math.sqrt(noise.shape[1])
    assert len({float(u) for rank in ranks for batch in rank for u in batch["uniform"]}) == 12


def test_a_runs_prompts_are_dropped_for_each_encoder_by_itself():
    config = tiny_run.config({"data.prompt_dropout": 0.4, "train.batch_size": 500, "data.image_size": 16})
    _, codecs, [batch] = batches(config)
    empty = codecs.tokenize([""])
    t5, clip = ((batch[f"{name}_tokens"] == empty[name]).all(axis=1) for name in ("t5", "clip"))
    # Each share within four standard deviations.
    for share, expected in ((t5, 0.4), (clip, 0.4), (t5 & clip, 0.16), (~t5 & ~clip, 0.36)):
        assert share.mean() == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 500))
