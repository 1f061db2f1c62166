"""A LoRA of FLUX.1-dev on your own images, at 512 pixels: the weights stay as they are, 26 GB with all that is trained.

    train_main --config=configs/flux_dev_lora.py --workdir=DIR --config.data.path=IMAGES \\
        --config.model.weights=FLUX.1-dev --config.autoencoder.path=FLUX.1-dev --config.text.path=FLUX.1-dev
    convert_main --from=DIR --to=mine.safetensors --format=diffusers
    sample_main --weights=FLUX.1-dev --lora=mine.safetensors --prompt="..."

IMAGES is a folder of images, each with a .txt caption beside it; FLUX.1-dev the folder of the whole pipeline as
diffusers lays it out. docs/lora.md says what may differ, and configs/flux_dev_finetune.py why guidance is 1 in tuning.
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
    config.data.prompt_dropout = 0.0
    config.data.workers = 4
    config.lora.rank = 16
    config.train.batch_size = 4
    config.train.accumulate = 4
    config.train.steps = 2000
    config.train.timesteps = "logit_normal"
    config.train.shift = True
    config.train.guidance = 1.0
    config.optimizer.lr = 1e-4
    config.optimizer.betas = (0.9, 0.999)
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_steps = 50
    config.remat.policy = "full"
    config.numerics.compute = "bfloat16"  # and so what the weights are kept in
    config.sample.every = 250
    config.sample.steps = 28
    config.sample.guidance = 3.5
    config.checkpoint.every = 250
    config.log.every = 10
    return config
