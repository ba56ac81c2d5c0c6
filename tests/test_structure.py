"""How the code is laid out: the size of files and functions, private names, and which module imports which."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rledit_env", "agents")
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in FILES}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60

# What the bundled facts are built from, written down as Python.
DATA = {"rledit_env/knowledge/bundled/relations.py", "rledit_env/knowledge/bundled/tables.py"}
# Other packages' private names, where they have no public one for it.
OF_OTHER_PACKAGES = {
    "_ArgumentGroup": "argparse: what add_argument_group returns",
    "_SubParsersAction": "argparse: what add_subparsers returns",
    "_actions": "argparse: a parser's arguments, to look at them once more",
    "_attn_implementation": "transformers: which attention a model's configuration asks for",
    "_flash_attention_forward": "torch: the kernel with the log-sum-exp that its backward pass needs",
    "_linear_pointwise": "torch: oneDNN's product with weights packed once",
    "_name_or_path": "transformers: where a model was loaded from, which is left out of what is saved",
    "_rescale_layers": "transformers: RWKV divides its weights while it is not trained, and takes that back",
    "_softmax_backward_data": "torch: the gradient of softmax in one kernel",
    "_version": "torch: how often a tensor has been changed in place",
}


def test_no_file_but_data_is_longer_than_400_lines() -> None:
    lines = {path.as_posix(): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: count for path, count in lines.items() if count > MOST_LINES and path not in DATA} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    lines = {
        f"{path.as_posix()}: {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: n for name, n in lines.items() if n > MOST_LINES_OF_A_FUNCTION} == {}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_definitions() -> dict[str, set[Path]]:
    """Private name → the folders in which something of that name is defined or assigned."""
    folders: dict[str, set[Path]] = defaultdict(set)
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            name = ""
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = node.name
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                name = node.id if isinstance(node, ast.Name) else node.attr
            if is_private(name):
                folders[name].add(path.parent)
    return folders


def imported_private_names(tree: ast.Module) -> Iterator[tuple[str, Path]]:
    """Private names and modules of our packages that a file imports, each with the folder that it is private to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            modules = [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [(alias.name, "") for alias in node.names if alias.name.split(".")[0] in PACKAGES]
        else:
            continue
        for module, name in modules:
            parts = [*module.split("."), *filter(None, [name])]
            for i, part in enumerate(parts):
                if is_private(part):
                    owner = Path(*parts[:i])
                    yield ".".join(parts), owner if (ROOT / owner).is_dir() else owner.parent


def private_attributes(tree: ast.Module) -> Iterator[ast.Attribute]:
    """Private attributes of anything but the object itself (self, cls, super())."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            of = node.value.func if isinstance(node.value, ast.Call) else node.value
            if not (isinstance(of, ast.Name) and of.id in ("self", "cls", "super")):
                yield node


def private_names_of_other_folders(path: Path, tree: ast.Module, folders: dict[str, set[Path]]) -> list[str]:
    found = [name for name, folder in imported_private_names(tree) if folder != path.parent]
    return found + [
        ast.unparse(node)
        for node in private_attributes(tree)
        if node.attr not in OF_OTHER_PACKAGES and path.parent not in folders.get(node.attr, set())
    ]


def test_no_private_name_is_used_outside_of_its_folder() -> None:
    folders = private_definitions()
    used = {path.as_posix(): private_names_of_other_folders(path, tree, folders) for path, tree in TREES.items()}
    assert {path: names for path, names in used.items() if names} == {}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from rledit_env.scoring import _weights", ["rledit_env.scoring._weights"]),
        ("from agents.sb3.agent import _scaled", []),
        ("from agents.sb3 import _hidden", []),
        ("import rledit_env._hidden.part", ["rledit_env._hidden.part"]),
        ("env.episode._undo()", ["env.episode._undo"]),
        ("env.nothing_of_ours._at_all", ["env.nothing_of_ours._at_all"]),
        ("self._undo, cls._undo, super()._undo", []),
        ("weight._version, other._look_at(env), __name__, weight.__dict__", []),
    ],
)
def test_private_names_of_other_folders_are_found(code: str, found: list[str]) -> None:
    path = Path("agents/sb3/new.py")
    assert private_names_of_other_folders(path, ast.parse(code), private_definitions()) == found


def test_no_import_goes_up_or_in_a_circle() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_has_a_layer() -> None:
    contract = re.search(r"\nlayers = \[\n(.*?)\n\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.DOTALL)
    assert contract is not None
    named = {name.replace(".", "/") for name in re.findall(r"[\w.]+", contract[1])}
    there = {"/".join(path.with_suffix("").parts[:2]) for path in FILES if path.parts[1] != "__init__.py"}
    assert there - named == set()


def test_every_private_name_of_another_package_is_in_use() -> None:
    used = {node.attr for tree in TREES.values() for node in private_attributes(tree)}
    assert set(OF_OTHER_PACKAGES) - used == set()
