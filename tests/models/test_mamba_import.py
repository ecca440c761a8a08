"""mamba_ssm's scan is imported by itself where the rest of that package is not to be had."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.heads.pan_mamba import scan

ERRORS = ("import no_such_library", "raise AttributeError('a library of another version')")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "mamba_ssm"}
    for name in before:
        del sys.modules[name]
    scan._import_fused.cache_clear()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        del sys.modules[name]
    sys.modules.update(before)
    scan._import_fused.cache_clear()


def install(folder: Path, top: str, interface: str) -> None:
    (folder / "mamba_ssm" / "ops").mkdir(parents=True)
    (folder / "mamba_ssm" / "__init__.py").write_text(f"from mamba_ssm import ops\n{top}\n")
    (folder / "mamba_ssm" / "ops" / "__init__.py").touch()
    (folder / "mamba_ssm" / "ops" / "selective_scan_interface.py").write_text(interface)


@pytest.mark.parametrize("top", ["", *ERRORS])
def test_the_scan_is_found(top: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, top, "def selective_scan_fn(u): return u + 1")
    monkeypatch.syspath_prepend(tmp_path)
    fused = scan._import_fused()
    assert fused is not None
    assert fused(1) == 2
    # A bare package that stayed would hide the error from whoever imports the whole.
    assert ("mamba_ssm" in sys.modules) == (not top)


def test_an_extension_of_another_build_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, ERRORS[0], "import selective_scan_cuda_of_another_python")
    monkeypatch.syspath_prepend(tmp_path)
    assert scan._import_fused() is None
    with pytest.raises(ImportError, match="selective_scan_cuda_of_another_python"):
        scan.import_mamba()
