"""A program of a few steps that talk to each other, and that fails on some rank in a way that a flag asks for.

torchrun --nproc-per-node=2 -m tests.helpers.rank_processes --fails=kill --rank=1
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags, logging

from flux_func import cli
from flux_func.errors import UserError

STEPS = 10**6


def run() -> None:
    """The program."""
    flags.DEFINE_string("fails", "", "What the rank does after some steps.")
    flags.DEFINE_integer("rank", 1, "The rank that does it; -1: every one.")
    flags.DEFINE_integer("restarts", 0, "In how many starts it does so.")
    flags.DEFINE_integer("steps", STEPS, "Steps to take.")
    cli.define_device()
    cli.run(main)


def main(argv: list[str]) -> None:
    """Takes steps, with a sum over the ranks in each."""
    del argv
    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    from flux_func.launch import processes

    stop = cli.stop_requested()
    processes.start(torch.device("cpu"))
    processes.agree({"steps": flags.FLAGS.steps})
    print(f"{processes.world()} ranks", flush=True)
    if not processes.is_first():
        logging.warning("a warning")
    signal_name = ""
    for step in tqdm(range(flags.FLAGS.steps), desc="steps", mininterval=60):
        signal_name = processes.agreed_stop(stop)
        if signal_name:
            break
        if step == 5:
            fail(processes.rank())
        total = torch.tensor(processes.rank())
        dist.all_reduce(total)
        assert int(total) == sum(range(processes.world()))
        time.sleep(0.01)
    print(f"ended by {signal_name or 'itself'} after {'some' if signal_name else step + 1} steps", flush=True)
    processes.stop()


def fail(rank: int) -> None:
    """Does what --fails says, on the rank that --rank says."""
    from flux_func.launch import processes

    here = flags.FLAGS.rank in (rank, -1)
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) <= flags.FLAGS.restarts
    match flags.FLAGS.fails if again else "":
        case "together":
            with processes.together():
                if here:
                    raise UserError("data.path is 'there': no such file")
        case "kill" if here:
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise" if here:
            raise ValueError("a defect of ours")
        case "refuse" if here:
            raise UserError("data.path is 'there': no such file")
        case "exit" if here:
            sys.exit(5)
        case "hang":
            # One ends by itself, and another is where neither a signal nor a broken connection gets it out.
            if here:
                os._exit(7)
            lock = ctypes.create_string_buffer(256)
            for _ in range(2):
                ctypes.CDLL(None).pthread_mutex_lock(lock)


def agreements(rank: int, port: str) -> dict[str, Any]:
    """Joins the ranks of another group again, by the environment; returns what they then agree on."""
    import torch
    import torch.distributed as dist

    from flux_func.launch import processes

    count = dist.get_world_size()
    dist.barrier()  # a rank that leaves while another still connects to it breaks that one
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    processes.start(torch.device("cpu"))
    words = ["", "SIGTERM" if rank == 2 else "", "SIGINT" if rank == 0 else "SIGTERM"]
    settings = {"train.seed": 2 * (rank == 2)}
    return {
        "gathered": processes.gather(processes.rank()),
        "first": processes.from_first(f"of {rank}"),
        "stop": [processes.agreed_stop(lambda word=word: word) for word in words],
        "together": _refused(_missing, f"missing on {rank}" if rank else ""),
        "all": _refused(_missing, "missing"),
        "agree": _refused(processes.agree, settings),
        "lacking": _refused(processes.agree, {"train.steps": 5} if rank else {}),
        "code": _refused(processes.agree, {}),
    }


def _missing(line: str) -> None:
    from flux_func.launch import processes

    with processes.together():
        if line:
            raise UserError(line)


def _refused(fn: Callable, *args: Any) -> str:
    try:
        fn(*args)
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    run()
