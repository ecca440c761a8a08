"""The site of the documentation: built strictly, with the reference from docstrings, and refused for a broken link."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout, as `make docs` does."""
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500)


def test_the_site_is_whole(tmp_path: Path) -> None:
    built = build(ROOT, tmp_path / "site")
    assert built.returncode == 0, built.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {path.stem for path in (tmp_path / "site").glob("*.html")} == pages | {"404"}
    reference = (tmp_path / "site/reference.html").read_text()
    for name in ("pipeline.config.TrainConfig.learning_rate", "pipeline.prediction.Fusion.predict"):
        assert f'id="{name}"' in reference
    # Nothing is loaded from another machine.
    assert 'src="http' not in reference
    assert 'rel="stylesheet" href="http' not in reference


def test_a_broken_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# Page\n\n[lost](nowhere.md)\n")
    # The settings, with a navigation of all pages that are there.
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[0])
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode == 1
    assert "nowhere.md" in built.stderr
