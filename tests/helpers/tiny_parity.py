"""Problems of parity so small that a reference answers one in this process in less than a second."""

from pathlib import Path
from typing import Any

from flux_func.models import flux
from flux_func.models.autoencoder import AutoencoderConfig
from flux_func.parity import compare, exchange, problem, process
from flux_func.parity.problem import Problem

VAE = AutoencoderConfig(kind="kl", ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1)


def pose(reference: str, cfg: flux.FluxConfig, **fields: Any) -> Problem:
    """Returns a problem of a transformer from weights that leave nothing out, and of a small autoencoder."""
    vae = problem.autoencoder_weights(VAE, 0, "cpu")
    usual = dict(parts=("transformer",), autoencoder_cfg=VAE, autoencoder_params=vae, height=32, width=48)
    return Problem(reference, cfg, flux.init(cfg, scheme="nonzero"), **{**usual, "text_tokens": 5, **fields})


def ask(posed: Problem, folder: Path) -> None:
    """Fills a folder with a problem and the reference's answers, which it gives in this process."""
    exchange.ask(posed, folder)
    process.answer_here(posed.reference, folder)


def solve(posed: Problem, folder: Path, corrupt: str | None = None) -> compare.Comparison:
    """Returns our side against the reference's, which answers in this process."""
    ask(posed, folder)
    return compare.compare(posed, compare.damaged(posed.params, corrupt) if corrupt else posed.params, folder)
