"""Time and memory beside other implementations of FLUX, each in a process of its own; see `flux_func/bench_main.py`."""
