"""Bad input to the programs: exit code 2, one line that names field and remedy, and nothing written or overwritten."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from flux_func import sample_main, train_main
from tests.helpers import tiny_data, tiny_pipeline, tiny_run
from tests.helpers.tiny_run import refused

REFERENCE = {"train.steps": 2, "ema.decay": 0.5}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a run of two steps."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert tiny_run.program(train_main, *tiny_run.arguments(workdir, REFERENCE)) == 0
    return workdir


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files and folders that are wrong each in its way, and a few that are right."""
    root = tmp_path_factory.mktemp("inputs")
    whole = tiny_data.write_tar(root / "whole.tar", tiny_data.members(8)).read_bytes()
    (root / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (root / "empty.tar").write_bytes(b"")
    tiny_data.write_tar(root / "nothing.tar", {})
    for name in ("no_images", "few"):
        (root / name).mkdir()
    (root / "no_images" / "000.txt").write_text("a caption alone")
    for name, data in tiny_data.members(4).items():
        (root / "few" / name).write_bytes(data)
    save_file({"encoder.conv_in.weight": torch.zeros(2)}, root / "ae.safetensors")
    tiny_pipeline.build(root / "narrow", weights=False, layers=1)
    shutil.copytree(root / "narrow", root / "wide_t5")
    tiny_pipeline.build(root / "lacking", weights=False, layers=1)
    shutil.rmtree(root / "lacking" / "tokenizer_2")
    config = json.loads((root / "wide_t5" / "text_encoder_2" / "config.json").read_text())
    (root / "wide_t5" / "text_encoder_2" / "config.json").write_text(json.dumps(config | {"d_model": 4096}))
    return root


FIELDS = [
    (
        "model.flavor",
        "flux-debgu",
        "model.flavor is 'flux-debgu': did you mean 'flux-debug'? should be one of 'flux-dev'",
    ),
    ("train.step", 3, "train.step is no field of the config: did you mean 'train.steps'?"),
    ("trian.steps", 3, "trian.steps is no field of the config: did you mean 'train.steps'?"),
    ("steps", 3, "steps is no field of the config: did you mean 'train.steps'?"),
    ("train.steps", "many", "flag --config.train.steps=many: invalid literal for int() with base 10: 'many'"),
    ("train.steps", 10.5, "flag --config.train.steps=10.5: invalid literal for int() with base 10: '10.5'"),
    ("optimizer.lr", "small", "flag --config.optimizer.lr=small: could not convert string to float: 'small'"),
    ("train.shift", "perhaps", "flag --config.train.shift=perhaps: "),
    ("model.guidance_embed", "perhaps", "flag --config.model.guidance_embed=perhaps: "),
    ("model.qk_norm_eps", "small", "flag --config.model.qk_norm_eps=small: could not convert string to float: 'small'"),
    ("optimizer.betas", "(0.9,)", "optimizer.betas is [0.9]: should be two numbers in [0, 1)"),
    ("optimizer.betas", "('a', 'b')", "optimizer.betas is ['a', 'b']: should be two numbers in [0, 1)"),
    ("sample.prompts", "(1, 2)", "sample.prompts is [1, 2]: should be texts"),
    ("data.image_size", 250, "data.image_size is 250: should be a multiple of 16, such as 256"),
    ("data.image_size", 0, "data.image_size is 0: should be a multiple of 16, such as 16"),
    ("data.image_size", -32, "data.image_size is -32: should be a multiple of 16, such as 16"),
    ("data.prompt_dropout", 1.5, "data.prompt_dropout is 1.5: should be in [0, 1]"),
    ("data.prompt_dropout", -0.1, "data.prompt_dropout is -0.1: should be in [0, 1]"),
    ("data.prompt_dropout", "nan", "data.prompt_dropout is nan: should be in [0, 1]"),
    ("train.steps", 0, "train.steps is 0: should be at least 1"),
    ("train.batch_size", 0, "train.batch_size is 0: should be at least 1"),
    ("train.batch_size", -2, "train.batch_size is -2: should be at least 1"),
    ("train.accumulate", 0, "train.accumulate is 0: should be at least 1"),
    ("train.accumulate", 3, "train.accumulate is 3: should divide train.batch_size, which is 2"),
    ("validate.samples", 0, "validate.samples is 0: should be at least 1"),
    ("optimizer.lr", "inf", "optimizer.lr is inf: should be finite"),
    ("sample.cfg_scale", "nan", "sample.cfg_scale is nan: should be finite"),
    ("optimizer.name", "adamm", "optimizer.name is 'adamm': did you mean 'adamw'?"),
    ("data.source", "digit", "data.source is 'digit': did you mean 'digits'?"),
    ("data.source", "wds", "data.path is '': should be set, as data.source is 'wds'"),
    (
        "data.path",
        "photos.tar",
        "data.path is 'photos.tar': is read only where data.source is 'wds' or 'folder' or 'hf'",
    ),
    ("autoencoder.kind", "kl", "autoencoder.path is '': should name an ae.safetensors (or set autoencoder.random_init"),
    ("autoencoder.path", "ae.st", "autoencoder.path is 'ae.st': is read only where autoencoder.kind is 'kl'"),
    ("text.kind", "hf", "text.path is '': should be set, as text.kind is 'hf'"),
    ("text.random_init", True, "text.random_init is True: is read only where text.kind is 'hf'"),
    (
        "checkpoint.export_dtype",
        "bfloat16",
        "checkpoint.export_dtype is 'bfloat16': is read only where checkpoint.last_",
    ),
    (
        "metrics.wandb",
        "ours",
        "metrics.wandb is 'ours': Weights & Biases is not installed: pip install flux-func[wandb]",
    ),
]


@pytest.mark.parametrize(("field", "value", "said"), FIELDS, ids=[f"{field}={value}" for field, value, _ in FIELDS])
def test_a_wrong_field(tmp_path, capfd, monkeypatch, field, value, said):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = refused(capfd, tmp_path, train_main, *tiny_run.arguments(tmp_path / "run", {field: value}))
    assert line.startswith(said), line


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("data.source=wds data.path={}/none.tar", "data.path is '{}/none.tar': no such file: should name a tar"),
        ("data.source=wds data.path={}/empty.tar", "data.path is '{0}/empty.tar': {0}/empty.tar cannot be read (empty"),
        ("data.source=wds data.path={}/nothing.tar", "data.path is '{}/nothing.tar': no samples in it: should hold"),
        ("data.source=wds data.path={}/cut.tar", "data.path is '{0}/cut.tar': {0}/cut.tar cannot be read (it ends"),
        ("data.source=wds data.path={}/no_images", "data.path is '{0}/no_images': no such file: should name a tar"),
        ("data.source=folder data.path={}/no_images", "data.path is '{}/no_images': no images in it: should hold"),
        ("data.source=folder data.path={}/none", "data.path is '{}/none': no such folder: should hold images"),
        ("data.source=folder data.path={}/whole.tar", "data.path is '{}/whole.tar': no such folder: should hold"),
        ("data.source=hf data.path={}/none", "data.path is '{}/none': cannot be loaded"),
        ("data.source=folder data.path={}/few data.validation_fraction=1.0", "data.validation_fraction is 1.0: should"),
        ("data.source=folder data.path={}/few data.streaming=True", "data.streaming is True: is read only where"),
        ("autoencoder.kind=kl autoencoder.path={}/none", "autoencoder.path is '{}/none': there is no such file or"),
        ("autoencoder.kind=kl autoencoder.path={}/cut.tar", "autoencoder.path is '{}/cut.tar': is cut short"),
        ("autoencoder.kind=kl autoencoder.path={}/ae.safetensors", "autoencoder.path is '{}/ae.safetensors': "),
        ("text.kind=hf text.path={}/none", "text.path is '{}/none': there is no such folder, nor such a repository"),
        (
            "text.kind=hf text.path={}/narrow text.random_init=True",
            "text.path is '{}/narrow': its T5 is 32 wide, and the model takes 4096",
        ),
        (
            "text.kind=hf text.path={}/wide_t5 text.random_init=True",
            "text.path is '{}/wide_t5': its CLIP is 24 wide, and the model takes 768",
        ),
        ("text.kind=hf text.path={}/few", "text.path is '{}/few': text_encoder_2/config.json is missing; it should be"),
    ],
)
def test_a_path_that_does_not_serve(tmp_path, capfd, inputs, fields, said):
    given = dict(part.format(inputs).split("=") for part in fields.split())
    line = refused(capfd, tmp_path, train_main, *tiny_run.arguments(tmp_path / "run", given))
    assert line.startswith(said.format(inputs)), line


