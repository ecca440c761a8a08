"""Results as lines of JSON, and their table. The module imports only the standard library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

VARIABLE = "SATFUSION_RESULTS"
"""Variable that names the file to which a process appends its lines; without it they are printed."""

Line = Mapping[str, object]


def emit(**fields: object) -> None:
    """Write one result to the file at once."""
    line = json.dumps(fields)
    if path := os.environ.get(VARIABLE):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    else:
        print(line, flush=True)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as text, each column as wide as its widest cell; rows may be shorter."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows), default=0))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def shown(value: object) -> str:
    """Return a value as a cell: numbers to four digits, nested values as JSON."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def table(lines: Iterable[Line]) -> str:
    """Return a table of all results: the parts and their outcomes, then the lines of each.

    A part's last line has ``outcome`` and ``took``; the others are its results. Tracebacks stay in the file.
    """
    by_part: dict[str, list[Line]] = {}
    for line in lines:
        by_part.setdefault(str(line["part"]), []).append(line)
    ends = [line for part in by_part.values() for line in part if "took" in line]
    head = [["part", "outcome", "seconds", "why"]]
    summary = [[str(e["part"]), str(e["outcome"]), f"{e['took']:.1f}", _reason(e)] for e in ends]
    text = columns(head + summary)
    for part, results in by_part.items():
        own = [line for line in results if "took" not in line]
        if own:
            text += ["", f"== {part}", *_rows(own)]
    return "\n".join(text) + "\n"


def _rows(lines: Sequence[Line]) -> list[str]:
    """Return results one below the other; those with the same keys under one heading."""
    text: list[str] = []
    group: list[list[str]] = []
    keys: list[str] = []
    for line in map(_as_row, lines):
        own = [key for key in line if key not in ("part", "at", "traceback")]
        if own != keys:
            text += columns(group)
            keys, group = own, [own]
        group.append([shown(line[key]) for key in own])
    return text + columns(group)


def _as_row(line: Line) -> Line:
    """Return a test's line with all its measurements in one field, other lines unchanged."""
    if "test" not in line:
        return line
    fixed = ("test", "outcome", "seconds")
    rest = {key: value for key, value in line.items() if key not in (*fixed, "part", "at", "traceback")}
    measured = ", ".join(shown(value) if key == "reason" else f"{key} {shown(value)}" for key, value in rest.items())
    failed = _reason(line) if "traceback" in line else ""
    return {**{key: line.get(key, "") for key in fixed}, "measured": "; ".join(filter(None, (measured, failed)))}


def _reason(end: Line) -> str:
    """Return the last line of a traceback that has content."""
    lines = [line for line in str(end.get("traceback", "")).splitlines() if line.strip()]
    return lines[-1].strip()[:160] if lines else ""
