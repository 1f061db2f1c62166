"""FLUX small enough for a laptop: 258M parameters, two blocks of each kind, digits at 256 pixels, ten steps.

    train_main --config=configs/flux_debug.py --workdir=/tmp/flux_debug

Needs no download. On 2 cores about two minutes and 8 GB; the loss starts at about 1.2 and falls. To train on
photographs: --config.data.source=wds --config.data.path=SHARDS.tar
"""

from flux_func import config as defaults


def get_config():
    """Returns the config."""
    config = defaults.default()
    config.model.flavor = "flux-debug"
    config.train.batch_size = 2
    config.train.steps = 10
    config.optimizer.lr = 1e-4
    config.validate.every = 10
    config.validate.samples = 8
    config.validate.batch_size = 4
    config.sample.every = 10
    config.sample.steps = 4
    return config