BODY = "from flux_func import config\ndef get_config():\n    c = config.default()\n    {}\n    return c"
CONFIGS = {
    "no get_config": ("x = 1", "should define get_config(), as configs/flux_debug.py does"),
    "no function": ("get_config = 3", "TypeError: 'int' object is not callable"),
    "syntax": ("def get_config(:", "(line 1): "),
    "import": ("import nonsuch", "(line 1): No module named 'nonsuch'"),
    "name": (BODY.format("c.train.steps = ten"), "(line 4): name 'ten' is not defined"),
    "type": (BODY.format("c.train.steps = 'ten'"), "(line 4): TypeError: Could not override field 'steps'"),
    "field": (BODY.format("c.train.stpes = 3"), '(line 4): Key "stpes" does not exist and cannot be added since the '),
    "group": (BODY.format("c.trian.steps = 3"), '(line 4): \'trian\' Did you mean "train" instead of "trian"?'),
    "unlocked": (BODY.format("c.unlock(); c.warp = 3"), "warp is no field of the config: see flux_func/config.py"),
    "lacking": (BODY.format("c.unlock(); del c.train.steps"), "train.steps is not set: a config should start from "),
    "dict": (BODY.format("return c.to_dict()"), "config is a dict: should be flux_func.config.default() with changes"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_config_file(tmp_path, capfd, name):
    text, said = CONFIGS[name]
    (tmp_path / "wrong.py").write_text(text + "\n")
    line = refused(capfd, tmp_path, train_main, f"--config={tmp_path / 'wrong.py'}", f"--workdir={tmp_path / 'run'}")
    assert said in line, line
    assert "Traceback" not in line and len(line) < 300


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config=none.py", "--workdir={}/run"], "--config is 'none.py': no such file; see the folder configs/"),
        (["--config={}", "--workdir={}/run"], "--config is '{}': no such file; see the folder configs/"),
        (["--config", "--workdir={}/run"], "--config is '--workdir={}/run': no such file"),
        (["--workdir={}/run"], "--config is not given: Config file, such as configs/flux_debug.py"),
        (["--config={config}"], "--workdir is not given: Folder of the run"),
        (["--config={config}", "--workdir="], "flag --workdir=: should name a folder"),
        (
            ["--config={config}", "--workdir={}/run", "--wrkdir=x"],
            "Unknown command line flag 'wrkdir'. Did you mean: workdir",
        ),
        (["--config={config}", "--workdir={}/run", "stray"], "argument 'stray' is not a flag; flags start with --"),
        (
            ["--config={config}", "--workdir={}/run", "--device=tpu"],
            "flag --device=tpu: value should be one of <auto|cpu|",
        ),
    ],
)
def test_a_wrong_command_line(tmp_path, capfd, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    given = [argument.format(tmp_path, config=tiny_run.CONFIG) for argument in arguments]
    assert refused(capfd, tmp_path, train_main, *given).startswith(said.format(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(tmp_path, capfd):
    line = refused(capfd, tmp_path, train_main, *tiny_run.arguments(tmp_path / "run"), "--device=cuda")
    assert line == "--device is 'cuda': torch finds no such device here; use --device=cpu"


# Workdirs


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model.flavor": "flux-debug"}, "model.flavor is 'flux-debug', but the checkpoint in the workdir was written"),
        ({"model.guidance_embed": True}, "model.guidance_embed is True, but the checkpoint in the workdir was written"),
        (
            {"train.seed": 1},
            "train.seed is 1, but the checkpoint in the workdir was written with 0: set it back, or name",
        ),
        (
            {"ema.decay": 0.0},
            "ema.decay is 0.0, but the checkpoint in the workdir was written with 0.5: set it back, or",
        ),
        ({"train.steps": 1}, "train.steps is 1: should be at least 2, the step of the checkpoint in the workdir"),
    ],
)
def test_a_workdir_of_another_run(finished, capfd, fields, said):
    line = refused(
        capfd, finished, train_main, *tiny_run.arguments(finished, {**REFERENCE, "train.steps": 4, **fields})
    )
    assert line.startswith(said), line


@pytest.mark.parametrize(
    "damage", ["params/_METADATA", "config/metadata", "_CHECKPOINT_METADATA", "params/manifest.ocdbt"]
)
def test_a_workdir_whose_checkpoint_is_damaged(finished, tmp_path, capfd, damage):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/checkpoints/2" / damage).write_text("{")
    line = refused(capfd, tmp_path, train_main, *tiny_run.arguments(tmp_path / "run", {**REFERENCE, "train.steps": 4}))
    assert line.startswith(f"workdir is '{tmp_path}/run': its checkpoint of step 2 cannot be read ("), line
    assert f"remove {tmp_path}/run/checkpoints/2" in line


def test_a_workdir_whose_config_json_is_damaged_trains_on_and_does_not_sample(finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/config.json").write_text("{")
    line = refused(capfd, tmp_path, sample_main, f"--workdir={tmp_path / 'run'}", "--prompt=a")
    assert line.startswith(
        f"--workdir is '{tmp_path}/run': {tmp_path}/run/config.json is not a config of this version ("
    )
    assert tiny_run.program(train_main, *tiny_run.arguments(tmp_path / "run", {**REFERENCE, "train.steps": 3})) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["steps"] == 3


@pytest.mark.parametrize("name", ["file", "file/below", "broken"])
def test_a_workdir_that_is_no_folder(tmp_path, capfd, name):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    line = refused(capfd, tmp_path, train_main, *tiny_run.arguments(tmp_path / name))
    there = tmp_path / name.partition("/")[0]
    assert line == f"workdir is '{tmp_path / name}': {there} is not a folder; name another --workdir"


@pytest.mark.parametrize("name", ["", "new"])
def test_a_workdir_that_may_not_be_written_to(tmp_path, capfd, name):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write anywhere")
    line = refused(capfd, tmp_path, train_main, *tiny_run.arguments(locked / name))
    assert line == f"workdir is '{locked / name}': {locked} may not be written to; name another --workdir"


def test_a_workdir_that_may_not_be_written_to_as_the_system_says(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = refused(capfd, tmp_path, train_main, *tiny_run.arguments(tmp_path / "run"))
    assert line == f"workdir is '{tmp_path}/run': {tmp_path} may not be written to; name another --workdir"


def test_no_room_on_the_disk(finished, tmp_path, capfd, monkeypatch):
    for workdir, fields in ((tmp_path / "run", {}), (finished, {**REFERENCE, "train.steps": 4})):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, used=2**40, free=10**6))
            line = refused(capfd, workdir.parent, train_main, *tiny_run.arguments(workdir, fields))
        assert line.startswith(f"workdir is '{workdir}': checkpoints need "), line
        assert "has 0.00 GB free: free some, keep fewer (checkpoint.keep_last) or name another --workdir" in line


def test_a_disk_that_fills_up_while_training_leaves_the_last_checkpoint_whole(tmp_path, capfd, monkeypatch):
    room, usage = iter([10**12] * 2), shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=next(room, 0), total=usage(path).total, used=0)
    )
    fields = {"train.steps": 4, "checkpoint.every": 1}
    assert tiny_run.program(train_main, *tiny_run.arguments(tmp_path, fields)) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"train_main: error: workdir is '{tmp_path}': checkpoints need ") and err.count("\n") == 1
    monkeypatch.undo()
    assert tiny_run.program(train_main, *tiny_run.arguments(tmp_path, fields)) == 0
    assert [record["step"] for record in tiny_run.records(tmp_path)] == [1, 2, 3, 4]


