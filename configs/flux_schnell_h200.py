"""The whole of FLUX.1-schnell's shape, 11.9B parameters, trained on one H200: bfloat16 alone, and moments in 8 bits.

    train_main --config=configs/flux_schnell_h200.py --workdir=DIR
    plan_main --config=configs/flux_schnell_h200.py --mesh=shard=1 --device=h200

On digits, with nothing to download; FLUX's own encoders and photographs are as in flux_schnell.py. Of 140 GiB
parameters, gradients and moments are 67, and micro-batches of 12 samples take 56 without recomputation, so that 123 are
in use (counted eager, by the second command; compiled it is less). At 1024 pixels a micro-batch is one sample, and 109
GiB are in use: --config.data.image_size=1024 --config.text.max_length=512 --config.train.batch_size=4. A checkpoint is
48 GB. docs/h200.py measures the steps. PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment lets what is
freed serve pieces of any size.
"""

from flux_func import config as defaults


def get_config():
    """Returns the config."""
    config = defaults.default()
    config.model.flavor = "flux-schnell"
    config.train.batch_size = 48
    config.train.accumulate = 4
    config.train.steps = 1000
    config.numerics.param = "bfloat16"
    config.numerics.compute = "bfloat16"
    config.numerics.reduce = "bfloat16"
    config.optimizer.moments = "8bit"
    config.optimizer.warmup_steps = 100
    config.compile.enabled = True
    config.checkpoint.every = 500
    return config
