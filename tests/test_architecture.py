"""The house keeps its shape: floors, doors, short functions, and a drawing that is the folder."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import autoseg

PACKAGE = Path(autoseg.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(PACKAGE.rglob("*.py"))
VERBS = ("plan", "train", "predict", "evaluate", "report")
# A third-party library and the only modules (or packages) that may import it.
DOORS = {
    "zarr": ("data.store",),
    "numcodecs": ("data.store",),
    "batchgenerators": ("train.augment",),
    "monai": ("model",),
    "tifffile": ("data.formats",),
    "h5py": ("data.formats",),
    "nibabel": ("data.formats",),
    "PIL": ("data.formats",),
    "matplotlib": ("report",),
    "rich": ("cli", "commands", "report"),
    "rich_argparse": ("cli",),
    "tensorboard": ("train.journal",),
}
WITHOUT_TORCH = ("schema", "geometry", "errors", "metrics", "data", "evaluate")
MAX_FUNCTION_LINES, MAX_MODULE_LINES, MAX_ARGUMENTS = 50, 350, 7


def name_of(path: Path) -> str:
    """Return the dotted name below the package, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


TREES = {name_of(path): ast.parse(path.read_text()) for path in MODULES}
LINES = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}


def imports(name: str) -> Iterator[str]:
    """Yield the dotted name of everything that a module imports, also inside functions."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}:{node.name}", node


def test_the_import_contracts_are_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from importlinter.cli import lint_imports

    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0, capsys.readouterr().out


def test_the_verbs_never_import_each_other() -> None:
    for name in TREES:
        if (verb := name.split(".")[0]) in VERBS:
            others = tuple(f"autoseg.{other}" for other in VERBS if other != verb)
            assert [found for found in imports(name) if within(found, others)] == [], name


@pytest.mark.parametrize("library", DOORS)
def test_a_library_comes_in_by_its_own_door_only(library: str) -> None:
    users = {name for name in TREES for found in imports(name) if found.split(".")[0] == library}
    assert {name for name in users if not within(name, DOORS[library])} == set()
    assert users or library in ("tensorboard", "matplotlib"), "a door that nothing uses can go"


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_records_numbers_and_data_need_no_torch(package: str) -> None:
    for name in TREES:
        if within(name, (package,)):
            assert [found for found in imports(name) if found.split(".")[0] in ("torch", "monai")] == [], name


def test_every_module_says_what_it_is_for() -> None:
    missing = [name or "autoseg" for name, tree in TREES.items() if not (ast.get_docstring(tree) or "").strip()]
    assert missing == []
    lazy = [name for name, tree in TREES.items() if "placeholder" in (ast.get_docstring(tree) or "").lower()]
    assert lazy == []


def test_functions_are_short() -> None:
    lengths = {where: (node.end_lineno or 0) - node.lineno + 1 for where, node in functions()}
    assert {where: n for where, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_modules_are_short() -> None:
    assert {name: n for name, n in LINES.items() if n > MAX_MODULE_LINES} == {}


def test_functions_take_few_arguments() -> None:
    """`self` does not count; a record that travels as a constructor's arguments does."""
    counts = {}
    for where, node in functions():
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        counts[where] = len([a for a in arguments if a not in ("self", "cls")])
    too_many = {where: n for where, n in counts.items() if n > MAX_ARGUMENTS}
    # the front doors of the verbs: every keyword has a default
    assert set(too_many) <= {"train.loop:train", "recipes.validate:evaluate_run"}, too_many


def test_classes_are_final_or_abstract() -> None:
    """No method of a package class is overridden, except those of torch, argparse, records, text and the observer."""
    bases_allowed = {"Module", "Dataset", "NamedTuple", "Struct", "ArgumentParser", "Exception", "Record", "Artifact"}
    bases_allowed |= {"AutosegError", "Observer", "str", "Function", "Sequence", "Action", "TorchDispatchMode"}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    text = ast.unparse(base).split("[")[0].split(".")[-1]
                    assert text in bases_allowed, f"{name}:{node.name} inherits from {text}"


def test_nothing_is_called_utils() -> None:
    assert [name for name in TREES if re.search(r"util|helper|misc|common", name)] == []


def test_the_tree_in_the_readme_lists_exactly_the_modules_that_exist() -> None:
    readme = ROOT / "README.md"
    blocks = re.findall(r"```\n(autoseg/\n.*?)```", readme.read_text(), flags=re.DOTALL)
    assert len(blocks) == 1, "one annotated tree"
    drawn: set[str] = set()
    package = ""
    inner = ""
    for line in blocks[0].splitlines()[1:]:
        if found := re.match(r"[├└]── (\w+)(/|\.py)", line):
            package, inner = (found[1], "") if found[2] == "/" else ("", "")
        if found and found[2] == ".py":
            drawn.add(found[1])
            continue
        for word in re.findall(r"(?<![\w.])(\w+/|\w+\.py)(?!\w)", re.sub(r"^[├└]── \w+/", "", line)):
            if word.endswith("/") and (PACKAGE / package / word).is_dir():
                inner = word[:-1]
            elif word.endswith(".py"):
                drawn.add(".".join(part for part in (package, inner, word[:-3]) if part))
    there = {name for name in TREES if (PACKAGE / (name.replace(".", "/") + ".py")).is_file()}
    assert drawn == there


def test_the_package_runs_on_the_oldest_python_it_promises() -> None:
    for path in MODULES:
        ast.parse(path.read_text(), feature_version=(3, 11))
    assert sys.version_info >= (3, 11)