# Sampling


SAMPLING = [
    ([], "--prompt is [] and --prompts_file is None: give one of them"),
    (["--prompt=a", "--prompts_file=b"], "--prompt is ['a'] and --prompts_file is 'b': give one of them"),
    (["--prompts_file={}/none.txt"], "--prompts_file is '{}/none.txt': cannot be read"),
    (["--prompts_file={}/blank.txt"], "--prompts_file is '{}/blank.txt': it has no prompts; write one a line"),
    (["--prompt=a", "--step=9"], "--step is 9: should be one of 2, which {} holds"),
    (["--prompt=a", "--step=two"], "flag --step=two: invalid literal for int()"),
    (["--prompt=a", "--steps=0"], "--steps is 0: should be at least 1"),
    (["--prompt=a", "--batch_size=0"], "--batch_size is 0: should be at least 1"),
    (["--prompt=a", "--height=100"], "--height is 100: should be a multiple of 16, such as 96"),
    (["--prompt=a", "--width=-16"], "--width is -16: should be a multiple of 16, such as 16"),
    (
        ["--prompt=a", "--guidance=2"],
        "--guidance is 2.0: the model of this run has no guidance embedding; leave it out",
    ),
    (["--prompt=a", "--cfg_scale=nan"], "--cfg_scale is nan: should be finite"),
    (["--prompt=a", "--negative_prompt=b"], "--negative_prompt is 'b': is read only where --cfg_scale is not 1"),
    (["--prompt=a", "--max_length=0"], "--max_length is 0: should be at least 1"),
    (["--prompt=a", "--dtype=float8"], "flag --dtype=float8: value should be one of <float32|bfloat16>"),
    (["--prompt=a", "--weights=pipe"], "--workdir is '{}' and --weights is 'pipe': give one of them"),
    (["--prompt=a", "--out={}/config.json"], "--out is '{}/config.json': should be a folder"),
    (["--prompt=a", "--out={}/checkpoints"], "--out is '{}/checkpoints': it is not empty; name another folder, or add"),
    (["--prompt=a", "--stpes=1"], "Unknown command line flag 'stpes'. Did you mean: steps"),
    (["--prompt=a", "stray"], "argument 'stray' is not a flag; flags start with --"),
]


