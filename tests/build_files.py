"""The BUILD files from the sources' imports, and what the imports must keep to.

    python tests/build_files.py            says what is wrong, and exits with 1 where something is
    python tests/build_files.py --write    writes the BUILD files of every folder anew; the one at the top is by hand

A folder is one py_library; in flux_func itself, whose files stand on different layers, each file is one. A file with
a `__main__` part that its folder does not import is a py_binary, and a file of tests a py_test run by pytest.
Dependencies are the imports, those inside functions too, and what is started by `python -m`. third_party/BUILD is the
table from the names that Python imports to the distributions that have them.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "docs", "flux_func", "tests")
RULES = ("py_binary", "py_library", "py_test")
PUBLIC = "//visibility:public"
HERE_ONLY = "//:__subpackages__"
# The distribution of an imported name, where they differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl_py",
    "orbax": "orbax_checkpoint",
    "sklearn": "scikit_learn",
    "yaml": "pyyaml",
}
# What is installed in an environment of its own (third_party/README.md).
ELSEWHERE = ("torchtitan",)
# Folders that are no packages: their modules are imported by their bare names.
BARE = ("configs", "docs", "docs.gallery", "flux_func.parity.references")
# Files that a source names by path.
CONFIGS = (
    "docs/h200.py",
    "flux_func/train_main.py",
    "tests/helpers/tiny_run.py",
    "tests/test_cli.py",
    "tests/test_config.py",
)
DATA = dict.fromkeys(CONFIGS, ["//configs"])
REFERENCES = ("flux_func/bench/serve.py", "flux_func/parity/process.py")
DATA |= dict.fromkeys(REFERENCES, ["//flux_func/parity/references", "//flux_func/parity/references:answer"])
# Tests that read the checkout itself, which Bazel's sandbox does not hold: for pytest alone.
READ_THE_CHECKOUT = (
    "tests/distributed/test_launch_files.py",
    "tests/test_build.py",
    "tests/test_docs.py",
    "tests/test_gallery.py",
    "tests/test_h200.py",
    "tests/test_setup.py",
)
# What each layer may import of ours; "main" is every program, "api" is flux_func/__init__.py.
CORE = {"tree", "random"}
MODELS = CORE | {"models"}
SETTINGS = MODELS | {"config", "config_checks", "errors"}
PARALLEL = MODELS | {"errors", "flow", "transforms", "parallel"}
TRAIN = SETTINGS | PARALLEL | {"data", "interop", "launch", "train"}
LAYERS = {
    **dict.fromkeys(("errors", "tree", "random"), set()),
    "models": MODELS,
    "flow": MODELS | {"flow"},
    "transforms": MODELS | {"flow", "transforms"},
    "launch": {"errors", "launch"},
    "parallel": PARALLEL,
    "plan": PARALLEL | {"plan"},
    "config_checks": {"errors", "models"},
    "config": {"config_checks", "errors", "models", "tree"},
    "data": SETTINGS | {"data"},
    "interop": SETTINGS | {"transforms", "interop"},
    "train": TRAIN,
    "cli": {"config", "errors", "launch"},
    "api": TRAIN - {"config", "data"},
    "parity": SETTINGS | PARALLEL | {"interop", "parity"},
    "bench": TRAIN | {"parity", "bench"},
    "main": TRAIN | {"api", "cli", "bench", "parity", "plan"},
}


class Rule(NamedTuple):
    """One call in a BUILD file: a target, its folder ("" at the top) and its attributes."""

    kind: str
    folder: str
    name: str
    attributes: dict[str, Any]

    @property
    def label(self) -> str:
        """Its full label, `//folder:name`."""
        return f"//{self.folder}:{self.name}"


# Sources and their imports.


def sources(root: Path) -> list[str]:
    """Returns every Python file of ours, relative to the root."""
    found = [*root.glob("*.py"), *(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))]
    return sorted(path.relative_to(root).as_posix() for path in found)


def modules(files: Iterable[str]) -> dict[str, str]:
    """Returns the file of each module by its dotted name, which for the folders of `BARE` is its own."""
    names = {}
    for file in files:
        path = Path(file)
        parts = path.parent.parts if path.name == "__init__.py" else path.with_suffix("").parts
        names[path.stem if ".".join(path.parent.parts) in BARE else ".".join(parts)] = file
    return names


def imported(code: ast.AST) -> Iterator[str]:
    """Yields the dotted names that a source imports, or starts by `python -m`; `from a import b` is `a.b`."""
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "importorskip")):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))
        elif isinstance(node, (ast.List, ast.Tuple)):
            words = [item.value if isinstance(item, ast.Constant) else None for item in node.elts]
            yield from (after for word, after in zip(words, words[1:], strict=False) if word == "-m" and after)


def uses(root: Path, file: str, known: dict[str, str]) -> tuple[set[str], set[str]]:
    """Returns the files of ours that a source uses, and the third-party modules."""
    ours, foreign = set(), set()
    for name in imported(ast.parse((root / file).read_text(encoding="utf-8"))):
        parts = name.split(".")
        prefixes = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
        match = next((known[prefix] for prefix in prefixes if prefix in known), None)
        if match:
            ours.add(match)
        elif parts[0] not in (*sys.stdlib_module_names, *ELSEWHERE):
            foreign.add(parts[0])
    if is_test(file):
        # pytest itself imports the conftest.py of the folder and of those above it.
        above = [(folder / "conftest.py").as_posix() for folder in Path(file).parents]
        ours.update(conftest for conftest in above if conftest in known.values())
        foreign.add("pytest")
    return ours - {file}, foreign


def is_test(file: str) -> bool:
    """Whether pytest collects the file."""
    return file.startswith("tests/") and Path(file).name.startswith("test_")


def layer(file: str) -> str | None:
    """Returns a source's layer, a key of `LAYERS`; None outside flux_func."""
    parts = Path(file).with_suffix("").parts
    if parts[0] != "flux_func":
        return None
    if len(parts) > 2:
        return parts[1]
    return "api" if parts[1] == "__init__" else "main" if parts[1].endswith("_main") else parts[1]


