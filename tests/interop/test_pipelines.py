"""What a pipeline's folder says is taken or refused; its schedule is diffusers' own, or none."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func.errors import UserError
from flux_func.flow import timesteps
from flux_func.interop import pipelines

INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# As Black Forest Labs' repositories have them.
DEV = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SCHNELL = {**DEV, "shift": 1.0, "use_dynamic_shifting": False}


def write(folder, index=None, scheduler=None, parts=tuple(pipelines.PARTS)):
    for part in parts:
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({**INDEX, **(index or {})}))
    if "scheduler" in parts:
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler or DEV))
    return folder


def refused(folder):
    with pytest.raises(UserError) as raised:
        pipelines.open_pipeline(folder)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(str(folder))
    return str(raised.value).removeprefix(str(folder))


@pytest.mark.parametrize(("scheduler", "shift"), [(DEV, True), (SCHNELL, False)])
@pytest.mark.parametrize("kind", ["FluxPipeline", "FluxKontextPipeline", "FluxImg2ImgPipeline"])
def test_flux_pipelines_are_opened(tmp_path, scheduler, shift, kind):
    unused = {"image_encoder": [None, None], "feature_extractor": ["transformers", "CLIPImageProcessor"]}
    write(tmp_path, {"_class_name": kind, **unused}, scheduler)
    found = pipelines.open_pipeline(str(tmp_path))
    assert found == pipelines.Pipeline(tmp_path, kind, shift)
    assert found.part("vae") == tmp_path / "vae"


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("StableDiffusionXLPipeline", "Stable Diffusion XL, a StableDiffusionXLPipeline"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3, a StableDiffusion3Pipeline"),
        ("StableDiffusionPipeline", "Stable Diffusion 1 or 2, a StableDiffusionPipeline"),
        ("Flux2Pipeline", "FLUX.2, a Flux2Pipeline"),
        ("Flux2KleinPipeline", "FLUX.2, a Flux2KleinPipeline"),
        ("ChromaPipeline", "Chroma, a ChromaPipeline"),
        ("QwenImagePipeline", "a QwenImagePipeline"),
    ],
)
def test_other_families_are_said_to_be_what_they_are(tmp_path, kind, family):
    said = refused(write(tmp_path, {"_class_name": kind}))
    assert said == f": holds {family}; a FLUX.1 pipeline is needed, such as FLUX.1-dev or FLUX.1-schnell"


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"_class_name": None}, "/model_index.json: has no _class_name; a FLUX.1 pipeline is needed"),
        ({"vae": [None, None]}, "/model_index.json: names no vae; the whole pipeline is needed"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "/model_index.json: vae is a AutoencoderTiny; FLUX.1's is a Auto"),
        ({"text_encoder_2": ["transformers", "T5Model"]}, "/model_index.json: text_encoder_2 is a T5Model; FLUX.1's"),
        ({"scheduler": ["diffusers", "DDIMScheduler"]}, "/model_index.json: scheduler is a DDIMScheduler; FLUX.1's"),
        ({"controlnet": ["diffusers", "FluxControlNetModel"]}, "/model_index.json: names controlnet, a FluxControlNet"),
    ],
)
def test_parts_that_are_missing_or_others_are_named(tmp_path, index, said):
    assert refused(write(tmp_path, index)).startswith(said)


def test_folders_that_are_no_pipelines(tmp_path):
    assert refused(tmp_path).startswith(": has no model_index.json; should be a pipeline's folder")
    assert refused(tmp_path / "none").startswith(": is not there; should be")
    (tmp_path / "flux1-dev.safetensors").write_bytes(b"")
    assert refused(tmp_path / "flux1-dev.safetensors").startswith(": is a file; should be a pipeline's folder")
    write(tmp_path, parts=[part for part in pipelines.PARTS if part != "tokenizer_2"])
    assert refused(tmp_path).startswith("/model_index.json: names tokenizer_2, a folder that is not there; the whole")
    for text, said in (("{", "is no JSON ("), ("[1]", "is no JSON object, but a list")):
        (tmp_path / "model_index.json").write_text(text)
        assert refused(tmp_path).startswith(f"/model_index.json: {said}")


@pytest.mark.parametrize("base", [DEV, SCHNELL])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_train_timesteps", 500),
        ("invert_sigmas", True),
        ("shift_terminal", 0.02),
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("stochastic_sampling", True),
        ("use_flow_sigmas", True),
        ("a_field_to_come", 0.5),
    ],
)
def test_a_schedule_of_another_kind_is_refused(tmp_path, base, field, value):
    said = refused(write(tmp_path, scheduler={**base, field: value}))
    assert said.startswith(f"/scheduler/scheduler_config.json: {field} is {value!r}; FLUX.1's is ")


@pytest.mark.parametrize(
    ("base", "field", "value"),
    [
        (DEV, "base_shift", 0.4),
        (DEV, "max_shift", 1.2),
        (DEV, "base_image_seq_len", 512),
        (DEV, "max_image_seq_len", 8192),
        (DEV, "time_shift_type", "linear"),
        (SCHNELL, "shift", 3.0),
        (DEV, "use_dynamic_shifting", "yes"),
    ],
)
def test_what_the_schedule_reads_is_refused_and_what_it_does_not_is_not(tmp_path, base, field, value):
    assert f": {field} is {value!r}; " in refused(write(tmp_path, scheduler={**base, field: value}))
    other = SCHNELL if base is DEV else DEV
    if field != "use_dynamic_shifting":
        assert pipelines.open_pipeline(write(tmp_path, scheduler={**other, field: value})).shift == (other is DEV)
    assert pipelines.open_pipeline(write(tmp_path, scheduler={**base, "a_field_to_come": None})).shift == (base is DEV)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20_000), st.booleans())
def test_the_two_schedules_are_diffusers(steps, tokens, shifted):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(DEV if shifted else SCHNELL)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=calculate_shift(tokens))
    ours = timesteps.schedule(steps, tokens if shifted else None)
    torch.testing.assert_close(scheduler.sigmas.double(), ours, rtol=2e-6, atol=1e-7)


def test_a_pipeline_of_diffusers_own_saving(tmp_path):
    from tests.helpers import tiny_pipeline

    folder = tiny_pipeline.whole(tmp_path / "pipe", shift=False)
    assert pipelines.open_pipeline(folder) == pipelines.Pipeline(folder, "FluxPipeline", False)
