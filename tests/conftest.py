"""One thread to a process, so that `pytest -n 2` is two cores; and no look at any hub, nor at a screen."""

import os

# Read when torch, transformers and matplotlib are first imported, here and in the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
