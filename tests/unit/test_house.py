"""The rules of the house: which module may import what, sizes, docstrings, and what no file may say."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megarlhf"
MODULES = sorted(PACKAGE.rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
TOP_LEVEL = ("setup.py", "pyproject.toml", "README.md", "Dockerfile", "LICENSE", ".gitignore", ".ci/run")
FOLDERS = ("megarlhf", "launcher", "tools", "examples", "tests", "docs")
WRITTEN_HERE = {".py", ".sh", ".sbatch", ".slurm", ".md", ".yaml", ".toml", ".txt", ".cfg", ""}

ROOMS = (
    ("", "config"),  # "" is megarlhf/__init__.py
    ("batch",),
    ("storage",),
    ("algorithms", "data", "telemetry", "endings"),
    ("parallel",),
    ("models",),
    ("resharding",),
    ("engine", "generation"),
    ("evaluation",),
    ("runs",),
    ("trainers", "conversion", "preparation"),
    ("planning", "doctor", "report", "chat"),
    ("failures", "api"),
    ("recipes",),
    ("cli",),
    ("__main__",),
)
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}

MAY_IMPORT = {
    "torch.distributed": ("parallel/", "resharding/", "planning/"),
    "megatron": ("parallel/", "models/", "resharding/", "engine/", "generation/", "planning/fake_world.py"),
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LONGER_WITH_A_REASON: dict[str, str] = {}
"""What may be longer and why, by "path" or "path::function", with paths as seen from megarlhf/."""

FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py"}
FORBIDDEN_TEXT = {
    "a path in somebody's home": re.compile(r"(?<![\w.$}])/(home|root|Users)/"),
    "an unfinished piece": re.compile("TO" + "DO|FIX" + "ME"),
}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    """The room of a module: its folder under megarlhf/, or its own name; "" for megarlhf/__init__.py."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports, wherever in it, and of each use of torch.distributed."""
    package = ("megarlhf", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_every_room_has_a_floor():
    assert {room_of(path) for path in MODULES} <= set(FLOORS)


def test_imports_point_down():
    wrong = []
    for path in MODULES:
        room = room_of(path)
        for line, name in imports_of(path):
            if not is_within(name, "megarlhf"):
                continue
            parts = name.split(".")
            target = parts[1] if len(parts) > 1 and parts[1] in FLOORS else ""
            if target != room and FLOORS[target] >= FLOORS[room]:
                wrong.append(f"{name_of(path)}:{line} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[target]})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_only_some_rooms_import(library):
    wrong = [
        f"{name_of(path)}:{line} uses {name}"
        for path in MODULES
        if not name_of(path).startswith(MAY_IMPORT[library])
        for line, name in imports_of(path)
        if is_within(name, library)
    ]
    assert not wrong, "\n".join(wrong)


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """(qualified name, node) of every function and class, however deep."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name, node
            yield from definitions(node, f"{prefix}{node.name}.")
        else:
            yield from definitions(node, prefix)


def test_sizes():
    too_long = {}
    for path in MODULES:
        lines = len(path.read_text().splitlines())
        if lines > MAX_FILE_LINES:
            too_long[name_of(path)] = lines
        for name, node in definitions(parsed(path)):
            lines = node.end_lineno - node.lineno + 1
            if not isinstance(node, ast.ClassDef) and lines > MAX_FUNCTION_LINES:
                too_long[f"{name_of(path)}::{name}"] = lines
    unexpected = {name: lines for name, lines in too_long.items() if name not in LONGER_WITH_A_REASON}
    assert not unexpected, f"over {MAX_FILE_LINES} lines for a file or {MAX_FUNCTION_LINES} for a function: {unexpected}"
    assert set(LONGER_WITH_A_REASON) <= set(too_long), "a reason that is no longer needed"


def public_definitions(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """The functions and classes of a module and the methods of its classes whose names do not start with an underscore."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node, f"{prefix}{node.name}.")


def test_everything_public_has_a_docstring():
    missing = [
        f"{name_of(path)}:{node.lineno} {name}"
        for path in MODULES
        for name, node in public_definitions(parsed(path))
        if not ast.get_docstring(node)
    ]
    assert not missing, "\n".join(missing)


TEXT_METHODS = {"read_text", "write_text", "open"}


def test_text_files_name_their_encoding():
    """Files are UTF-8 whatever the locale: every file opened as text says so."""
    wrong = []
    for path in [*MODULES, *(ROOT / "tools").glob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            binary = any(isinstance(arg, ast.Constant) and isinstance(arg.value, str) and "b" in arg.value for arg in node.args[:2])
            named = any(word.arg == "encoding" for word in node.keywords)
            if name in TEXT_METHODS and owner not in ("os", "gzip") and not binary and not named:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_load(path):
    from megarlhf.config import load_stage_config

    load_stage_config(path)


def written_files() -> list[Path]:
    """The files that people write: code, documentation and configuration, not data."""
    inside = [
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in WRITTEN_HERE and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]
    return [*inside, *(ROOT / name for name in TOP_LEVEL if (ROOT / name).exists())]


def test_files_are_ascii():
    wrong = []
    for path in written_files():
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line.isascii():
                wrong.append(f"{path.relative_to(ROOT)}:{number} {line.decode(errors='replace').strip()}")
    assert not wrong, "\n".join(wrong)


def test_no_file_says_what_none_may():
    wrong = [f"{path.relative_to(ROOT)}: a name that says nothing" for path in written_files() if path.name in FORBIDDEN_NAMES]
    for path in written_files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            where = f"{path.relative_to(ROOT)}:{number}"
            wrong += [f"{where} {what}: {line.strip()}" for what, sign in FORBIDDEN_TEXT.items() if sign.search(line)]
    assert not wrong, "\n".join(wrong)