# Targets.


def plan(root: Path) -> dict[str, list[Rule]]:
    """Returns the targets of each folder, sources at the top ("") included."""
    files = sources(root)
    known = modules(files)
    used = {file: uses(root, file, known) for file in files}
    homes = {file: _home(root, file, used) for file in files}
    rules: dict[str, list[Rule]] = {}
    for kind, folder, name in sorted(set(homes.values()), key=lambda home: (home[1], home[0], home[2])):
        members = [file for file in files if homes[file] == (kind, folder, name)]
        labels = {f"//{homes[file][1]}:{homes[file][2]}" for member in members for file in used[member][0]}
        labels |= {f"//third_party:{module}" for member in members for module in used[member][1]}
        attributes = {"srcs": [Path(file).name for file in members], **_extras(kind, folder, name, members)}
        deps = sorted(labels - {f"//{folder}:{name}"}, key=_order(folder))
        attributes["deps"] = [_short(label, folder) for label in deps]
        rules.setdefault(folder, []).append(Rule(kind, folder, name, attributes))
    return rules


def build_files(root: Path) -> dict[str, str]:
    """Returns the text of each BUILD file but the one at the top, by its path."""
    rules = plan(root)
    deps = {label for targets in rules.values() for rule in targets for label in rule.attributes["deps"]}
    foreign = sorted(label.removeprefix("//third_party:") for label in deps if label.startswith("//third_party:"))
    texts = {f"{folder}/BUILD": render(targets) for folder, targets in rules.items() if folder}
    return {**texts, "third_party/BUILD": render_table(foreign)}


def _home(root: Path, file: str, used: dict[str, tuple[set[str], set[str]]]) -> tuple[str, str, str]:
    path = Path(file)
    folder = "" if path.parent == Path(".") else path.parent.as_posix()
    if is_test(file):
        return "py_test", folder, path.stem
    shared = [] if folder in ("", "flux_func") else [other for other in used if Path(other).parent == path.parent]
    imported_here = any(file in used[other][0] for other in shared if not is_test(other))
    if _is_program(root / file) and not imported_here:
        return "py_binary", folder, path.stem
    return "py_library", folder, path.parent.name if shared or path.name == "__init__.py" else path.stem


