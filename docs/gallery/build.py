"""Draws the gallery's pictures again.

    python docs/gallery/build.py --workdir=/tmp/flux_digits

The digits model is trained into the workdir first where it is not there yet (5 to 10 minutes on 2 cores); the pictures
take 6 minutes more.
"""

import importlib
import time

import matplotlib.pyplot as plt
from absl import flags
from gallery import HERE, define_workdir, load, save

from flux_func import cli

SCRIPTS = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("build", "gallery"))


def main(argv: list[str]) -> None:
    """Draws them all, or those that are asked for."""
    del argv
    digits = load(flags.FLAGS.workdir)
    for name in flags.FLAGS.only or SCRIPTS:
        start = time.monotonic()
        figure = importlib.import_module(name).picture(digits)
        save(figure, HERE / f"{name}.png")
        plt.close(figure)
        print(f"{name}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    define_workdir()
    flags.DEFINE_multi_enum("only", [], SCRIPTS, "A script to draw; again for more.")
    cli.run(main)
