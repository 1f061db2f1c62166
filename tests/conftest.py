"""One thread to a process, so that `pytest -n 2` is two cores; no look at any hub, nor at a screen; Ctrl-C as usual."""

import os
import signal

# Read when torch, transformers and matplotlib are first imported, here and in the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# A shell has what it starts in the background ignore Ctrl-C, and all that is started from there; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
