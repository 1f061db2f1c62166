"""FLUX.1-dev tuned on your own images, all 11.9B parameters of it, at 512 pixels.

    train_main --config=configs/flux_dev_finetune.py --workdir=DIR --config.data.path=IMAGES \\
        --config.model.weights=FLUX.1-dev --config.autoencoder.path=FLUX.1-dev --config.text.path=FLUX.1-dev

IMAGES is a folder of images, each with a .txt caption beside it; FLUX.1-dev the folder of the whole pipeline as
diffusers lays it out. Any model of text to image can stand in its place (Krea, or schnell with text.max_length=256).

dev has guidance distilled into it: it is told a value and draws as classifier-free guidance of that value would. At 1
that is no guidance, which is what this loss teaches, so 1 is what it is told in tuning: what it does at 3.5 follows.
Told 3.5 in tuning, it would be taught to draw at 3.5 without guidance, and washes out.

Parameters and AdamW's moments are kept in float32, in which a step of 1e-5 is not rounded away: 190 GB with the
gradients. --config.numerics.param=bfloat16 halves that, and most of so small a step is lost.
"""

from flux_func import config as defaults


def get_config():
    """Returns the config."""
    config = defaults.default()
    config.model.flavor = ""  # the weights' own shape
    config.autoencoder.kind = "kl"
    config.text.kind = "hf"
    config.text.max_length = 512
    config.data.source = "folder"
    config.data.image_size = 512
    config.data.prompt_dropout = 0.0  # dev needs no empty prompt: it is drawn from without classifier-free guidance
    config.data.workers = 4
    config.train.batch_size = 8
    config.train.accumulate = 8
    config.train.steps = 2000
    config.train.timesteps = "logit_normal"
    config.train.shift = True
    config.train.guidance = 1.0
    config.optimizer.lr = 1e-5
    config.optimizer.betas = (0.9, 0.999)
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_steps = 100
    config.remat.policy = "full"
    config.numerics.compute = "bfloat16"
    config.validate.every = 250
    config.validate.batch_size = 1
    config.sample.every = 250
    config.sample.steps = 28
    config.sample.guidance = 3.5
    config.checkpoint.every = 500
    config.checkpoint.keep_last = 1
    config.checkpoint.last_weights_only = True
    config.checkpoint.export_dtype = "bfloat16"
    config.log.every = 10
    return config
