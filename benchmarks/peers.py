"""Imports of MosaicML Streaming and LitData from ``benchmarks/.peers``, without dependencies that are not needed here.

``python -m pip install --no-deps --target benchmarks/.peers -c constraints.txt -r benchmarks/peers.txt`` installs them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

FOLDER = Path(__file__).with_name(".peers")

UNUSED = (
    "transformers.feature_extraction_utils",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_base",
    "torchvision.datasets",
    "torchvision.transforms.functional",
)
"""Imports of their datasets of text and photographs; gigabytes that reading arrays does not need."""


def enable() -> None:
    """Make the peers importable, or exit with a sentence that explains how to install them."""
    if not FOLDER.is_dir():
        sys.exit(f"{FOLDER} is absent: {' '.join(__doc__.split('``')[3].split())}")
    sys.path.append(str(FOLDER))
    for name in UNUSED:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            module = ".".join(parts[:count])
            sys.modules.setdefault(module, Unused(module))


class Unused(ModuleType):
    """A module whose every name is an empty class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
