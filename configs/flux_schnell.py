"""FLUX.1-schnell's shape from scratch, 11.9B parameters at 256 pixels, with torchtitan's hyperparameters.

    train_main --config=configs/flux_schnell.py --workdir=DIR \\
        --config.data.path='cc12m/*.tar' --config.autoencoder.path=ae.safetensors --config.text.path=FLUX.1-schnell

As flux_dev.py, but for 256 text tokens and a global batch of 512, 64 for each of 8 ranks.
"""

from flux_func import config as defaults


def get_config():
    """Returns the config."""
    config = defaults.default()
    config.model.flavor = "flux-schnell"
    config.autoencoder.kind = "kl"
    config.text.kind = "hf"
    config.text.max_length = 256
    config.data.source = "wds"
    config.data.image_size = 256
    config.data.prompt_dropout = 0.447
    config.data.workers = 8
    config.train.batch_size = 512
    config.train.steps = 30_000
    config.optimizer.lr = 1e-4
    config.optimizer.warmup_steps = 3000
    config.remat.policy = "full"
    config.numerics.compute = "bfloat16"
    config.validate.every = 1000
    config.validate.convention = "middle"
    config.validate.images = 8
    config.sample.steps = 50
    config.sample.cfg_scale = 5.0
    config.checkpoint.every = 1000
    config.log.every = 100
    return config
