"""The package flux-func: `pip install -e .`, or `pip install -e ".[test]"` to run the tests too."""

from pathlib import Path

import setuptools

HERE = Path(__file__).parent
HUB = "huggingface_hub>=2.4"

# A lower bound is the oldest version that the tests ran with, torch's apart. torch has an upper bound too, the newest
# they ran with: what we build on (torch.func, autograd.Function, the fused optimizers) moves between its versions.
REQUIRES = [
    "absl-py>=2.1",
    "einops>=0.8",
    "grain>=0.2.18",
    HUB,
    "jax>=0.10.1",  # Orbax's arrays: checkpoints alone use it, and only on the CPU
    "matplotlib>=3.9",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "optree>=0.17",
    "orbax-checkpoint>=0.12.8",
    "pillow>=11.0",
    "safetensors>=0.8",
    "scikit-learn>=1.6",
    "scipy>=1.14",
    "sentencepiece>=0.2",
    "tensorboard>=2.19",
    "tensorstore>=0.1.84",  # what Orbax writes by: a part of a leaf is read through it
    "torch>=2.11,<2.14",
    "tqdm>=4.67",
    "transformers>=5.23",
]
# The references that we compare with are pinned: third_party/README.md says what each is.
REFERENCES = ["diffusers==0.42.1", "fluxbfl==0.0.3"]
DATASETS = ["datasets>=5.2", "fsspec>=2025.3", HUB]
EXTRAS = {
    "test": [
        *REFERENCES,
        *DATASETS,
        "hypothesis>=6.150",
        "jsonschema>=4.26",
        "ml-dtypes>=0.5",
        "packaging>=25.0",
        "peft>=0.21",
        "psutil>=7.0",
        "pytest>=9.0",
        "pytest-xdist>=3.8",
        "pyyaml>=6.0",
        "ruff>=0.17.5,<0.18",  # another minor version may format otherwise
        "tokenizers>=0.23",
        "torchao>=0.18",
    ],
    "parity": REFERENCES,
    "bench": REFERENCES,
    "hub": DATASETS,
    "quant": ["torchao>=0.18"],
    "wandb": ["wandb>=0.31"],
}

setuptools.setup(
    name="flux-func",
    version="0.1.0",
    description="FLUX, the text-to-image transformer, as pure functions over pytrees of parameters, in PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["flux_func", "flux_func.*"]),
    # Programs for the references' own environments: no package, since one of their names would hide another's.
    package_data={"flux_func.parity": ["references/*.py"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "convert_main=flux_func.convert_main:run",
            "train_main=flux_func.train_main:run",
            "sample_main=flux_func.sample_main:run",
            "parity_main=flux_func.parity_main:run",
            "plan_main=flux_func.plan_main:run",
            "bench_main=flux_func.bench_main:run",
        ]
    },
)
