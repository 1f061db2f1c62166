"""Every field is checked, every fault is named, and what may change on resume is exactly the rule."""

import importlib.util
import json
from pathlib import Path

import pytest

from flux_func import config as configs
from flux_func.errors import UserError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files_hold_what_they_say(path):
    config = load(path)
    if config.autoencoder.kind == "kl":
        config.autoencoder.path = "ae.safetensors"
        config.text.path = config.data.path = "somewhere"
    if not config.model.flavor:
        config.model.weights = "flux1-dev.safetensors"
    configs.validate(config)
    known = dict(configs.flat(configs.default()))
    assert dict(configs.flat(config)).keys() == known.keys()


def test_flux_dev_and_schnell_have_torchtitans_hyperparameters():
    for name, length, batch in (("flux_dev", 512, 256), ("flux_schnell", 256, 512)):
        config = load(CONFIGS[0].with_name(f"{name}.py"))
        assert (config.text.max_length, config.train.batch_size) == (length, batch)
        assert (config.data.image_size, config.data.prompt_dropout) == (256, 0.447)
        assert (config.optimizer.lr, config.optimizer.warmup_steps) == (1e-4, 3000)


@pytest.mark.parametrize(
    "field, value, remedy",
    [
        ("model.flavor", "flux-debgu", "did you mean 'flux-debug'"),
        ("model.qk_norm_eps", 0.0, "above 0, such as 1e-6"),
        ("model.qk_norm_eps", -1e-6, "above 0, such as 1e-6"),
        ("data.source", "digit", "did you mean 'digits'"),
        ("data.image_size", 250, "multiple of 16, such as 256"),
        ("data.image_size", 0, "multiple of 16, such as 16"),
        ("data.prompt_dropout", 1.5, "in [0, 1]"),
        ("data.prompt_dropout", -0.1, "in [0, 1]"),
        ("train.steps", 0, "at least 1"),
        ("train.batch_size", -2, "at least 1"),
        ("train.accumulate", 3, "should divide train.batch_size, which is 2"),
        ("optimizer.lr", -1e-4, "not be negative"),
        ("optimizer.lr", float("nan"), "not be negative"),
        ("remat.policy", "half", "'none', 'full', 'selective'"),
        ("kernels.attention", "cudn", "did you mean 'cudnn'?"),
        ("numerics.compute", "float8", "'float32', 'bfloat16'"),
        ("numerics.linear", "float8_roewise", "did you mean 'float8_rowwise'?"),
        ("numerics.rounding", "up", "'stochastic', 'nearest'"),
        ("optimizer.moments", "8bits", "did you mean '8bit'?"),
        ("text.max_length", 0, "at least 1"),
        ("ema.decay", 1.2, "in [0, 1]"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(field, value, remedy):
    config = configs.default()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as error:
        configs.validate(config)
    assert str(error.value).startswith(f"{field} is {value!r}: ") and remedy in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"data.source": "wds"}, "data.path"),
        ({"text.kind": "hf"}, "text.path"),
        ({"text.kind": "hf", "text.t5": "t5"}, "text.path"),
        ({"text.kind": "hf", "text.clip": "clip"}, "text.path"),
        ({"model.flavor": ""}, "model.weights"),
        ({"autoencoder.kind": "kl"}, "autoencoder.path"),
    ],
)
def test_a_path_that_is_needed_is_asked_for(fields, named):
    config = configs.default()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=f"{named} is ''"):
        configs.validate(config)


