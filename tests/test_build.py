import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests import build_files

TOP = {"flux_func", "configs", "tests", "third_party", "docs", "setup.py", "README.md", "pyproject.toml"}
TOP |= {"BUILD", "MODULE.bazel", "LICENSE", "CONTRIBUTING.md"}
# A house of one model, one program and one test.
SMALL = {
    "setup.py": "import setuptools",
    "flux_func/__init__.py": "from flux_func.models import flux as flux",
    "flux_func/tree.py": "import optree",
    "flux_func/models/__init__.py": "",
    "flux_func/models/flux.py": "import os\nfrom flux_func import tree\n\ndef f():\n    import torch.nn as nn",
    "flux_func/train_main.py": "from flux_func.models import flux\nif __name__ == '__main__':\n    pass",
    "configs/flux_debug.py": "",
    "tests/conftest.py": "",
    "tests/test_train_main.py": 'COMMAND = ["python", "-m", "flux_func.train_main"]',
    "BUILD": 'py_library(name="setup", srcs=["setup.py"], deps=["//third_party:setuptools"])',
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The house of SMALL, its BUILD files as they should be."""
    for name, text in SMALL.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write(tmp_path)
    assert build_files.problems(tmp_path) == []
    return tmp_path


def write(root: Path) -> None:
    for file, text in build_files.build_files(root).items():
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text(text)


def deps(root: Path) -> dict[str, list[str]]:
    return {rule.label: rule.attributes["deps"] for rules in build_files.plan(root).values() for rule in rules}


def test_the_house():
    assert build_files.problems(build_files.ROOT) == []


def test_nothing_else_is_at_the_top():
    if not (build_files.ROOT / ".git").exists():
        pytest.skip("not a checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=build_files.ROOT, capture_output=True, text=True, check=True)
    top = {name.split("/")[0] for name in tracked.stdout.splitlines() if not name.startswith(".")}
    assert top <= TOP


def test_what_is_imported_is_locked():
    rules = build_files.parse(build_files.ROOT)
    table = {rule.name: rule.attributes["actual"] for rule in rules if rule.folder == "third_party"}
    lock = (build_files.ROOT / "third_party" / "requirements.txt").read_text()
    pins = re.findall(r"^([\w.-]+)==\S+$", lock, re.MULTILINE)
    assert len(pins) == len([line for line in lock.splitlines() if not line.startswith("#")])
    assert {target.removeprefix("@pypi//") for target in table.values()} <= {
        pin.lower().replace("-", "_") for pin in pins
    }


def test_the_module_reads_the_lock_under_the_name_that_the_table_has():
    calls = {
        ast.unparse(node.func): {word.arg: ast.literal_eval(word.value) for word in node.keywords}
        for node in ast.walk(ast.parse((build_files.ROOT / "MODULE.bazel").read_text()))
        if isinstance(node, ast.Call)
    }
    assert calls["pip.parse"]["hub_name"] == "pypi"
    assert calls["pip.parse"]["requirements_lock"] == "//third_party:requirements.txt"
    assert calls["pip.parse"]["python_version"] == calls["python.toolchain"]["python_version"]


def test_dependencies_are_the_imports(small):
    assert deps(small) == {
        "//:setup": ["//third_party:setuptools"],
        "//configs:configs": [],
        "//flux_func:flux_func": ["//flux_func/models"],
        "//flux_func:train_main": ["//flux_func/models"],
        "//flux_func:tree": ["//third_party:optree"],
        "//flux_func/models:models": ["//flux_func:tree", "//third_party:torch"],
        "//tests:tests": [],
        "//tests:test_train_main": [":tests", "//flux_func:train_main", "//third_party:pytest"],
    }
    kinds = {rule.label: rule.kind for rules in build_files.plan(small).values() for rule in rules}
    assert kinds["//flux_func:train_main"] == "py_binary"
    assert kinds["//tests:test_train_main"] == "py_test"
    assert kinds["//flux_func/models:models"] == "py_library"


def test_a_program_that_its_folder_imports_is_of_the_library(small):
    (small / "flux_func/models/table.py").write_text("if __name__ == '__main__':\n    pass")
    (small / "flux_func/models/flux.py").write_text("from flux_func.models import table")
    rules = build_files.plan(small)["flux_func/models"]
    assert [rule.attributes["srcs"] for rule in rules] == [["__init__.py", "flux.py", "table.py"]]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("flux_func/tree.py", "from flux_func.models import flux", "flux_func/tree.py: tree may not import models"),
        (
            "flux_func/models/flux.py",
            "def f():\n    import flux_func",
            "flux_func/models/flux.py: models may not import api",
        ),
        ("flux_func/models/flux.py", "import setup", "flux_func/models/flux.py: models may not import setup.py"),
        ("flux_func/odd/one.py", "", "flux_func/odd/one.py: 'odd' is no layer of tests/build_files.py"),
        ("flux_func/tree.py", "import flux_func", "a cycle among //flux_func/models:models, //flux_func:flux_func, "),
    ],
)
def test_what_is_wrong_with_a_source_is_said(small, file, text, said):
    (small / file).parent.mkdir(exist_ok=True)
    (small / file).write_text(text)
    assert f"{Path(file).parent}/BUILD: out of date" in "\n".join(build_files.problems(small))
    write(small)
    assert said in "\n".join(build_files.problems(small))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('        "//flux_func:tree",\n', "", "//flux_func/models:models: lacks //flux_func:tree, which it imports"),
        (
            '        "//flux_func:tree",\n',
            '        "//flux_func:tree",\n        "//third_party:pytest",\n',
            "does not import",
        ),
        ('        "flux.py",\n', "", "flux_func/models/flux.py: in 0 targets, should be in one"),
        (
            '        "flux.py",\n',
            '        "flux.py",\n        "gone.py",\n',
            "flux_func/models/gone.py: named in a BUILD",
        ),
    ],
)
def test_what_is_wrong_with_a_build_file_is_said(small, old, new, said):
    path = small / "flux_func/models/BUILD"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert said in "\n".join(build_files.problems(small))


def test_the_table_names_the_distribution_of_an_import(small):
    (small / "flux_func/tree.py").write_text("import optree, PIL.Image")
    table = build_files.build_files(small)["third_party/BUILD"]
    assert 'alias(\n    name = "PIL",\n    actual = "@pypi//pillow",\n)\n' in table
    assert 'alias(\n    name = "torch",\n    actual = "@pypi//torch",\n)\n' in table


def test_a_target_that_may_not_be_seen_is_said(small):
    path = small / "third_party/BUILD"
    path.write_text(path.read_text().replace("//:__subpackages__", "//visibility:private"))
    assert "//flux_func:tree: may not see //third_party:optree" in build_files.problems(small)
