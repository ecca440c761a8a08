"""The structure of the four packages, measured: ``python -m tests.house`` prints it."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("sharding", "models", "pipeline", "cluster")
MAY_IMPORT = {
    "models": set(),
    "sharding": set(),
    "pipeline": {"models", "sharding"},
    "cluster": {"pipeline", "models", "sharding"},
}
MOST_LINES = 400
MOST_FILES = 14


@dataclass(frozen=True)
class Module:
    """One source file."""

    path: Path
    """Below the root."""

    @property
    def name(self) -> str:
        """Its dotted name; a package's is that of its folder."""
        parts = self.path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def text(self) -> str:
        return (ROOT / self.path).read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    def code_lines(self) -> int:
        """Return the lines of code, without docstrings, comments and blanks."""
        docstrings = set()
        for node in ast.walk(self.tree):
            for child in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
                value = child.value if isinstance(child, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    docstrings.update(range(child.lineno, (child.end_lineno or child.lineno) + 1))
        lines = set()
        skipped = {
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        }
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in skipped:
                lines.update(range(token.start[0], token.end[0] + 1))
        return len(lines - docstrings)


def modules() -> dict[str, Module]:
    """Return every module of the four packages by its name."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    found = [Module(path.relative_to(ROOT)) for path in paths]
    return {module.name: module for module in found}


def imports(module: Module, known: dict[str, Module]) -> Iterator[tuple[str, ast.stmt]]:
    """Yield every module of ours that a module imports, anywhere in it, with the statement."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in known:
                    yield alias.name, node
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    yield inner, node
                elif node.module in known:
                    yield node.module, node


def circles(known: dict[str, Module]) -> list[list[str]]:
    """Return the groups of modules that import each other in a circle, imports for type checking included.

    A module below a package does not count as importing that package, although Python runs its ``__init__``.
    """
    graph = {name: {other for other, _ in imports(module, known)} - {name} for name, module in known.items()}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:  # Tarjan, "Depth-first search and linear graph algorithms", 1972
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = []
            while not group or group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def unexplained_imports(module: Module) -> list[int]:
    """Return the lines of imports inside functions that no comment gives a reason for.

    The reason stands as a comment on the line, or on the one above it or above the run of imports it belongs to.
    """
    lines = module.text.splitlines()
    found = []
    for function in ast.walk(module.tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom) and not _has_reason(lines, node):
                found.append(node.lineno)
    return sorted(set(found))


def _has_reason(lines: list[str], node: ast.stmt) -> bool:
    own = lines[node.lineno - 1 : node.end_lineno]
    if any("  # " in line for line in own):
        return True
    above = node.lineno - 2
    while above >= 0 and lines[above].strip().startswith(("import ", "from ")):
        if "  # " in lines[above]:
            return True
        above -= 1
    return above >= 0 and lines[above].strip().startswith("# ")


def table() -> str:
    """Return files, lines and code by folder, the largest fan-in, and the circles."""
    known = modules()
    files, lines, code = Counter[str](), Counter[str](), Counter[str]()
    fan_in = Counter[str]()
    for module in known.values():
        folder = str(module.path.parent)
        files[folder] += 1
        lines[folder] += module.lines
        code[folder] += module.code_lines()
        fan_in.update({other for other, _ in imports(module, known)})
    rows = [f"{'folder':40}{'files':>6}{'lines':>8}{'code':>8}"]
    rows += [f"{folder:40}{files[folder]:6}{lines[folder]:8}{code[folder]:8}" for folder in sorted(files)]
    rows.append(f"{'all':40}{files.total():6}{lines.total():8}{code.total():8}")
    rows.append("\nimported by most: " + ", ".join(f"{name} ({count})" for name, count in fan_in.most_common(8)))
    rows.append("circles: " + ("; ".join(" <-> ".join(group) for group in circles(known)) or "none"))
    return "\n".join(rows)


def tree() -> str:
    """Return folders and files, each with the first line of its docstring."""
    rows: list[str] = []
    for module in sorted(
        modules().values(), key=lambda module: (module.path.parent, module.path.name != "__init__.py")
    ):
        first = (ast.get_docstring(module.tree) or "").splitlines()[:1]
        is_folder = module.path.name == "__init__.py"
        depth = len(module.path.parts) - (2 if is_folder else 1)
        name = f"{module.path.parent.name}/" if is_folder else module.path.name
        rows.append(f"{'  ' * depth}{name}".ljust(30) + "".join(first))
    return "\n".join(rows)


if __name__ == "__main__":
    print(tree() if sys.argv[1:] == ["--tree"] else table())
