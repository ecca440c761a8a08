"""Names of bands: from the file, else from its description; compared between products, never guessed by position."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sharding.errors import UnusableError

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "coastal": ("b01", "b1", "coastal", "coastalblue", "aerosol", "coastalaerosol"),
    "blue": ("b02", "b2", "blue", "b"),
    "green": ("b03", "b3", "green", "g"),
    "yellow": ("yellow",),
    "red": ("b04", "b4", "red", "r"),
    "rededge": ("rededge",),
    "rededge071": ("b05", "b5", "rededge1", "rededge071"),
    "rededge075": ("b06", "b6", "rededge2", "rededge075"),
    "rededge078": ("b07", "b7", "rededge3", "rededge078"),
    "nir": ("b08", "b8", "nir", "nearinfrared", "nir1", "n"),
    "nir08": ("b8a", "nir08", "nirnarrow"),
    "nir09": ("b09", "b9", "nir09", "watervapour"),
    "nir2": ("nir2",),
    "cirrus": ("b10", "cirrus"),
    "swir16": ("b11", "swir1", "swir16"),
    "swir22": ("b12", "swir2", "swir22"),
    "pan": ("pan", "panchromatic", "p"),
}
"""Names of each band in files, in lower case without separators; the first are those of STAC's EO extension."""

_KNOWN = {name: band for band, names in SYNONYMS.items() for name in names}


def canonical(name: str) -> str:
    """Return the common name of a band: ``red`` for ``B04``, ``Red`` and ``R``; an unknown name is only tidied."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return _KNOWN.get(plain, name.strip().lower())


def choose_bands(
    title: str,
    own: Sequence[str | None],
    order: Sequence[str] | None,
    wanted: Sequence[int | str] | None,
) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
    """Choose the bands of a raster.

    Args:
        title: Name of the raster for messages.
        own: Name of each band by the file itself, from 1; None where it has none.
        order: Names of all bands by the description; None if it gives none.
        wanted: Numbers from 1 or names; None takes all.

    Returns:
        1-based numbers, and the common name of each, None if unknown.

    Raises:
        UnusableError: ``wrong-bands``: a band does not exist, a name is unknown, or names contradict each other.
    """
    names = [canonical(name) if name else None for name in own]
    if order is not None:
        if len(order) != len(own):
            raise UnusableError("wrong-bands", f"{title} has {len(own)} bands, and its `order` names {len(order)}")
        for number, (theirs, ours) in enumerate(zip(names, map(canonical, order), strict=True), start=1):
            if theirs is not None and theirs in SYNONYMS and theirs != ours:
                raise UnusableError(
                    "wrong-bands", f"band {number} of {title} is named {theirs!r} by the file and {ours!r} by `order`"
                )
            names[number - 1] = ours
    if wanted is None:
        wanted = range(1, len(own) + 1)
    numbers = tuple(band if isinstance(band, int) else _by_name(title, names, band) for band in wanted)
    for number in numbers:
        if not 1 <= number <= len(own):
            raise UnusableError("wrong-bands", f"{title} has {len(own)} bands, and band {number} is asked for")
    return numbers, tuple(names[number - 1] for number in numbers)


def check_same(title: str, names: Sequence[str | None], other: str, theirs: Sequence[str | None]) -> None:
    """Compare the bands of two rasters by their names.

    Raises:
        UnusableError: ``wrong-bands``: another number of bands, or a name that contradicts the other's at its position.
    """
    if len(names) != len(theirs):
        raise UnusableError("wrong-bands", f"{title} gives {len(names)} bands, {other} gives {len(theirs)}")
    for number, (mine, yours) in enumerate(zip(names, theirs, strict=True), start=1):
        if mine is not None and yours is not None and mine != yours:
            raise UnusableError(
                "wrong-bands",
                f"band {number} of {title} is {mine!r}, and of {other} {yours!r}: give `bands` by name for both",
            )


def _by_name(title: str, names: Sequence[str | None], band: str) -> int:
    wanted = canonical(band)
    places = [number for number, name in enumerate(names, start=1) if name == wanted]
    if len(places) == 1:
        return places[0]
    if not any(names):
        raise UnusableError(
            "wrong-bands", f"{title} does not name its bands, and {band!r} is asked for: give numbers, or `order`"
        )
    found = ", ".join(str(name) for name in names)
    why = "has no band" if not places else "has several bands"
    raise UnusableError("wrong-bands", f"{title} {why} {band!r}: it has {found}")
