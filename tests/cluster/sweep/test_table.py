"""Page of a sweep, from rows and reasons."""

from __future__ import annotations

from cluster.sweep.table import as_markdown
from pipeline.config import load_config


def test_the_reason_of_a_failure_is_a_line_without_markup() -> None:
    cell = load_config("srcnn_pnn", ["output.uri=/sweep/srcnn+pnn/seed-1"])
    page = as_markdown([], [cell], "test", {cell.output.uri: "a\n# head\n[link](x) <b> at C:\\d"})
    assert r"- [srcnn+pnn/seed-1](srcnn+pnn/seed-1/): failed: a # head \[link\](x) \<b\> at C:\\d" in page.splitlines()
