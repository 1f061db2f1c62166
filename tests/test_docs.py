"""What the documents show runs, and what they link to is there."""

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import flux_func as ff
from flux_func import tree
from flux_func.errors import UserError
from tests.helpers import tiny_run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), ROOT / "third_party/README.md"]


def block(page, language):
    return re.search(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL).group(1)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_readmes_fifteen_lines_run_and_agree():
    source = block(ROOT / "README.md", "python")
    assert len(source.strip().splitlines()) <= 16
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(source.split("opt = ")[0], "README.md", "exec"), names)
    mean = tree.map(lambda leaf: leaf.mean(0), names["each"])
    reference = torch.func.grad(names["ff"].loss)(names["params"], names["cfg"], names["batch"])
    for path, grad in tree.flatten(reference).items():
        for ours in (names["grads"], mean):
            assert (tree.flatten(ours)[path] - grad).norm() <= 2e-6 * grad.norm(), path
    before = tree.map(torch.clone, names["params"])
    exec(compile("opt = " + source.split("opt = ")[1], "README.md", "exec"), names)
    moved = (tree.leaves(names["params"])[0] - tree.leaves(before)[0]).abs().max()
    # AdamW's first step moves a weight by the learning rate, and by a hundred-thousandth of it in weight decay.
    assert moved.item() == pytest.approx(1e-4, rel=0.1)
    assert names["latents"].shape == (4, 16, 8, 8) and names["latents"].isfinite().all()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_named_in_pages_exist(page):
    for program in re.findall(r"\b(\w+_main)\b", page.read_text(encoding="utf-8")):
        assert (ROOT / "flux_func" / f"{program}.py").exists(), program


def load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_three_figures_of_the_digits_are_what_they_say():
    digits = load("digits")
    config = digits.get_config()
    source = digits.sources.build(config, "validation")
    pictures = np.stack([digits.images.square(source[i][0], 64) for i in range(len(source))])
    classes = np.array([digits.DIGITS.index(source[i][1].split()[-1]) for i in range(len(source))])
    # Real digits held out from training are as novel and nearly as various as themselves, and all are recognized.
    figures = digits.measure(pictures, classes, config)
    assert figures["recognized"] >= 0.99 and figures["recognized_real"] >= 0.97
    assert figures["novelty"] == pytest.approx(1) and figures["variety"] == pytest.approx(1, abs=0.1)
    # Wrongly prompted, copied, or all alike, they are found out.
    assert digits.measure(pictures, (classes + 1) % 10, config)["recognized"] < 0.05
    train, train_classes = digits.real(config, "train")
    copies = train.reshape(-1, 1, 8, 8).repeat(8, axis=2).repeat(8, axis=3)
    assert digits.measure(copies, train_classes, config)["novelty"] == pytest.approx(0, abs=1e-6)
    alike = np.stack([pictures[np.argmax(classes == c)] for c in classes])
    assert digits.measure(alike, classes, config)["variety"] == 0


def test_the_digits_are_drawn_by_a_runs_averaged_weights(tmp_path):
    tiny_run.train(tmp_path, {"ema.decay": 0.5, "data.image_size": 64, "sample.steps": 1, "train.steps": 1})
    samples = load("digits").draw(str(tmp_path), tiny_run.CPU)
    assert samples.shape == (200, 3, 64, 64) and abs(samples).max() <= 1


def test_the_meanflow_digits_are_trained_measured_and_drawn(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "docs")  # it imports digits.py beside it
    program, cpu = load("meanflow"), torch.device("cpu")
    data, recipe = program.read(cpu), dataclasses.replace(program.FINE_TUNED, steps=2)
    cfg = ff.FluxConfig(hidden_size=24, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(4, 4, 4))
    plain = ff.init(cfg, scheme="nonzero")
    (params, told), (same, _), (other, _) = (program.train(plain, cfg, data, recipe, seed) for seed in (3, 3, 4))
    assert all(map(torch.equal, tree.leaves(params), tree.leaves(same)))
    assert not torch.equal(tree.leaves(params)[0], tree.leaves(other)[0])
    # The loss is meanflow.loss, of which it leaves out what needs no jvp.
    batch, r, dropped = program.batch_at(1, data, recipe, 3)
    assert dropped.any() and all(torch.equal(txt, data.txt[10]) for txt in batch["txt"][dropped])
    assert int((r < batch["timesteps"]).sum()) == recipe.moving
    omega, kappa = torch.where(dropped, 1.0, recipe.omega), torch.where(dropped, 0.0, recipe.kappa)
    uncond = {"uncond_txt": data.txt[10:], "uncond_y": data.y[10:]}
    velocity = ff.meanflow.guided(params, told, batch, omega, kappa, **uncond)

    def loss(params):
        return ff.meanflow.loss(params, told, batch, r, velocity=velocity, power=0.75, floor=0.01).mean()

    ours, expected = program.gradients(params, told, data, recipe, batch, r, dropped)[0], torch.func.grad(loss)(params)
    for grad, reference in zip(tree.leaves(ours), tree.leaves(expected), strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-6)
    drawn = program.draw(functools.partial(ff.meanflow.sample, params, told), data)
    assert drawn.shape == (200, 3, 64, 64)
    program.report({"MeanFlow, 1 step": drawn}, tmp_path)
    assert re.match(r"MeanFlow, 1 step: \d+\.\d% recognized, novelty \d\.\d\d, variety", capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {"meanflow.json", "meanflow.png"}
    with pytest.raises(UserError, match="nowhere: there is no checkpoint in it"):
        program.beginning("nowhere", 0, cpu)


def test_the_api_page_is_what_the_docstrings_say(monkeypatch):
    module = load("api")
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == module.page(), "python docs/api.py"
    for page in module.modules():
        for name in module.names_of(page):
            assert getattr(page, name).__doc__, f"{page.__name__}.{name} should have a docstring"
