"""Digits in one step: trains a model of mean velocities by MeanFlow's jvp in time, samples it in a few steps, measures.

    python docs/meanflow.py --workdir=/tmp/flux_digits --out=/tmp/flux_meanflow
    python docs/meanflow.py --scratch --out=/tmp/flux_meanflow_scratch

The first begins from that run's flow-matching model (docs/digits.py trains it), the second from random weights. Prints
what docs/digits.py measures, on as many images from the same noise, for 1, 2 and 4 steps and for one of Euler's method
through the flow-matching model. OUT gets meanflow.safetensors (averaged weights, for `ff.load` and
`ff.meanflow.sample`), meanflow.json and meanflow.png. What to expect, from one run of each (seed 0, some 5 and 12
minutes of one core); Euler's single step is recognized too, but draws nearly one blur a class:

                          --workdir: recognized, novelty, variety     --scratch
  Euler's method, 1 step                 95.0%     1.27     0.61
  MeanFlow, 1 step                       98.0%     1.27     0.92      97.0%   1.20   0.87
  MeanFlow, 2 steps                      99.0%     1.13     0.81      97.5%   1.16   0.83
  MeanFlow, 4 steps                      98.0%     1.14     0.84      99.0%   1.08   0.78
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import digits
import numpy as np
import torch
from absl import flags
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import trange

import flux_func as ff
from flux_func import cli, random
from flux_func.data import images, sources
from flux_func.errors import UserError
from flux_func.flow import losses, meanflow
from flux_func.interop import target
from flux_func.train import encoders, metrics
from flux_func.transforms import ema

BATCH, DROPPED = 48, 0.1
CLASSES = np.repeat(np.arange(10), digits.PER_CLASS)


@dataclass(frozen=True)
class Recipe:
    """How to train: updates, learning rate, samples of a batch whose r is not t, and the guidance that is learned."""

    steps: int
    lr: float
    moving: int
    omega: float
    kappa: float


# A model that knows its velocities is soon guided by its own (kappa); another has only the data's to go by.
FINE_TUNED = Recipe(steps=350, lr=5e-4, moving=29, omega=0.6, kappa=0.5)
SCRATCH = Recipe(steps=900, lr=1.5e-3, moving=24, omega=1.2, kappa=0.0)


@dataclass(frozen=True)
class Data:
    """The training digits: latents [N, 16, 8, 8], classes [N]; txt [11, ...] and y [11, 768], the last of no prompt."""

    latents: Tensor
    classes: Tensor
    txt: Tensor
    y: Tensor
    decode: Callable[[Tensor], Tensor]


def main(argv: list[str]) -> None:
    """Trains, saves, samples, measures, draws."""
    del argv
    given, device = flags.FLAGS, cli.choose_device(flags.FLAGS.device)
    if bool(given.workdir) == given.scratch:
        raise UserError(f"--workdir is {given.workdir!r} and --scratch {given.scratch}: give one of the two")
    weights = Path(given.out) / "meanflow.safetensors"
    target.check(weights, 2**25, overwrite=True)  # what is wrong with it is said now, not after training
    plain = beginning(given.workdir, given.seed, device)
    data, samplers = read(device), {}
    if not given.scratch:
        samplers["Euler's method, 1 step"] = functools.partial(ff.sample, *plain, steps=1, shift=False)
    params, cfg = train(*plain, data, SCRATCH if given.scratch else FINE_TUNED, given.seed)
    ff.save(weights, params, cfg, overwrite=True)
    for steps in (1, 2, 4):
        name = f"MeanFlow, {steps} step{'s' * (steps > 1)}"
        samplers[name] = functools.partial(meanflow.sample, params, cfg, steps=steps)
    report({name: draw(sampler, data) for name, sampler in samplers.items()}, Path(given.out))


def beginning(workdir: str | None, seed: int, device: torch.device) -> tuple[dict, ff.FluxConfig]:
    """Returns the flow-matching model of a workdir, its averaged weights; without one, the same of random weights."""
    cfg = ff.flavor("flux-digits")
    if not workdir:
        return ff.init(cfg, seed, device=device), cfg
    params, found = ff.load(workdir, ema=True, device=device)
    if found != cfg:
        raise UserError(f"--workdir is {workdir!r}: its model is not that of configs/flux_digits.py")
    return params, cfg


def read(device: torch.device) -> Data:
    """Returns what is trained on, on the device."""
    config = digits.get_config()
    source, codec = sources.build(config, "train"), encoders.build(config, ff.flavor("flux-digits"), device)
    pairs = [source[i] for i in range(len(source))]
    pictures = np.stack([images.square(picture, config.data.image_size) for picture, _ in pairs])
    classes = torch.tensor([digits.DIGITS.index(caption.split()[-1]) for _, caption in pairs], device=device)
    encoded = codec.encode_text(codec.tokenize([*(f"a handwritten {name}" for name in digits.DIGITS), ""]))
    return Data(codec.encode_image(torch.from_numpy(pictures), None), classes, *encoded, codec.decode)


def train(params: dict, cfg: ff.FluxConfig, data: Data, recipe: Recipe, seed: int) -> tuple[dict, ff.FluxConfig]:
    """Returns (params, cfg) of a model of mean velocities that began as a flow-matching one; its averaged weights."""
    params, cfg = meanflow.from_flow_matching(params, cfg, seed)
    params = ff.tree.map(torch.clone, meanflow.slow(params))
    rate = ff.optimizer.schedule("cosine", recipe.lr, min(20, recipe.steps // 2), recipe.steps)
    optimizer = ff.optimizer.adamw(rate, betas=(0.9, 0.99), weight_decay=0.0)
    state, average = optimizer.init(params), ff.tree.map(torch.clone, params)
    for step in (bar := trange(recipe.steps, desc="training")):
        grads, loss = gradients(params, cfg, data, recipe, *batch_at(step, data, recipe, seed))
        grads, _ = ff.optimizer.clip(meanflow.slow(grads), 1.0)
        params, state = optimizer.update(grads, state, params)
        average = ema.update(average, params, ema.decay_at(step, 0.99))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return average, cfg


def batch_at(step: int, data: Data, recipe: Recipe, seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Returns a step's batch, its r [B], and whose prompt is dropped, bool [B]: draws counted by sample."""
    draws = [random.generator(seed, "meanflow", step * BATCH + i) for i in range(BATCH)]
    index = torch.tensor([draw.integers(len(data.latents)) for draw in draws])
    u = torch.from_numpy(np.stack([draw.random(3) for draw in draws], axis=1))
    noise = np.stack([draw.standard_normal(data.latents.shape[1:], dtype=np.float32) for draw in draws])
    # One step from t = 1 has the most to get right, and t near 1 is rare even so far towards noise.
    t, r = meanflow.times(u[:2], recipe.moving, ends=4, mean=0.8, std=1.4)
    dropped, device = u[2] < DROPPED, data.latents.device
    index, noise, t, r, dropped = (
        x.to(device) for x in (index, torch.from_numpy(noise), t.float(), r.float(), dropped)
    )
    prompt = torch.where(dropped, 10, data.classes[index])
    batch = {
        "latents": data.latents[index],
        "noise": noise,
        "timesteps": t,
        "txt": data.txt[prompt],
        "y": data.y[prompt],
    }
    return batch, r, dropped


