"""Text of rendered files: the mark by which our files are known, comments, and YAML."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

MARK = "Rendered by `satfusion cluster render`: change the TOML file and render it again."
"""Text in the first two lines of every rendered file; files without it are never overwritten."""


def header(*paragraphs: str) -> str:
    """Return `MARK` and the paragraphs as lines of comments with ``#``, an empty comment line before each paragraph."""
    lines = [MARK]
    for paragraph in paragraphs:
        lines += ["", *textwrap.wrap(paragraph, 110, break_on_hyphens=False)]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def to_yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return plain values as YAML documents, keys in the order given and texts of several lines as blocks."""
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)
    return text


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML ships no types.
    """Writer of blocks for texts of several lines, and of no anchors for values that occur twice."""

    def ignore_aliases(self, data: object) -> bool:
        """Write equal values out each time: other readers of the file need not know YAML's anchors."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
