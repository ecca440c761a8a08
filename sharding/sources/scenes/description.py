"""Description of a folder of scenes: ``scenes.toml``, parsed and checked before anything is read."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.errors import UserError, nearest
from sharding.files import regular_file
from sharding.sources.options import is_day

FILE_NAME = "scenes.toml"
MAX_BYTES = 1 << 20
"""Size limit of the description."""


@dataclass(frozen=True)
class Images:
    """Description of one kind of image; what is None is read from the files."""

    files: tuple[str, ...] = ()
    """Patterns below the folder, with ``*``, ``{scene}``, ``{revisit}`` and ``{date}``."""

    bands: tuple[int | str, ...] | None = None
    """Bands by number from 1 or by name; None takes all."""

    order: tuple[str, ...] | None = None
    """Names of all bands of a file, in order."""

    scale: float | None = None
    """Reflectance is value x scale + offset."""

    offset: float | None = None
    """Reflectance of the value 0."""

    offset_since: str | None = None
    """First day of revisits that have the offset, ``YYYY-MM-DD``; earlier ones have none. None gives it to all."""

    nodata: tuple[float, ...] | None = None
    """Values without data: one for all bands, or one per band of the file."""

    date: str | None = None
    """Day of acquisition of the revisits or the PAN, ``YYYY-MM-DD``."""

    cloud: tuple[int, ...] = (1,)
    """Values of a mask that are cloud or shadow."""

    unknown: tuple[int, ...] = (255,)
    """Values of a mask that say nothing."""


@dataclass(frozen=True)
class ListedScene:
    """One scene whose files are listed."""

    name: str
    """Its name."""

    revisits: tuple[str, ...]
    """Files of the revisits, in order."""

    pan: str
    """File of the panchromatic image."""

    target: str = ""
    """File of the target; empty without one."""

    masks: tuple[str, ...] = ()
    """Files of the cloud masks, one per revisit; empty without masks."""

    dates: tuple[str, ...] = ()
    """Days of the revisits; empty if the files tell them."""


@dataclass(frozen=True)
class Description:
    """Description of a folder of scenes."""

    revisits: Images
    """Low-resolution images."""

    pan: Images
    """Panchromatic image."""

    target: Images
    """High-resolution multispectral image."""

    masks: Images
    """Cloud masks of the revisits; no patterns without masks."""

    scenes: tuple[ListedScene, ...] = ()
    """Scenes whose files are listed; empty if patterns find them."""

    ratio: float | None = None
    """PAN pixels per LR pixel; None measures it."""


_KINDS = ("revisits", "pan", "target", "masks")
_MASK_KEYS = ("files", "cloud", "unknown")


def read_description(folder: Path, name: str = FILE_NAME, *, target: bool = True) -> Description:
    """Read ``scenes.toml`` of a folder, or another description; without ``target`` it may name none.

    Raises:
        UserError: If it is missing or wrong; the message names the key.
    """
    path = folder / name
    try:
        if not path.exists():
            raise UserError(
                f"{path} is missing: `satfusion describe {folder}` writes one from what it finds; check it, then shard"
            )
        if regular_file("the description", path) > MAX_BYTES:
            raise UserError(f"{path} has more than {MAX_BYTES} bytes: it should only describe the files")
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as TOML ({error}): correct it") from error
    return parse(table, str(path), target=target)


def parse(table: Mapping[str, Any], path: str, *, target: bool = True) -> Description:
    """Parse the table of a description; ``path`` names it in messages. Without ``target`` it may name none.

    Raises:
        UserError: For an unknown key or a value of a wrong type.
    """
    _known(table, (*_KINDS, "scene", "ratio"), "", path)
    kinds = {kind: _images(table.get(kind, {}), kind, path) for kind in _KINDS}
    listed = table.get("scene", [])
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise UserError(f"{path}: scene must be a list of tables, each written [[scene]]")
    needed = ("revisits", "pan", "target") if target else ("revisits", "pan")
    scenes = tuple(_listed(item, path, needed) for item in listed)
    patterns = [kind for kind in needed if not kinds[kind].files]
    if not scenes and patterns:
        raise UserError(f"{path}: {patterns[0]}.files is missing: give a pattern, or list the files by [[scene]]")
    names = [scene.name for scene in scenes]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: scene.name = {twice!r} is given twice: name each scene once")
    ratio = _number(table["ratio"], "ratio", path) if "ratio" in table else None
    if ratio is not None and not 1 <= ratio <= 64:
        raise UserError(f"{path}: ratio = {ratio:g} must be from 1 to 64 PAN pixels per LR pixel")
    return Description(**kinds, scenes=scenes, ratio=ratio)


def _images(table: Any, kind: str, path: str) -> Images:
    if not isinstance(table, dict):
        raise UserError(f"{path}: {kind} is a table, written [{kind}]")
    fields = tuple(Images.__dataclass_fields__)
    others = ["cloud", "unknown", *["date"] * (kind == "target"), *["offset_since"] * (kind != "revisits")]
    known = _MASK_KEYS if kind == "masks" else tuple(name for name in fields if name not in others)
    _known(table, known, f"{kind}.", path)
    found: dict[str, Any] = {}
    for key, value in table.items():
        option = f"{kind}.{key}"
        if key in ("files", "order"):
            found[key] = _texts(value, option, path)
        elif key == "bands":
            items = value if isinstance(value, list) else [value]
            if not items or not all(isinstance(item, int | str) and not isinstance(item, bool) for item in items):
                raise UserError(f"{path}: {option} = {value!r} must be a list of numbers from 1, or of names")
            found[key] = tuple(items)
        elif key in ("cloud", "unknown"):
            items = value if isinstance(value, list) else [value]
            if not all(isinstance(item, int) and 0 <= item <= 255 for item in items):
                raise UserError(f"{path}: {option} = {value!r} must be a list of values from 0 to 255")
            found[key] = tuple(items)
        elif key == "nodata":
            items = value if isinstance(value, list) else [value]
            found[key] = tuple(_number(item, option, path, finite=False) for item in items)
        elif key in ("date", "offset_since"):
            found[key] = _text(str(value), option, path)  # TOML may give a date
        else:
            found[key] = _number(value, option, path)
    if found.get("scale", 1) == 0:
        raise UserError(f"{path}: {kind}.scale = 0 makes every value equal: give reflectance per value, such as 0.0001")
    if "offset_since" in found and not ("offset" in found and is_day(found["offset_since"])):
        raise UserError(f"{path}: {kind}.offset_since = {found['offset_since']!r} needs a day YYYY-MM-DD, and `offset`")
    if kind == "pan" and len(found.get("bands", [1])) != 1:
        raise UserError(f"{path}: pan.bands = {table['bands']!r} must name one band")
    return Images(**found)


def _listed(table: Mapping[str, Any], path: str, needed: tuple[str, ...]) -> ListedScene:
    _known(table, tuple(ListedScene.__dataclass_fields__), "scene.", path)
    for key in ("name", *needed):
        if key not in table:
            raise UserError(f"{path}: a [[scene]] lacks {key}: each needs name, {', '.join(needed)}")
    lists: dict[str, Any] = {
        key: _texts(table.get(key, []), f"scene.{key}", path) for key in ("revisits", "masks", "dates")
    }
    given = [key for key in ("name", "pan", "target") if key in table]
    texts: dict[str, Any] = {key: _text(table[key], f"scene.{key}", path) for key in given}
    return ListedScene(**texts, **lists)


def _known(table: Mapping[str, Any], names: tuple[str, ...], prefix: str, path: str) -> None:
    for key in table:
        if key not in names:
            raise UserError(f"{path}: unknown key {prefix + key!r}{nearest(key, names)}")


def _texts(value: Any, option: str, path: str) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    return tuple(_text(str(item) if option.endswith("dates") else item, option, path) for item in items)


def _text(value: Any, option: str, path: str) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{path}: {option} = {value!r} must be a text")
    return value


def _number(value: Any, option: str, path: str, *, finite: bool = True) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{path}: {option} = {value!r} must be a number")
    number = float(value)
    if finite and (number != number or number in (float("inf"), float("-inf"))):
        raise UserError(f"{path}: {option} = {value!r} must be finite")
    return number