@pytest.mark.parametrize(
    "fields, said",
    [
        (
            {"model.weights": "w", "model.init": "nonzero"},
            "model.init is 'nonzero': is read only where model.weights is",
        ),
        ({"text.t5": "t5"}, "text.t5 is 't5': is read only where text.kind is 'hf'"),
        ({"text.clip": "clip"}, "text.clip is 'clip': is read only where text.kind is 'hf'"),
        (
            {"text.kind": "hf", "text.path": "p", "text.t5": "t5", "text.clip": "clip"},
            "text.path is 'p': is not read where both of text.t5 and text.clip are set",
        ),
        ({"remat.keep": ("*.linear1",)}, "remat.keep is ['*.linear1']: is read only where remat.policy is 'selective'"),
        ({"remat.policy": "selective", "remat.keep": ()}, "remat.keep is []: should be 'attention', and patterns of"),
        ({"numerics.linear": "mxfp8"}, "numerics.linear is 'mxfp8': is read only where numerics.compute is 'bfloat16'"),
        ({"numerics.patterns": ("*",)}, "numerics.patterns is ['*']: is read only where numerics.linear is not ''"),
        (
            {"numerics.compute": "bfloat16", "numerics.linear": "mxfp8", "numerics.patterns": (1,)},
            "numerics.patterns is [1]: should be patterns of linears, such as 'single_blocks.linear1'",
        ),
        (
            {
                "numerics.compute": "bfloat16",
                "numerics.linear": "mxfp8",
                "remat.policy": "selective",
                "remat.keep": ("*.linear1",),
            },
            "remat.keep is ['*.linear1']: of linears nothing is kept where numerics.linear is 'mxfp8'",
        ),
        (
            {"numerics.rounding": "nearest"},
            "numerics.rounding is 'nearest': is read only where numerics.param or optim",
        ),
        (
            {"optimizer.name": "SGD", "optimizer.moments": "8bit"},
            "optimizer.moments is '8bit': is read only where optimizer.name is 'adamw'",
        ),
    ],
)
def test_a_field_that_would_be_ignored_is_named(fields, said):
    config = configs.default()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError) as error:
        configs.validate(config)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    "fields",
    [
        {"text.kind": "hf", "text.t5": "t5", "text.clip": "clip"},
        {"text.kind": "hf", "text.path": "p", "text.t5": "t5"},
        {"model.weights": "w", "model.flavor": "", "model.guidance_embed": True, "model.qk_norm_eps": 1e-5},
        {"model.weights": "w", "model.flavor": "flux-dev"},
        {"model.qk_norm_eps": 1},
        {"numerics.param": "bfloat16", "numerics.rounding": "nearest"},
        {"optimizer.moments": "bfloat16", "numerics.rounding": "nearest"},
        {"numerics.compute": "bfloat16", "numerics.linear": "mxfp8", "remat.policy": "selective"},
    ],
)
def test_what_may_be_left_out_or_set_together(fields):
    config = configs.default()
    config.update_from_flattened_dict(fields)
    before = config.to_dict()
    configs.validate(config)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    "field, value, kind", [("model.guidance_embed", "yes", "bool"), ("model.qk_norm_eps", True, "float")]
)
def test_a_field_that_may_be_none_has_a_type_otherwise(field, value, kind):
    config = configs.default().unlock()
    group, name = field.split(".")
    config[group] = {**config[group].to_dict(), name: value}
    with pytest.raises(UserError, match=f"{field} is {value!r}: should be None or a {kind}"):
        configs.validate(config)


def test_dev_is_tuned_at_guidance_1_from_weights_and_drawn_from_at_its_own():
    config = load(CONFIGS[0].with_name("flux_dev_finetune.py"))
    assert (config.train.guidance, config.sample.guidance) == (1.0, 3.5)
    assert config.numerics.param == "float32" and config.model.guidance_embed is None
    assert (config.train.shift, config.text.max_length) == (True, 512)
    with pytest.raises(UserError, match="model.weights is '': should name what to start from"):
        configs.validate(config)


def test_a_mistyped_field_names_the_nearest():
    with pytest.raises(AttributeError, match='Did you mean "steps"'):
        configs.default().train.step = 3


def saved():
    return json.loads(json.dumps(configs.default().to_dict()))


@pytest.mark.parametrize(
    "field, value",
    [
        ("train.steps", 99),
        ("data.workers", 3),
        ("log.every", 5),
        ("checkpoint.every", 5),
        ("validate.convention", "middle"),
        ("sample.prompts", ("a",)),
        ("metrics.peak_tflops", 989.0),
        ("remat.policy", "full"),
        ("kernels.attention", "cudnn"),
        ("remat.keep", ("*.linear1",)),
    ],
)
def test_what_may_differ_on_resume(field, value):
    config = configs.default()
    config.update_from_flattened_dict({field: value})
    configs.check_resume(saved(), config)


@pytest.mark.parametrize(
    "field, value",
    [
        ("model.flavor", "flux-tiny"),
        ("model.weights", "other.safetensors"),
        ("model.qk_norm_eps", 1e-5),
        ("text.t5", "t5"),
        ("train.seed", 1),
        ("train.batch_size", 4),
        ("optimizer.lr", 1.0),
        ("data.image_size", 64),
        ("checkpoint.keep_last", 9),
        ("ema.decay", 0.9),
        ("numerics.compute", "bfloat16"),
    ],
)
def test_what_may_not_differ_on_resume_is_named_with_both_values(field, value):
    config = configs.default()
    old = dict(configs.flat(config))[field]
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as error:
        configs.check_resume(saved(), config)
    for part in (field, repr(value), repr(old)):
        assert part in str(error.value)


def test_a_checkpoint_with_a_field_that_is_gone_is_refused():
    old = saved()
    old["train"]["warp"] = 9
    with pytest.raises(UserError, match="train.warp is 'not set'"):
        configs.check_resume(old, configs.default())
