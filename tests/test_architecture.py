"""The rules of the house: reading order = import order, light notebooks, DeepSpeed in two rooms, small files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dschat_kit
from dschat_kit import READING_ORDER

PACKAGE = Path(dschat_kit.__file__).parent
HEAVY = ("torch", "deepspeed", "transformers")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name: path for name, path in FILES.items() if path.name != "__init__.py"}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(tree: ast.AST) -> set[str]:
    """Full names of everything a file imports, in functions as well."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


DIRECT = {name: {other.removeprefix("dschat_kit.") for other in imports(TREES[name])} & set(MODULES)
          for name in MODULES}


def reached(name: str, seen: frozenset = frozenset()) -> set[str]:
    """Modules that importing `name` can load, through others as well."""
    new = DIRECT[name] - seen - {name}
    return new | {deeper for other in new for deeper in reached(other, seen | new | {name})}


def test_the_reading_order_has_every_module_once():
    assert sorted(READING_ORDER) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_reaches_only_what_was_read_before(name):
    before = set(READING_ORDER[:READING_ORDER.index(name)])
    assert not reached(name) - before


def test_the_mathematics_never_reaches_deepspeed():
    for name in MODULES:
        if name.split(".")[0] in ("rlhf", "models", "data"):
            assert not [other for other in reached(name) if other.startswith(("engine", "train"))], name
    for name, tree in TREES.items():
        if any(other.split(".")[0] == "deepspeed" for other in imports(tree)):
            assert name.split(".")[0] in ("engine", "train"), name


def test_engine_and_mathematics_meet_in_train_alone():
    for name in MODULES:
        if name.startswith("engine"):
            assert not [other for other in reached(name) if other.startswith("rlhf")], name


def test_notebooks_and_the_command_stay_light():
    """By really importing them: what a kernel holds is what sys.modules says."""
    light = [name for name in MODULES if name.startswith("notebook.") or name.split(".")[0] in
             ("sections", "data_section", "model_section", "config", "presets", "machine", "feasible", "runs",
              "metrics", "planner", "cli")]
    script = f"""
import importlib, sys
for name in {["dschat_kit", *(f"dschat_kit.{name}" for name in light)]}:
    importlib.import_module(name)
    assert not [heavy for heavy in {HEAVY} if heavy in sys.modules], name
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and len(light) > 15, done.stderr


def test_notebook_modules_do_not_import_heavy_ones_later_either():
    for name in MODULES:
        if name.startswith("notebook."):
            assert not {other.split(".")[0] for other in imports(TREES[name])} & set(HEAVY), name
            assert not [other for other in reached(name) if other.split(".")[0] not in
                        ("notebook", "sections", "data_section", "model_section", "config", "presets", "machine",
                         "feasible", "runs", "metrics")], name


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_small(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) < 300
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


def test_public_functions_say_what_they_do():
    silent = []
    for name, tree in TREES.items():
        assert ast.get_docstring(tree), name
        for scope in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]:
            silent += [f"{name}.{node.name}" for node in scope.body if isinstance(node, ast.FunctionDef)
                       and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not silent


def test_loading_a_run_is_one_call(monkeypatch):
    from dschat_kit.chat import ChatSession
    monkeypatch.setattr(ChatSession, "open", classmethod(lambda cls, root, stage: (root, stage)))
    assert dschat_kit.load("runs/tiny") == ("runs/tiny", None)
