"""What is sampled from is what the checkpoint, or the pipeline, says of itself."""

import json

import pytest
import torch

from flux_func import tree
from flux_func.errors import UserError
from flux_func.models import flux
from flux_func.train import checkpoint, origin
from tests.helpers import tiny_pipeline, tiny_run
from tests.helpers.tiny_run import CPU

CFG = flux.FluxConfig(48, 3, 1, 1, (4, 6, 6), guidance_embed=True, qk_norm_eps=1e-5)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run whose config leaves the model's shape to weights that are gone."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_run.config({"model.flavor": "", "model.weights": "/gone", "model.init": "pretrain"})
    saved = json.loads(json.dumps(config.to_dict()))
    (folder / "config.json").write_text(json.dumps(saved))
    state = {"params": flux.init(CFG, seed=1), "ema": flux.init(CFG, seed=2), "opt": {"step": torch.zeros(())}}
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state, CFG, saved, wait=True)
    return str(folder)


@pytest.mark.parametrize(("ema", "seed"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_runs_model_is_its_checkpoints(workdir, ema, seed, dtype):
    found = origin.of_run(workdir, None, ema)
    assert found.cfg == CFG and found.about == {"flavor": "", "step": 3, "ema": ema}
    for leaf, expected in zip(tree.leaves(found.load(dtype)), tree.leaves(flux.init(CFG, seed=seed)), strict=True):
        assert torch.equal(leaf, expected.to(dtype))
    assert found.encoders(found.config, CPU).tokenize(["a three"])["t5"].shape == (1, 4)


def test_what_a_workdir_lacks_is_named(workdir, tmp_path):
    with pytest.raises(UserError, match=r"--step is 7: should be one of 3, which "):
        origin.of_run(workdir, 7)
    with pytest.raises(
        UserError, match=r"config.json cannot be read \(No such file or directory\); should be the --wo"
    ):
        origin.of_run(str(tmp_path))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float32], "float32"),
        ([torch.bfloat16], "bfloat16"),
        ([torch.float16], "bfloat16"),
        ([torch.float32, torch.bfloat16], "bfloat16"),
    ],
)
def test_a_pipeline_is_computed_in_what_its_weights_are_stored_in(tmp_path, dtypes, expected):
    from safetensors.torch import load_file, save_file

    folder = tiny_pipeline.whole(tmp_path / "pipe")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    flat = load_file(file)
    save_file({name: leaf.to(dtypes[i % len(dtypes)]) for i, (name, leaf) in enumerate(flat.items())}, file)
    found = origin.of_pipeline(str(folder))
    assert found.config.numerics.compute == expected
    params = found.load(torch.float32)
    assert {leaf.dtype for leaf in tree.leaves(params)} == {torch.float32}
    assert tree.map(lambda leaf: leaf.shape, params) == tree.map(lambda leaf: leaf.shape, flux.abstract(found.cfg))
