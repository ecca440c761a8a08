"""Land-cover classes of AOIs, from a split file as WorldStrat publishes it."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from sharding.errors import UserError
from sharding.files import read_text

NAME, CLASS = "tile", "IPCC Class"
UNKNOWN = "not listed"


def read_classes(path: Path) -> dict[str, str]:
    """Read the class of each AOI, of the first row that lists it.

    Raises:
        UserError: If the file is no CSV with the columns ``tile`` and ``IPCC Class``.
    """
    text = read_text("--classes", path)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if not {NAME, CLASS} <= set(reader.fieldnames or ()):
            raise UserError(f"--classes {path} lacks the column {NAME!r} or {CLASS!r}: give the published split file")
        found: dict[str, str] = {}
        for row in reader:
            found.setdefault((row[NAME] or "").strip(), (row[CLASS] or "").strip() or UNKNOWN)
    except csv.Error as error:
        raise UserError(f"--classes {path} cannot be read as CSV ({error}): give the published split file") from None
    return found
