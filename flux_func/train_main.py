"""Trains FLUX.

    train_main --config=configs/flux_debug.py --workdir=/tmp/flux_debug
    train_main --config=configs/flux_debug.py --workdir=/tmp/flux_debug --config.train.steps=14
    torchrun --nproc-per-node=8 -m flux_func.train_main --config=configs/flux_dev.py --workdir=/data/flux_dev

Any field of the config can be set from the command line; flux_func/config.py lists them all. A workdir that holds a
checkpoint is gone on with, by any number of processes: config.parallel says how they share the work, docs/scaling.md
how they are started, and plan_main what fits.
"""

import os

from absl import flags

from flux_func import cli


def run() -> None:
    """The console script."""
    cli.define_config()
    cli.define_workdir("Folder of the run: checkpoints, metrics, pictures.")
    # An empty one, from an unset shell variable, would be the current folder.
    flags.register_validator("workdir", bool, "should name a folder")
    cli.define_device()
    cli.run(main)


def main(argv: list[str]) -> None:
    """Trains as the flags say."""
    del argv
    from flux_func.launch import memory, processes
    from flux_func.train import loop

    stop, device = cli.stop_requested(), cli.choose_device(flags.FLAGS.device)
    memory.keep_freed(device.type)
    processes.start(device)
    loop.train(flags.FLAGS.config, os.path.abspath(flags.FLAGS.workdir), device, stop)
    processes.stop()


if __name__ == "__main__":
    run()