def _is_program(path: Path) -> bool:
    return re.search(r"^if __name__ == ", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def _extras(kind: str, folder: str, name: str, members: list[str]) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    data = [label for file in members for label in DATA.get(file, [])]
    if kind == "py_test":
        # `rootpath` is the file in the test's own tree, where pytest finds its settings too.
        extras["args"] = ["-c", "$(rootpath //:pyproject.toml)", f"$(rootpath {name}.py)"]
        extras["main_module"] = "pytest"
        data.append("//:pyproject.toml")
        if members[0] in READ_THE_CHECKOUT:
            extras["tags"] = ["manual"]
    if data:
        extras["data"] = sorted(data, key=_order(folder))
    if kind == "py_binary" and folder == "flux_func" or name == "flux_func":
        extras["visibility"] = [PUBLIC]
    return extras


def _order(folder: str):
    return lambda label: (not label.startswith(f"//{folder}:"), label.replace(":", "\0"))


def _short(label: str, folder: str) -> str:
    package, name = label.removeprefix("//").split(":")
    if package == folder:
        return f":{name}"
    return f"//{package}" if package and package.split("/")[-1] == name else label


def render(rules: list[Rule]) -> str:
    """Returns the text of a BUILD file, as buildifier would lay it out."""
    kinds = sorted({rule.kind for rule in rules})
    loads = "\n".join(f'load("@rules_python//python:{kind}.bzl", "{kind}")' for kind in kinds)
    calls = [f'package(default_visibility = ["{HERE_ONLY}"])', *(_call(rule) for rule in rules)]
    return "\n\n".join([loads, *calls]) + "\n"


def render_table(modules: Iterable[str]) -> str:
    """Returns the text of third_party/BUILD: an alias for each imported name."""
    actual = {module: f"@pypi//{DISTRIBUTIONS.get(module, module)}" for module in modules}
    aliases = [_call(Rule("alias", "third_party", module, {"actual": target})) for module, target in actual.items()]
    return "\n\n".join([f'package(default_visibility = ["{HERE_ONLY}"])', *aliases]) + "\n"


def _call(rule: Rule) -> str:
    first, last = ("name", "srcs"), ("visibility", "deps")
    attributes = {"name": rule.name, **rule.attributes}
    middle = sorted(attributes.keys() - {*first, *last})
    lines = [f"    {key} = {_value(attributes[key])}," for key in (*first, *middle, *last) if attributes.get(key)]
    return "\n".join([f"{rule.kind}(", *lines, ")"])


def _value(value: str | list[str]) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if len(value) == 1:
        return f'["{value[0]}"]'
    return "\n".join(["[", *(f'        "{item}",' for item in value), "    ]"])


def parse(root: Path) -> list[Rule]:
    """Returns every call with a name in the BUILD files: Starlark's calls are Python's."""
    rules = []
    for path in sorted(path for folder in (".", "third_party", *FOLDERS) for path in _build_files(root, folder)):
        folder = path.parent.relative_to(root).as_posix().removeprefix(".")
        visibility = [PUBLIC + " is not the default"]
        for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
            attributes = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
            visibility = attributes.get("default_visibility", visibility)
            if "name" in attributes:
                attributes = {"visibility": visibility, **attributes}
                rules.append(Rule(ast.unparse(call.func), folder, attributes.pop("name"), attributes))
    return rules


def _build_files(root: Path, folder: str) -> list[Path]:
    return list((root / folder).glob("BUILD" if folder == "." else "**/BUILD"))


# What must hold.


def problems(root: Path) -> list[str]:
    """Returns what is wrong with the BUILD files and the imports, a line each."""
    rules, files = parse(root), sources(root)
    wrong = [f"{file}: out of date, run python tests/build_files.py --write" for file in _stale(root)]
    return [*wrong, *_homeless(rules, files), *_deps(root, rules, files), *_cycles(rules), *_climbs(root, files)]


def _stale(root: Path) -> list[str]:
    folders = ("third_party", *FOLDERS)
    there = {str(path.relative_to(root)): path.read_text("utf-8") for x in folders for path in _build_files(root, x)}
    wanted = build_files(root)
    return sorted(path for path in wanted.keys() | there if wanted.get(path) != there.get(path))


def _owners(rules: list[Rule]) -> list[tuple[str, Rule]]:
    return [((Path(rule.folder) / src).as_posix(), rule) for rule in rules for src in rule.attributes.get("srcs", [])]


def _homeless(rules: list[Rule], files: list[str]) -> list[str]:
    owned = [file for file, rule in _owners(rules) if rule.kind in RULES]
    wrong = [f"{file}: in {owned.count(file)} targets, should be in one" for file in files if owned.count(file) != 1]
    return wrong + [f"{file}: named in a BUILD file, but not there" for file in sorted(set(owned) - set(files))]


def _full(label: str, folder: str) -> str:
    if label.startswith(":"):
        return f"//{folder}{label}"
    return label if ":" in label else f"{label}:{label.split('/')[-1]}"


def _deps(root: Path, rules: list[Rule], files: list[str]) -> list[str]:
    known, owner, wrong = modules(files), dict(_owners(rules)), []
    targets = {rule.label: rule for rule in rules}
    for rule in (rule for rule in rules if rule.kind in RULES):
        used = [uses(root, file, known) for file, one in owner.items() if one.label == rule.label and file in files]
        needed = {owner[file].label for ours, _ in used for file in ours if file in owner} - {rule.label}
        needed |= {f"//third_party:{module}" for _, foreign in used for module in foreign}
        said = {_full(label, rule.folder) for label in rule.attributes.get("deps", [])}
        wrong += [f"{rule.label}: lacks {label}, which it imports" for label in sorted(needed - said)]
        wrong += [f"{rule.label}: names {label}, which it does not import" for label in sorted(said - needed)]
        wrong += [f"{rule.label}: {label} is no target" for label in sorted(said - targets.keys())]
        seen = {label for label in said & targets.keys() if _visible(targets[label], rule)}
        wrong += [f"{rule.label}: may not see {label}" for label in sorted((said & targets.keys()) - seen)]
    return wrong


def _visible(target: Rule, user: Rule) -> bool:
    return target.folder == user.folder or bool({PUBLIC, HERE_ONLY} & set(target.attributes["visibility"]))


def _cycles(rules: list[Rule]) -> list[str]:
    graph = {rule.label: {_full(label, rule.folder) for label in rule.attributes.get("deps", [])} for rule in rules}
    # What needs nothing that is left, or is needed by nothing that is left, is on no cycle.
    while loose := [x for x, deps in graph.items() if not deps & graph.keys() or x not in set().union(*graph.values())]:
        for label in loose:
            del graph[label]
    return [f"a cycle among {', '.join(sorted(graph))}"] if graph else []


def _climbs(root: Path, files: list[str]) -> list[str]:
    known, wrong = modules(files), []
    for file in files:
        above = layer(file)
        if above is not None and above not in LAYERS:
            wrong.append(f"{file}: {above!r} is no layer of tests/build_files.py")
        elif above is not None:
            below = {layer(other) or other for other in uses(root, file, known)[0]}
            wrong += [f"{file}: {above} may not import {name}" for name in sorted(below - LAYERS[above])]
    return wrong


def main() -> int:
    """Writes the BUILD files if asked, says what is wrong, and returns the exit code."""
    if sys.argv[1:] == ["--write"]:
        texts = build_files(ROOT)
        for file in _stale(ROOT):
            (ROOT / file).write_text(texts[file], encoding="utf-8") if file in texts else (ROOT / file).unlink()
            print(f"{'wrote' if file in texts else 'removed'} {file}")
    elif sys.argv[1:]:
        print(__doc__)
        return 2
    wrong = problems(ROOT)
    print("\n".join(wrong) if wrong else "every source is in one target, and imports run downward only")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
