"""How good are the digits? Trains configs/flux_digits.py where that is not done yet, samples and measures.

    python docs/digits.py --workdir=/tmp/flux_digits

Samples 20 images of each prompt and prints three figures, on images averaged down to scikit-learn's own 8x8 pixels:

  recognized  share that a classifier trained on the real digits (a support vector machine with a Gaussian kernel and
              C = 10) names as prompted; its own accuracy on real digits by 5-fold cross-validation stands beside it
  novelty     median distance to the nearest training digit, over that of the digits held out from training: far
              below 1, the samples would be copies
  variety     mean distance between the samples of a class, over that of the real ones: far below 1, they would be one
              prototype a class

and writes WORKDIR/digits.png, a column a class.
"""

import json
import os
import sys

import numpy as np
from absl import flags
from scipy.spatial.distance import cdist, pdist
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import SVC

from flux_func import cli
from flux_func import config as configs
from flux_func.data import images, sources
from flux_func.train import checkpoint, encoders, generate, loop, metrics

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "configs"))
from flux_digits import DIGITS, get_config  # noqa: E402 (configs/ is a folder of files, not a package)

PER_CLASS = 20


def main(argv: list[str]) -> None:
    """Trains if need be, samples, measures, prints."""
    del argv
    workdir, device = flags.FLAGS.workdir, cli.choose_device(flags.FLAGS.device)
    config = get_config()
    if checkpoint.latest(workdir) != config.train.steps:
        loop.train(config, workdir, device, cli.stop_requested())
    samples = draw(workdir, device)
    names = [f"a handwritten {name}" for name in DIGITS]
    order = [c * PER_CLASS + row for row in range(10) for c in range(10)]
    images.save(
        images.grid(samples[order], [names[i // PER_CLASS] for i in order], columns=10), f"{workdir}/digits.png"
    )
    figures = measure(samples, np.repeat(np.arange(10), PER_CLASS), config)
    print(json.dumps(figures, indent=2))
    metrics.write_json(f"{workdir}/digits.json", figures)


def draw(workdir: str, device) -> np.ndarray:
    """Returns images float32 [200, 3, 64, 64] in [-1, 1], class by class, from the averaged weights."""
    step = checkpoint.latest(workdir)
    config = configs.default()
    config.update(checkpoint.read_config(workdir, step))
    cfg, s, size = checkpoint.read_model(workdir, step), config.sample, config.data.image_size
    params = checkpoint.restore(workdir, step, {"ema": checkpoint.abstract(workdir, step)["ema"]}, device)["ema"]
    return generate.generate(
        params,
        cfg,
        encoders.build(config, cfg, device),
        [f"a handwritten {name}" for name in DIGITS for _ in range(PER_CLASS)],
        seed=1,
        height=size,
        width=size,
        steps=s.steps,
        cfg_scale=s.cfg_scale,
        shift=s.shift,
        batch_size=100,
    ).numpy()


def measure(samples: np.ndarray, prompted: np.ndarray, config) -> dict[str, float]:
    """Returns the three figures of samples [N, 3, 64, 64] and the classes int [N] that they were prompted as."""
    train, train_class = real(config, "train")
    held_out, held_out_class = real(config, "validation")
    everything, classes = np.concatenate([train, held_out]), np.concatenate([train_class, held_out_class])
    drawn, classifier = small(samples), SVC(C=10)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return {
        "recognized": float((classifier.fit(everything, classes).predict(drawn) == prompted).mean()),
        "recognized_real": float(cross_val_score(classifier, everything, classes, cv=folds).mean()),
        "novelty": float(np.median(nearest(drawn, train)) / np.median(nearest(held_out, train))),
        "variety": spread(drawn, prompted) / spread(everything, classes),
    }


def real(config, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a split's digits, float [N, 64], and their classes, int [N]."""
    source, size = sources.build(config, split), config.data.image_size
    pairs = [source[i] for i in range(len(source))]
    pictures = np.stack([images.square(picture, size) for picture, _ in pairs])
    return small(pictures), np.array([DIGITS.index(caption.split()[-1]) for _, caption in pairs])


def small(pictures: np.ndarray) -> np.ndarray:
    """Returns images [N, 3, 64, 64] as scikit-learn has them: [N, 64], the means of 8x8 pixels."""
    return pictures.mean(axis=1).reshape(-1, 8, 8, 8, 8).mean(axis=(2, 4)).reshape(-1, 64)


def nearest(these: np.ndarray, those: np.ndarray) -> np.ndarray:
    """Returns the distance of each of `these` to the nearest of `those`."""
    return cdist(these, those).min(axis=1)


def spread(pictures: np.ndarray, classes: np.ndarray) -> float:
    """Returns the mean distance between two images of one class, averaged over the classes."""
    return float(np.mean([pdist(pictures[classes == c]).mean() for c in range(10)]))


if __name__ == "__main__":
    cli.define_workdir("Folder of the run; trained into where it holds none.")
    cli.define_device()
    cli.run(main)
