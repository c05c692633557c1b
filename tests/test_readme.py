"""README is true: its code runs, its tables are complete, its commands are CI's."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import tilejit
import tilejit.language as T
from tilejit.config import Options
from tilejit.target import TARGETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)(?: raises (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    _, _, rest = README.partition(f"\n## {title}\n")
    assert rest, f"README has no section {title}"
    return rest.partition("\n## ")[0]


def blocks() -> list[tuple[str, str, str]]:
    """Language, expected error and text of each code block."""
    return [(m[1], m[2] or "", m[3]) for m in BLOCK.finditer(README)]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def rows(text: str) -> list[list[str]]:
    """The rows of the tables in a text, without their heads."""
    found: list[list[str]] = []
    lines = text.splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|") and not line.startswith("|---"):
            found.append(cells(line))
        elif line.startswith("|---"):
            assert found and cells(before) == found[-1]
            found.pop()
    return found


def run_file(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def python_program() -> str:
    return "\n\n".join(text for kind, error, text in blocks() if kind == "python" and not error)


def test_code_of_the_readme_runs(tmp_path):
    path = tmp_path / "readme.py"
    path.write_text(python_program(), encoding="utf-8")
    done = run_file(path)
    assert done.returncode == 0, done.stderr
    assert "T.Pipelined(" in done.stdout and "def matmul(" in done.stdout


def test_first_program_of_the_readme_is_complete(tmp_path):
    path = tmp_path / "first.py"
    path.write_text(blocks()[0][2], encoding="utf-8")
    done = run_file(path)
    assert done.returncode == 0, done.stderr


def test_error_of_the_readme_is_what_is_printed(tmp_path):
    listed = blocks()
    (place,) = [n for n, (_, error, _) in enumerate(listed) if error]
    _, error, text = listed[place]
    kind, _, expected = listed[place + 1]
    assert kind == "text"
    imports = "import numpy as np\nimport tilejit.language as T\nfrom tilejit import tilejit\n"
    path = tmp_path / "product.py"
    path.write_text(imports + text, encoding="utf-8")
    done = run_file(path)
    assert done.returncode == 1
    _, _, printed = done.stderr.partition(f"tilejit.errors.{error}: ")
    without_gutter = [re.sub(r"^ *\d+ \|", "|", line) for line in printed.splitlines()]
    shown = [re.sub(r"^ *\d+ \|", "|", line) for line in expected.splitlines()]
    assert re.sub(r'File ".*", line \d+', "File", "\n".join(without_gutter)) == re.sub(
        r'File ".*", line \d+', "File", "\n".join(shown)
    )


def test_options_table_is_the_options():
    expected = [
        [
            f"`{knob.metadata['env']}`",
            f"`{knob.name}`",
            "empty" if knob.default == "" else f"`{knob.default}`",
            knob.metadata["doc"],
        ]
        for knob in fields(Options)
    ]
    assert rows(section("Options")) == expected


def test_language_table_has_every_name_once_with_its_meaning():
    table = rows(section("Language"))
    names = [re.fullmatch(r"`(\w+)`", row[0])[1] for row in table]
    assert sorted(names) == sorted(T.__all__)
    assert all(len(row) == 2 and row[1] for row in table)


def test_targets_of_the_readme_are_the_targets():
    named = re.findall(r"`(sm_\w+)`", section("Compiling and looking inside"))
    assert named == list(TARGETS)


@pytest.mark.parametrize("name", ["TILEJIT_TARGET", "NUMBA_ENABLE_CUDASIM"])
def test_variables_that_choose_where_a_call_runs_are_described(name):
    assert f"`{name}" in README


def test_functions_that_the_readme_names_exist():
    for name in re.findall(r"`(?:with )?tilejit\.(\w+)\(", README):
        assert name in tilejit.__all__, name
    for name in set(re.findall(r"\bT\.(\w+)", README)):
        assert name in T.__all__ or name == "print", name  # named as one that is not there


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"`((?:[a-z_]+/)+(?:[a-z_0-9]+\.py)?)`", README):
        places = (ROOT / path, ROOT / "tilejit" / path)
        assert any(place.exists() for place in places), path
    for name in re.findall(r"`(\w+\.py)`", section("Install and run")):
        assert (ROOT / "examples" / name).exists(), name


def test_continuous_integration_runs_the_commands_of_the_readme():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install = section("Install and run")
    assert "pip install -e '.[test]' && python examples/quickstart.py" in install
    assert "pip install -e '.[test]' && pytest" in install
    assert "-e '.[test]'" in text
    for command in ("examples/quickstart.py", "ruff check .", "ruff format --check .", "mypy"):
        assert command in text
    assert text.rstrip().splitlines()[-1].startswith("pytest")
