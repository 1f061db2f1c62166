import os
import re

import pytest
import torch

from flux_func.errors import UserError
from flux_func.launch import joining, processes
from tests.helpers import launch, rank_processes, ranks


def test_one_process_needs_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes.start(torch.device("cpu"))
    assert (processes.rank(), processes.world(), processes.is_first()) == (0, 1, True)
    assert processes.gather("a") == ["a"] and processes.from_first("a") == "a"
    processes.agree({"train.steps": 3})
    assert processes.agreed_stop(lambda: "SIGTERM") == "SIGTERM"
    with pytest.raises(UserError, match="^a line$"), processes.together():
        raise UserError("a line")
    processes.stop()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two': should be a whole number at least 1"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, though WORLD_SIZE is: torchrun sets them all; see docs/scaling.md"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2': should be a whole number in 0..1"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_PORT is not set, though WORLD_SIZE is: "),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "80"}, "MASTER_ADDR is not set, though WORLD_SIZE is: "),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "0"}, "MASTER_PORT is '0': should be a whole number in 1..6"),
    ],
)
def test_what_a_launcher_left_out_is_said(monkeypatch, variables, said):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="^" + re.escape(said)):
        processes.start(torch.device("cpu"))


def test_a_device_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="^LOCAL_RANK is 4: this node has 4 CUDA devices; .*--nproc-per-node=4"):
        processes._local_device(4, 4)
    monkeypatch.delenv("LOCAL_RANK")
    assert [processes._local_device(rank, 4) for rank in (3, 4, 9)] == [3, 0, 1]


def test_a_master_that_is_not_there_or_alone(monkeypatch):
    port = launch.free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), joining.JOIN: "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(joining.Unreachable, match=f"^MASTER_ADDR:MASTER_PORT is 127.0.0.1:{port}: cannot be reached "):
        joining.join(1, 2)
    with pytest.raises(joining.Unreachable, match=r"the 2 ranks of WORLD_SIZE did not meet .* \(rank 0: 1 came\)"):
        joining.join(0, 2)


def test_ranks_agree_without_a_launcher():
    """As Slurm starts them: with the variables alone."""
    [zero, one, two] = ranks.run(3, rank_processes.agreements, str(launch.free_port()))
    assert zero["gathered"] == one["gathered"] == [0, 1, 2]
    assert zero["first"] == one["first"] == two["first"] == "of 0"
    assert zero["stop"] == two["stop"] == ["", "SIGTERM", "SIGTERM"]
    # The lowest rank of those that failed, and which it was; all of them say the same.
    assert zero["together"] == one["together"] == two["together"]
    assert re.fullmatch(r"missing on 1 \(on rank 1 of 3, which is on .* and 1 more\)", zero["together"])
    assert zero["all"] == two["all"] == "missing"
    assert one["agree"] == zero["agree"]
    assert zero["agree"].startswith("train.seed is 0 on rank 0 and 2 on rank 2: every rank should be started by")
    assert two["lacking"] == "train.steps is not there on rank 0 and 5 on rank 1: " + zero["agree"].partition(": ")[2]
    assert zero["code"] == "" == two["code"]


def test_the_code_version_is_of_every_source():
    version = processes.code_version()
    assert re.fullmatch(r"flux_func [0-9a-f]{12}, torch \S+", version) and torch.__version__ in version
    assert os.environ.get("WORLD_SIZE") is None
