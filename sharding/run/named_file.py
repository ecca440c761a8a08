"""Files that the user names, such as ``--png FILE``: checked before the work, and replaced only if they are ours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from sharding.errors import UserError
from sharding.storage import LocalStorage

SOFTWARE = "satfusion inspect"
"""Text ``Software`` of each contact sheet, by which it is recognised."""
PAGE_START = '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta name="generator" content="satfusion">\n'
"""First lines of each page of ours, by which it is recognised."""
_REPORTS = ({"index_sha256", "shards", "skipped_aois"}, {"error", "skipped", "skipped_aois"})
"""Keys of the report of a dataset, and of a source without enough usable AOIs."""
_LARGEST_REPORT = 256 << 20


def check_sheet(path: Path) -> None:
    """Check that a contact sheet may be written to ``path``.

    Raises:
        UserError: For another suffix than .png, a place that cannot be written to, or a file that is no sheet of ours.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"--png {path} does not end in .png: give a file name that does")
    check_file("--png", path, _is_sheet)


def check_report(path: Path) -> None:
    """Check that a report may be written to ``path``.

    Raises:
        UserError: For a place that cannot be written to, or a file that is no report of ours.
    """
    check_file("--report", path, _is_report)


def check_page(option: str, path: Path) -> None:
    """Check that a page may be written to ``path``.

    Raises:
        UserError: For another suffix than .html, a place that cannot be written to, or a file that is no page of ours.
    """
    if path.suffix.lower() != ".html":
        raise UserError(f"{option} {path} does not end in .html: give a file name that does")
    check_file(option, path, _is_page)


def write_page(path: Path, draft: Path) -> None:
    """Publish a finished page under its checked name, whole or not at all.

    Raises:
        UserError: It cannot be written.
    """
    try:
        LocalStorage(path.absolute().parent).upload(path.name, draft)
    except UserError as error:
        raise UserError(f"cannot write --html {path}: {error}") from error


def write_file(option: str, path: Path, data: bytes) -> None:
    """Write a checked file, whole or not at all.

    Raises:
        UserError: It cannot be written.
    """
    try:
        LocalStorage(path.absolute().parent).write(path.name, data)
    except UserError as error:
        raise UserError(f"cannot write {option} {path}: {error}") from error


def write_report(path: Path, report: Mapping[str, object]) -> None:
    """Write the report of a finished run.

    Raises:
        UserError: It cannot be written.
    """
    write_file("--report", path, json.dumps(report, indent=1, sort_keys=True).encode())


def check_file(option: str, path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Check that a file may be written to ``path``.

    Args:
        option: Option that names the file.
        path: The file; it need not exist.
        is_ours: Function that recognises an existing file of this program.

    Raises:
        UserError: For a place that cannot be written to, or a file that is not ours.
    """
    folder = path.absolute().parent
    try:
        exists = path.exists() or path.is_symlink()
        if not folder.is_dir():
            raise UserError(f"{option} {path} is in no existing folder: make {folder}, or give another file")
        if exists and not path.is_file():
            raise UserError(f"{option} {path} is no regular file: give another name")
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise UserError(f"cannot use {option} {path} ({error.strerror}): give another file") from error
    if not writable:
        raise UserError(f"{option} {path} cannot be written: {folder} is read-only for this user; give another file")
    if exists and not is_ours(path):
        raise UserError(
            f"{option} {path} exists, and this program did not write it: move it away, or give another name"
        )


def _is_sheet(path: Path) -> bool:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return False


def _is_page(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(PAGE_START)) == PAGE_START.encode()
    except OSError:
        return False


def _is_report(path: Path) -> bool:
    try:
        if path.stat().st_size > _LARGEST_REPORT:
            return False
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and any(data.keys() >= keys for keys in _REPORTS)
