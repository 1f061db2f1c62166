"""Writes docs/api.md, the functional API from its docstrings.

python docs/api.py
"""

import ast
import importlib
import inspect
import os
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

from absl import app

import flux_func

# What a page reader looks for first comes first; a folder stands for all its modules.
MODULES = ("flow", "models", "transforms", "parallel", "train.optimizer", "interop.weights", "tree", "random")
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
HEAD = """# The functional API

`python docs/api.py` writes this page from the docstrings. `B` is the batch, `L` text tokens, `N` image tokens, `C` the
hidden size, `H` heads, `D` a head's size; a tree is nested dicts and lists of tensors.

"""


def main(argv: list[str]) -> None:
    """Writes the page beside this file."""
    del argv
    path = Path(__file__).with_name("api.md")
    beside = path.with_suffix(".md.new")
    beside.write_text(page(), encoding="utf-8")
    os.replace(beside, path)
    print(f"{path}: {path.read_text(encoding='utf-8').count('### ')} names")


def page() -> str:
    """Returns the whole page, in Markdown."""
    parts = [("flux_func", flux_func, names_of(flux_func)), *((m.__name__, m, names_of(m)) for m in modules())]
    listed = "".join(f"- [{name}](#{_anchor(name)}): {_first(module)}\n" for name, module, names in parts if names)
    return HEAD + listed + "".join(chapter(*part) for part in parts if part[2])


def modules() -> list[ModuleType]:
    """Returns the modules that `MODULES` stands for, in its order."""
    found = []
    for name in MODULES:
        module = importlib.import_module(f"flux_func.{name}")
        folder = Path(module.__file__).parent if hasattr(module, "__path__") else None
        inside = sorted(path.stem for path in folder.glob("[!_]*.py")) if folder else []
        found += [importlib.import_module(f"flux_func.{name}.{stem}") for stem in inside] if folder else [module]
    return found


def names_of(module: ModuleType) -> list[str]:
    """Returns the functions and classes that a module defines (or, the package, that it offers), in their order."""
    offered = getattr(module, "__all__", None)
    objects = {name: getattr(module, name) for name in (offered or vars(module)) if not name.startswith("_")}
    return [
        name
        for name, found in objects.items()
        if (inspect.isfunction(found) or inspect.isclass(found)) and (offered or found.__module__ == module.__name__)
    ]


def chapter(title: str, module: ModuleType, names: list[str]) -> str:
    """Returns a module's part of the page."""
    text = inspect.getdoc(module) or ""
    return f"\n## {title}\n\n{text}\n" + "".join(entry(title, name, getattr(module, name)) for name in names)


def entry(module: str, name: str, found: object) -> str:
    """Returns one name's part; of the package's own names, where it is."""
    doc = inspect.getdoc(found) or ""
    if module == "flux_func":
        there = f"{found.__module__.removeprefix('flux_func.')}.{name}".lower()
        return f"\n- [ff.{name}](#{_anchor(there)}): {doc.splitlines()[0]}"
    return f"\n### {module.removeprefix('flux_func.')}.{name}\n\n{_code(name, found)}\n{markdown(doc)}\n"


def markdown(doc: str) -> str:
    """Returns a docstring's sections as lists."""
    lines: list[str] = []
    section = ""
    for line in doc.splitlines():
        heading = re.fullmatch(rf"({'|'.join(SECTIONS)}):", line)
        item = re.match(r"  (\*{0,2}[\w.,* ]+): (.*)", line) if section in ("Args", "Attributes", "Raises") else None
        section = heading[1] if heading else section
        if heading:
            lines.append(f"**{section}**\n")
        elif item:
            lines.append(f"- `{item[1]}`: {item[2]}")
        else:
            lines.append(line.removeprefix("  ") if section else line)
    return "\n".join(lines)


def _code(name: str, found: object) -> str:
    node = ast.parse(textwrap.dedent(inspect.getsource(found))).body[0]
    if isinstance(node, ast.ClassDef):
        fields = [ast.unparse(line) for line in node.body if isinstance(line, ast.AnnAssign)]
        return _fence("\n    ".join([f"class {name}:", *(fields or ["..."])]))
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({ast.unparse(node.args)}){returns}"
    if len(line) <= 100:
        return _fence(line)
    return _fence("\n    ".join([f"{name}(", *(f"{arg}," for arg in _arguments(node.args))]) + f"\n){returns}")


def _arguments(args: ast.arguments) -> list[str]:
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults
    parts = [_argument(*pair) for pair in zip(positional, defaults, strict=True)]
    if args.vararg or args.kwonlyargs:
        parts.append(f"*{ast.unparse(args.vararg)}" if args.vararg else "*")
    parts += [_argument(*pair) for pair in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return parts + ([f"**{ast.unparse(args.kwarg)}"] if args.kwarg else [])


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(arg) + (f" = {ast.unparse(default)}" if default else "")


def _fence(code: str) -> str:
    return f"```python\n{code}\n```\n"


def _first(module: ModuleType) -> str:
    return (inspect.getdoc(module) or "").split("\n\n")[0].replace("\n", " ")


def _anchor(title: str) -> str:
    return title.replace(".", "")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    app.run(main)
