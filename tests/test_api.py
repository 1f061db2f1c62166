"""What `import flux_func as ff` gives, and what it does not drag in."""

import subprocess
import sys

import flux_func as ff

HEAVY = (
    *("jax", "orbax", "grain", "transformers", "datasets", "matplotlib", "sklearn", "scipy", "tensorboard", "torchao"),
    *("ml_collections", "absl", "torch._dynamo", "torch.distributed.tensor", "sympy"),
)  # fmt: skip


def test_the_names_are_there():
    for name in ff.__all__:
        assert getattr(ff, name) is not None
    for module, names in {
        ff.tree: ("flatten", "unflatten", "map", "leaves", "match", "select"),
        ff.autoencoder: ("init", "load", "encode", "decode"),
        ff.text: ("load", "encode", "tokenizer"),
        ff.optimizer: ("adamw", "from_torch", "schedule", "clip", "global_norm"),
    }.items():
        for name in names:
            assert callable(getattr(module, name))


def test_import_loads_nothing_that_only_programs_need():
    code = f"import flux_func, sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