@pytest.mark.parametrize(("arguments", "said"), SAMPLING, ids=[" ".join(arguments) for arguments, _ in SAMPLING])
def test_sampling_with_a_wrong_flag(finished, capfd, arguments, said):
    (finished / "blank.txt").write_text("\n \n")
    given = [argument.format(finished) for argument in arguments]
    line = refused(capfd, finished, sample_main, f"--workdir={finished}", *given)
    assert line.startswith(said.format(finished)), line


def test_sampling_from_a_workdir_that_is_none(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.json").write_text(json.dumps(tiny_run.config().to_dict()))
    for name, said in {
        "none": "config.json cannot be read (No such file or directory); should be the --workdir of a train_main run",
        "file": "config.json cannot be read (Not a directory); should be the --workdir of a train_main run",
        "new": "there is no checkpoint in it yet; train_main writes them",
    }.items():
        line = refused(capfd, tmp_path, sample_main, f"--workdir={tmp_path / name}", "--prompt=a")
        assert line.startswith(f"--workdir is '{tmp_path / name}': ") and line.endswith(said), line
    assert refused(capfd, tmp_path, sample_main, "--workdir=", "--prompt=a") == "flag --workdir=: should name a folder"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"model": 3}', '{"modle": {}}', '{"train": null}', '{"train": {"steps": "x"}}']
)
def test_sampling_with_a_damaged_config(finished, tmp_path, capfd, text):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    (tmp_path / "run/config.json").write_text(text)
    line = refused(capfd, tmp_path, sample_main, f"--workdir={tmp_path / 'run'}", "--prompt=a")
    assert line.startswith(
        f"--workdir is '{tmp_path}/run': {tmp_path}/run/config.json is not a config of this version ("
    )
    assert len(line) < 500


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.flavor": "flux-none"}, "model.flavor is 'flux-none': did you mean 'flux-dev'?"),
        ({"train.steps": None}, "train.steps is None: should be of the type of 10, its default"),
        ({"text.kind": "hf", "text.path": "/none"}, "text.path is '/none': there is no such folder"),
        ({"autoencoder.kind": "kl", "autoencoder.path": "/none"}, "autoencoder.path is '/none': there is no such"),
    ],
)
def test_sampling_with_a_config_that_does_not_fit(finished, tmp_path, capfd, change, said):
    shutil.copytree(finished, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    for field, value in change.items():
        group, name = field.split(".")
        config[group][name] = value
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    line = refused(capfd, tmp_path, sample_main, f"--workdir={tmp_path / 'run'}", "--prompt=a")
    assert line.startswith(said.format(tmp_path / "run")), line


def test_sampling_an_average_that_is_not_kept(tmp_path, capfd):
    assert tiny_run.program(train_main, *tiny_run.arguments(tmp_path, {"train.steps": 1})) == 0
    line = refused(capfd, tmp_path, sample_main, f"--workdir={tmp_path}", "--prompt=a", "--ema")
    assert line == "--ema is True: the checkpoint of step 1 holds no average (ema.decay); leave --ema out"
