"""What the gallery's scripts share: the digits model, the digits, and how a picture is kept.

A script of the gallery is a function `picture(digits)` that returns a matplotlib figure; `run(picture)` makes it a
program of its own, and build.py draws them all. `show` is for rows of images, `memory` for what a call allocates.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from absl import flags  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from torch import Tensor  # noqa: E402

import flux_func as ff  # noqa: E402
from flux_func import cli, random  # noqa: E402
from flux_func.data import images, sources  # noqa: E402
from flux_func.train import checkpoint, encoders, loop  # noqa: E402

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "configs"))
from flux_digits import DIGITS, get_config  # noqa: E402 (configs/ is a folder of files, not a package)


@dataclass(frozen=True)
class Digits:
    """A FLUX that draws digits, and the real ones.

    Attributes:
      params, cfg: the model: averaged weights, float32.
      latents: of the training digits [N, 16, 8, 8]; held_out: of the validation split, [M, 16, 8, 8].
      classes: int64 [N]; held_out_classes: int64 [M].
      txt, y: the prompts "a handwritten zero" to "nine", [10, 4, 4096] and [10, 768]; the 11th is no prompt.
      decode: latents [b, 16, 8, 8] to images, float32 [b, 64, 64] in [0, 1].
    """

    params: dict
    cfg: ff.FluxConfig
    latents: Tensor
    classes: Tensor
    held_out: Tensor
    held_out_classes: Tensor
    txt: Tensor
    y: Tensor
    decode: Callable[[Tensor], np.ndarray]

    def batch(self, index: Tensor, t: Tensor | float, seed: int = 0, held_out: bool = False) -> dict[str, Tensor]:
        """Returns a batch of `ff.loss` of the digits `index` [B] at timesteps t, noise being drawn by `seed`."""
        latents, classes = (self.held_out, self.held_out_classes) if held_out else (self.latents, self.classes)
        chosen, drawn = latents[index], classes[index]
        noise = np.stack([random.normal(seed, "gallery", i, chosen.shape[1:]) for i in range(len(index))])
        return {
            "latents": chosen,
            "noise": torch.from_numpy(noise),
            "timesteps": torch.as_tensor(t, dtype=torch.float32).expand(len(index)),
            "txt": self.txt[drawn],
            "y": self.y[drawn],
        }


def load(workdir: str) -> Digits:
    """Returns the digits model of a workdir, trained there by configs/flux_digits.py if that is not done yet."""
    config, device = get_config(), torch.device("cpu")
    if checkpoint.latest(workdir) != config.train.steps:
        loop.train(config, workdir, device, cli.stop_requested())
    return _of(config, *ff.load(workdir, ema=True))


def untrained() -> Digits:
    """Returns the same around a small model of random weights: what the tests draw."""
    cfg = ff.FluxConfig(hidden_size=24, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(4, 4, 4))
    return _of(get_config(), ff.init(cfg, scheme="nonzero"), cfg)


def _of(config: ConfigDict, params: dict, cfg: ff.FluxConfig) -> Digits:
    codec = encoders.build(config, cfg, torch.device("cpu"))
    prompts = [*(f"a handwritten {name}" for name in DIGITS), ""]
    splits = [_split(config, codec, split) for split in ("train", "validation")]
    decode = lambda latents: codec.decode(latents).mean(1).add(1).div(2).clamp(0, 1).numpy()  # noqa: E731
    return Digits(params, cfg, *splits[0], *splits[1], *codec.encode_text(codec.tokenize(prompts)), decode)


def _split(config: ConfigDict, codec: encoders.Encoders, split: str) -> tuple[Tensor, Tensor]:
    source, size = sources.build(config, split), config.data.image_size
    pairs = [source[i] for i in range(len(source))]
    pictures = torch.from_numpy(np.stack([images.square(picture, size) for picture, _ in pairs]))
    return codec.encode_image(pictures, None), torch.tensor([DIGITS.index(text.split()[-1]) for _, text in pairs])


def show(rows: dict[str, np.ndarray], title: str) -> Figure:
    """Draws rows of images [n, h, w] in [0, 1] of which each has a name; the title stands above."""
    count = max(map(len, rows.values()))
    height = 0.8 * len(rows) + 0.5
    figure, axes = plt.subplots(len(rows), count, figsize=(0.8 * count + 1, height), squeeze=False)
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, row, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.subplots_adjust(wspace=0.06, hspace=0.06)
    figure.suptitle(title, y=0.88 + 0.1 / height, va="bottom")
    return figure


def memory(run: Callable[[], object]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (seconds since the first, MiB allocated since then) at every allocation and release while `run` runs."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch 2.13 would log that a profile starts and stops
    with torch.profiler.profile(profile_memory=True) as profile:
        result = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    del result
    seconds = np.array([event.start_ns() for event in events]) / 1e9
    return seconds - seconds[0], np.cumsum([event.nbytes() for event in events]) / 2**20


def define_workdir() -> None:
    """Defines --workdir."""
    cli.define_workdir("Folder of the digits run; trained into where it holds none.")


def run(picture: Callable[[Digits], Figure]) -> None:
    """Makes a script a program: `python docs/gallery/NAME.py --workdir=/tmp/flux_digits`."""
    global __doc__
    __doc__ = picture.__globals__["__doc__"]  # --help prints that of main's file, which is this one
    define_workdir()

    def main(argv: list[str]) -> None:
        save(picture(load(flags.FLAGS.workdir)), HERE / f"{Path(argv[0]).stem}.png")

    cli.run(main)


def save(figure: Figure, path: Path) -> None:
    """Writes a picture, beside and renamed."""
    beside = path.with_suffix(".new.png")
    figure.savefig(beside, dpi=110, bbox_inches="tight", metadata={"Software": None})
    beside.replace(path)
    print(path)
