"""The rooms and their order, who may import a compiler, and how large things may grow."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tilejit"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(f.relative_to(PACKAGE)) for f in FILES]

# A room may import itself and the rooms named here.
BASE = {"errors", "config", "dtypes", "target"}
OPS = BASE | {"layout", "isa", "ir", "ops"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "dtypes": {"errors", "config"},
    "target": {"errors", "config", "dtypes"},
    "layout": BASE,
    "isa": BASE | {"layout"},
    "ir": BASE | {"layout", "isa"},
    "ops": BASE | {"layout", "isa", "ir"},
    "language": OPS,
    "passes": OPS,
    "lower": OPS,
    "sim": OPS,
    "runtime": OPS | {"language", "passes", "lower", "sim"},
}
# Files that may import a compiler, a driver or a framework; those with `True` at their top.
FOREIGN: dict[str, bool] = {
    "lower/llvm_values.py": True,
    "lower/intrinsic.py": True,
    "lower/front_end.py": True,
    "runtime/compile.py": False,
    "runtime/device.py": False,
    "runtime/arrays.py": False,
    "sim/launch.py": False,
}
FOREIGN_PACKAGES = {"numba", "llvmlite", "cuda", "torch", "cupy"}

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 75
LONG_FILE_LINES, LONG_FILES = 450, 0.08  # at most that share of the files is longer
LONG_FUNCTION_LINES, LONG_FUNCTIONS = 40, 0.03


def room_of(name: str) -> str:
    return Path(name).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """Modules that a file imports, and whether when it is imported itself; type hints aside."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, is_early: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, is_early) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.extend((f"{node.module}.{alias.name}", is_early) for alias in node.names)
        early = is_early and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, early)

    visit(tree, True)
    return found


def parse(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "__init__.py"])
def test_file_imports_only_rooms_before_its_own(name):
    room = room_of(name)
    for module, is_early in imports(parse(name)):
        if not module.startswith("tilejit."):
            continue
        other = module.split(".")[1]
        if other == room:
            continue
        assert other in ROOMS[room], f"{name} imports {module}"
        is_lazy_part = module.startswith("tilejit.lower.front_end")  # which imports Numba
        assert is_early or is_lazy_part, f"{name} imports {module} inside a function"


def test_every_room_is_listed():
    assert {room_of(n) for n in NAMES} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("name", NAMES)
def test_compilers_and_frameworks_are_imported_in_a_handful_of_files(name):
    for module, is_early in imports(parse(name)):
        if module.split(".")[0] in FOREIGN_PACKAGES:
            assert name in FOREIGN, f"{name} imports {module}"
            assert FOREIGN[name] or not is_early, f"{name} imports {module} at its top"


def test_import_of_the_package_and_the_language_brings_none_of_them():
    code = (
        "import sys, tilejit, tilejit.language; from tilejit import tilejit, address_of\n"
        f"print(sorted({FOREIGN_PACKAGES!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def strings(name: str) -> list[tuple[int, str]]:
    """String literals that are no docstrings."""
    tree = parse(name)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]


# beside those: what runs where nobody named a chip
CHIP_ALLOWED = {"config.py": "default sm_80", "runtime/device.py": "sm_80"}
PTX = re.compile(
    r"\b(?:(?:ld|st)\.(?:global|shared|local)|cp\.async\.|mma\.sync\.|ldmatrix\.sync|bar\.sync"
    r"|mbarrier\.\w+\.|atom\.|red\.|cvt\.rn|mov\.[bu]\d|fma\.rn)"
)


@pytest.mark.parametrize("name", NAMES)
def test_chip_numbers_live_in_isa_and_target(name):
    if room_of(name) in ("isa", "target"):
        return
    for line, text in strings(name):
        if re.search(r"\bsm_\d", text):
            allowed = CHIP_ALLOWED.get(name)
            assert allowed is not None and allowed in text, f"{name}:{line}: {text!r}"


@pytest.mark.parametrize("name", NAMES)
def test_instruction_text_lives_in_isa(name):
    if room_of(name) in ("isa", "target"):
        return
    for line, text in strings(name):
        assert not PTX.search(text), f"{name}:{line}: {text!r}"


def functions(name: str) -> list[tuple[str, int]]:
    """Functions with their lines without docstring."""
    result = []
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines -= (first.end_lineno or 0) - first.lineno + 1
            result.append((f"{name}:{node.name}", lines))
    return result


def test_files_fit_one_sitting():
    lines = {n: len((PACKAGE / n).read_text(encoding="utf-8").splitlines()) for n in NAMES}
    assert not {n: k for n, k in lines.items() if k > MAX_FILE_LINES}
    long = {n: k for n, k in lines.items() if k > LONG_FILE_LINES}
    assert len(long) <= LONG_FILES * len(lines), long


def test_functions_fit_a_screen():
    lengths = [pair for n in NAMES for pair in functions(n)]
    assert not [pair for pair in lengths if pair[1] > MAX_FUNCTION_LINES]
    long = [pair for pair in lengths if pair[1] > LONG_FUNCTION_LINES]
    assert len(long) <= LONG_FUNCTIONS * len(lengths), long


@pytest.mark.parametrize("name", NAMES)
def test_module_says_what_it_knows(name):
    assert ast.get_docstring(parse(name)), f"{name} has no docstring"


UNFINISHED = re.compile("TO" + r"DO|FIX" + "ME|XX" + r"X|HA" + r"CK")


def is_abstract(function: ast.FunctionDef) -> bool:
    """A method that only says that subclasses have it."""
    body = [n for n in function.body if not isinstance(n, ast.Expr)]
    return len(body) == 1 and ast.unparse(body[0]) == "raise NotImplementedError"


@pytest.mark.parametrize("name", NAMES)
def test_no_exception_is_swallowed(name):
    lines = (PACKAGE / name).read_text(encoding="utf-8").splitlines()
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.ExceptHandler):
            kind = ast.unparse(node.type) if node.type else "BaseException"
            body = [n for child in node.body for n in ast.walk(child)]
            is_raised = any(isinstance(n, ast.Raise) for n in body)
            is_kept = any(isinstance(n, ast.Name) and n.id == node.name for n in body)
            is_caught = is_raised or is_kept or kind != "BaseException"
            assert is_caught, f"{name}:{node.lineno} catches everything"
            if isinstance(node.body[0], ast.Pass):
                said = "#" in lines[node.body[0].lineno - 1]
                assert said, f"{name}:{node.lineno} swallows {kind} without saying why"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_unfinished(name):
    tree = parse(name)
    defined = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    inside = {id(n) for f in defined if is_abstract(f) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            assert id(node) in inside, f"{name}:{node.lineno}"
    text = (PACKAGE / name).read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            assert not UNFINISHED.search(token.string), f"{name}:{token.start[0]}"
