"""WorldStrat trees of any number of AOIs, made from a few by hard links."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sharding.sources.synthetic.rasters import HR_SIDE, write_worldstrat


def plant(
    folder: Path,
    aois: int,
    worldstrat: Path | None = None,
    originals: int = 6,
    *,
    revisits: int = 8,
    hr_side: int = HR_SIDE,
) -> None:
    """Write a tree in WorldStrat's layout; its files are copied once and take the space of a few AOIs.

    Args:
        folder: Folder of the tree; it must not exist.
        aois: Number of AOIs in the tree.
        worldstrat: A folder whose AOIs are repeated; None generates AOIs.
        originals: Number of generated AOIs.
        revisits: Sentinel-2 images of a generated AOI.
        hr_side: Pixels of its 1.5 m rasters.
    """
    source = folder.with_name(f"{folder.name}-originals")
    if worldstrat is None:
        write_worldstrat(source, originals, seed=1, revisits=revisits, hr_side=hr_side)
    else:
        for part in ("hr_dataset", "lr_dataset"):
            shutil.copytree(worldstrat / part, source / part)
    names = sorted(path.name for path in (source / "hr_dataset").iterdir())
    for number in range(aois):
        original = names[number % len(names)]
        for path in (path for part in ("hr_dataset", "lr_dataset") for path in (source / part / original).rglob("*")):
            if path.is_file():
                target = folder / str(path.relative_to(source)).replace(original, f"Place-{number}")
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, target)