def gradients(
    params: dict, cfg: ff.FluxConfig, data: Data, recipe: Recipe, batch: dict[str, Tensor], r: Tensor, dropped: Tensor
) -> tuple[dict, Tensor]:
    """Returns the gradients of the mean of `meanflow.loss`, and it; the jvp is made of those alone that move."""
    omega, kappa = torch.where(dropped, 1.0, recipe.omega), torch.where(dropped, 0.0, recipe.kappa)
    wanted = meanflow.guided(params, cfg, batch, omega, kappa, uncond_txt=data.txt[10:], uncond_y=data.y[10:])
    first = {name: value[: recipe.moving] for name, value in batch.items()}
    wanted[: recipe.moving] = meanflow.target(params, cfg, first, r[: recipe.moving], velocity=wanted[: recipe.moving])

    def loss(params: dict) -> Tensor:
        error = losses.flow_matching(params, cfg, {**batch, "guidance": batch["timesteps"] - r}, target=wanted)
        return (error / (error.detach() + 0.01) ** 0.75).mean()  # what is far off varies most

    return torch.func.grad_and_value(loss)(params)


def draw(sampler: Callable[..., Tensor], data: Data) -> np.ndarray:
    """Returns images float32 [200, 3, 64, 64] in [-1, 1], class by class, from the noise that docs/digits.py takes."""
    noise = np.stack([random.normal(1, "sample", i, data.latents.shape[1:]) for i in range(len(CLASSES))])
    with torch.no_grad():
        noise = torch.from_numpy(noise).to(data.latents.device)
        return data.decode(sampler(noise=noise, txt=data.txt[CLASSES], y=data.y[CLASSES])).clamp(-1, 1).cpu().numpy()


def report(samples: dict[str, np.ndarray], out: Path) -> None:
    """Prints a line for each way of sampling, and writes the figures and three images of each class."""
    figures = {name: digits.measure(drawn, CLASSES, digits.get_config()) for name, drawn in samples.items()}
    picture = Figure(figsize=(7, 2.5 * len(samples)), layout="constrained")
    for axis, (name, drawn) in zip(picture.subplots(len(samples), squeeze=False)[:, 0], samples.items(), strict=True):
        line = "{recognized:.1%} recognized, novelty {novelty:.2f}, variety {variety:.2f}".format(**figures[name])
        print(f"{name}: {line}")
        shown = np.pad(drawn.mean(1), [(0, 0), (3, 3), (3, 3)], constant_values=1).reshape(10, -1, 70, 70)[:, :3]
        axis.imshow(shown.transpose(1, 2, 0, 3).reshape(3 * 70, 10 * 70), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(f"{name}: {line}", fontsize=10)
        axis.set_axis_off()
    metrics.write_json(out / "meanflow.json", figures)
    picture.savefig(out / "meanflow.new.png", dpi=110, metadata={"Software": None})
    (out / "meanflow.new.png").replace(out / "meanflow.png")


if __name__ == "__main__":
    cli.define_workdir("Folder of a digits run, whose flow-matching model is where training begins.", required=False)
    flags.DEFINE_bool("scratch", False, "Whether to begin with random weights instead.")
    flags.DEFINE_string("out", None, "Folder for the weights, the figures and the picture.", required=True)
    flags.DEFINE_integer("seed", 0, "Of every draw in training.")
    cli.define_device()
    cli.run(main)
