"""The files of docs/launch against the definitions of what they are given to."""

import json
import re
import shlex
import subprocess

import jsonschema
import pytest
import yaml
from torch.distributed import run as torchrun

from flux_func import config as configs
from tests.helpers import tiny_run

FILES = tiny_run.ROOT / "docs/launch"
SCHEMA = json.loads((tiny_run.ROOT / "tests/distributed/jobset.schema.json").read_text())


def check_command(words: list[str]) -> dict[str, object]:
    """Checks the words after `torchrun` against its own parser and our config; returns torchrun's options."""
    options = torchrun.get_args_parser().parse_args(words)
    assert options.module and options.training_script == "flux_func.train_main"
    flags = dict(word.removeprefix("--").split("=", 1) for word in options.training_script_args)
    configs.check_known([name.removeprefix("config.") for name in flags if name.startswith("config.")])
    assert (tiny_run.ROOT / "configs" / flags.pop("config").rpartition("/")[2]).is_file()
    # What may come and go is the replicas.
    assert flags["config.parallel.replicate"] == "-1" and int(flags["config.parallel.shard"]) > 0
    assert options.rdzv_backend == "c10d" and flags["workdir"]
    return vars(options)


def jobset() -> dict:
    return yaml.safe_load((FILES / "jobset.yaml").read_text())


def test_the_jobset_is_one():
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    found = jobset()
    validator.validate(found)
    [node] = found["spec"]["replicatedJobs"]
    job = node["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    options = check_command(container["args"])
    assert int(options["nnodes"]) == job["parallelism"] == job["completions"]
    assert options["nproc_per_node"] == container["resources"]["limits"]["nvidia.com/gpu"]
    # The first pod: JobSet, replicated job, job and pod, in the network's subdomain.
    name, subdomain = found["metadata"]["name"], found["spec"]["network"]["subdomain"]
    port = container["ports"][0]["containerPort"]
    assert options["rdzv_endpoint"] == f"{name}-{node['name']}-0-0.{subdomain}:{port}"
    grace = {variable["name"]: variable["value"] for variable in container["env"]}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert int(grace) < job["template"]["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(
    ("old", "new"),
    [("maxRestarts: 10", "maxRestart: 10"), ("parallelism: 8", 'parallelism: "8"'), ("template:", "templates:")],
)
def test_the_schema_finds_what_is_wrong(old, new):
    text = (FILES / "jobset.yaml").read_text()
    assert old in text
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(yaml.safe_load(text.replace(old, new)))


def test_the_sbatch_file_is_a_script_that_starts_what_it_says():
    path = FILES / "train.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    command = text[text.index("srun ") :].replace("\\\n", " ")
    for variable, value in {"CONFIG": "configs/flux_dev.py", "SLURM_NNODES": directives["nodes"]}.items():
        command = command.replace(f"${variable}", value)
    words = shlex.split(command)
    options = check_command([word for word in words[words.index("torchrun") + 1 :] if word != "$@"])
    assert options["nproc_per_node"] == directives["gpus-per-node"] and directives["ntasks-per-node"] == "1"
    grace = int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text)[1])
    assert grace < int(directives["signal"].partition("@")[2])
