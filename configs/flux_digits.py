"""A small FLUX that learns to draw handwritten digits at 64 pixels on 2 cores in minutes.

    train_main --config=configs/flux_digits.py --workdir=/tmp/flux_digits
    sample_main --workdir=/tmp/flux_digits --prompt="a handwritten three" --prompt="a handwritten eight"

Its prompts are "a handwritten zero" to "a handwritten nine". `python docs/digits.py --workdir=/tmp/flux_digits`
measures what it draws.
"""

from flux_func import config as defaults

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def get_config():
    """Returns the config."""
    config = defaults.default()
    config.model.flavor = "flux-digits"
    config.text.max_length = 4
    config.data.image_size = 64
    config.train.batch_size = 64
    config.train.steps = 900
    # 64 pixels of a digit are smooth, so that little is left to learn at low noise: train where the shape is decided.
    config.train.timesteps = "logit_normal"
    config.train.shift = True
    config.optimizer.lr = 2e-3
    config.optimizer.betas = (0.9, 0.99)
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 40
    config.optimizer.schedule = "cosine"
    config.ema.decay = 0.99
    config.validate.every = 300
    config.validate.samples = 128
    config.validate.batch_size = 128
    config.sample.every = 300
    config.sample.prompts = tuple(f"a handwritten {digit}" for digit in DIGITS)
    config.sample.steps = 25
    config.sample.cfg_scale = 1.5
    config.log.every = 10
    return config
