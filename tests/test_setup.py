import ast
import re
import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import build_files

ROOT = build_files.ROOT


@pytest.fixture(scope="module")
def package() -> dict:
    """What setup.py passes to setuptools."""
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", lambda **kwargs: said.update(kwargs))
        runpy.run_path("setup.py")
    return said


def foreign(prefix: str) -> set[str]:
    """Returns the distributions that the sources below a folder import."""
    files, rules = build_files.sources(ROOT), build_files.parse(ROOT)
    table = {rule.name: rule.attributes["actual"] for rule in rules if rule.folder == "third_party"}
    used = [build_files.uses(ROOT, file, build_files.modules(files))[1] for file in files if file.startswith(prefix)]
    return {canonicalize_name(table[name].removeprefix("@pypi//")) for name in set().union(*used)}


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def test_requires_what_the_package_imports(package):
    extras = package["extras_require"]
    required = names(package["install_requires"])
    optional = names(extras["hub"] + extras["parity"] + extras["wandb"] + extras["quant"])
    imported = foreign("flux_func/") | foreign("configs/") | foreign("docs/")
    assert imported - optional <= required
    # What we do not import ourselves: transformers' tokenizers and torch's event files need them.
    assert required - imported <= {"sentencepiece", "tensorboard"}
    assert foreign("tests/") - required - {"setuptools"} <= names(extras["test"])


def test_optional_packages_are_imported_by_functions_alone(package):
    optional = set().union(*(names(lines) for lines in package["extras_require"].values()))
    optional -= names(package["install_requires"])
    # The folders of BARE hold programs for other environments.
    ours = {name: file for name, file in build_files.modules(build_files.sources(ROOT)).items() if "." in name}
    for file in (ROOT / file for file in ours.values() if file.startswith("flux_func/")):
        top = [node for node in ast.parse(file.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        found = {canonicalize_name(name.split(".")[0]) for name in build_files.imported(ast.Module(top, []))}
        assert not found & optional, file


def test_torch_admits_the_versions_that_were_tried(package):
    torch = next(Requirement(line) for line in package["install_requires"] if line.startswith("torch"))
    tried = ("2.10.0", "2.11.0", "2.13.0", "2.13.0+cpu", "2.14.0")
    assert [torch.specifier.contains(version) for version in tried] == [False, True, True, True, False]


def test_the_lock_satisfies_every_requirement(package):
    lines = (ROOT / "third_party" / "requirements.txt").read_text().splitlines()
    pins = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in map(Requirement, lines)}
    extras = package["extras_require"]
    for requirement in map(Requirement, package["install_requires"] + extras["test"] + extras["wandb"]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_every_program_is_a_function_of_a_module(package):
    scripts = dict(line.split("=") for line in package["entry_points"]["console_scripts"])
    programs = {path.stem for path in (ROOT / "flux_func").glob("*_main.py")}
    assert set(scripts) == programs
    for name, target in scripts.items():
        assert target == f"flux_func.{name}:run"
        assert re.search(r"^def run\(", (ROOT / "flux_func" / f"{name}.py").read_text(), re.MULTILINE)


def test_packages_are_the_folders_of_flux_func_alone(package):
    inits = (ROOT / "flux_func").rglob("__init__.py")
    assert set(package["packages"]) == {".".join(path.parent.relative_to(ROOT).parts) for path in inits}


def test_the_licence_is_whole():
    text = (Path(ROOT) / "LICENSE").read_text()
    assert [f"\n   {i}. " in text for i in range(1, 10)] == [True] * 9
    assert "END OF TERMS AND CONDITIONS" in text and "APPENDIX: How to apply the Apache License" in text


def test_one_version(package):
    module = (ROOT / "MODULE.bazel").read_text()
    assert f'    name = "flux_func",\n    version = "{package["version"]}",' in module
