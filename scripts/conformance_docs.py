"""Makes docs/conformance.md from tests/conformance.toml and the markers in the tests, which it reads and does not run."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "conformance.md"
STATEMENTS = ROOT / "tests" / "conformance.toml"
MARKER = "pytest.mark.conformance"
HEAD = """# Conformance

What the agent promises to AWS IoT Core, AWS IoT Jobs and its users, and the tests that show it. Made by
`scripts/generate-docs` from `tests/conformance.toml` and the markers in `tests/`. `scripts/test --conformance` runs these
tests and prints what each statement came to; a run of all tests fails when a statement has none.
"""


def outputs() -> dict[Path, str]:
    """The page's path and text."""
    data = tomllib.loads(STATEMENTS.read_text(encoding="utf-8"))
    return {PAGE: "\n".join([HEAD, *sections(data)])}


def sections(data: dict[str, Any]) -> Iterator[str]:
    statements: dict[str, dict[str, str]] = data["statements"]
    exempt = {key: f"does not apply: {why}" for key, why in data.get("not_applicable", {}).items()}
    exempt |= {key: f"not yet: {why}" for key, why in data.get("not_yet", {}).items()}
    shown_by = markers(ROOT / "tests")
    known = {key for section in statements.values() for key in section}
    if unknown := shown_by.keys() - known:
        sys.exit(f"named in tests, but not in {STATEMENTS.name}: {', '.join(sorted(unknown))}")
    for title, section in statements.items():
        yield f"## {title}\n\n| id | statement | shown by |\n| --- | --- | --- |"
        for key, words in sorted(section.items()):
            yield f"| {key} | {words} | {exempt.get(key) or cell(shown_by.get(key, []))} |"
        yield ""


def cell(tests: list[tuple[Path, str]]) -> str:
    """The tests of one statement, file by file."""
    names: dict[Path, list[str]] = {}
    for path, name in sorted(tests):
        names.setdefault(path, []).append(f"`{name}`")
    links = [f"[{path.name}](../{path.relative_to(ROOT)}): {', '.join(found)}" for path, found in names.items()]
    return "<br>".join(links) or "**no test**"


def markers(folder: Path) -> dict[str, list[tuple[Path, str]]]:
    """File and name of each test that names a statement, by the statement's id."""
    found: dict[str, list[tuple[Path, str]]] = {}
    for path in sorted(folder.rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for name, keys in marked(tree.body, module_marks(tree)):
            for key in keys:
                found.setdefault(key, []).append((path, name))
    return found


def marked(body: list[ast.stmt], inherited: set[str], prefix: str = "") -> Iterator[tuple[str, set[str]]]:
    """Name and statements of each test function in `body`, those of its class and module included."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            own = {key for decorator in node.decorator_list for key in named(decorator)}
            yield from marked(node.body, inherited | own, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test"):
            own = {key for decorator in node.decorator_list for key in named(decorator)}
            yield f"{prefix}{node.name}", inherited | own


def module_marks(tree: ast.Module) -> set[str]:
    assigned = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    return {key for node in assigned for key in named(node.value)}


def named(node: ast.AST) -> Iterator[str]:
    """The statements that markers in `node` name, also those of single parameters."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == MARKER:
            for argument in call.args:
                if not isinstance(argument, ast.Constant) or not isinstance(argument.value, str):
                    sys.exit(f"a marker's statement must be written as text: {ast.unparse(call)}")
                yield argument.value


if __name__ == "__main__":
    for page, text in outputs().items():
        page.write_text(text, encoding="utf-8")
