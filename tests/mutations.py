"""Damage for tests of files: values of a JSON document and bytes of a file, changed by a seeded generator."""

from __future__ import annotations

import copy
import random
from typing import Any

ODD = (
    *(-1, 0, 1, 2**31, 2**53, 2**63, 2**70, -(2**70), 10**15, 1.5, -0.0, 1e300, True, None, "", "0", "abc", "\x00"),
    *("../../x", "\x1b[2J", "a" * 5000, [], {}, [[]], {"": None}, [1, 2], {"train": []}),
)
"""Values in place of others."""


def mutated(document: Any, draw: random.Random) -> Any:
    """Return a copy of a JSON document in which one to three values are changed, repeated, moved or removed."""
    changed = copy.deepcopy(document)
    for _ in range(draw.randint(1, 3)):
        _change(changed, draw)
    return changed


def _change(document: Any, draw: random.Random) -> None:
    parent, key = _place(document, draw)
    action = draw.randrange(4)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, list):
        parent.append(parent[key])
    elif action == 2 and isinstance(parent[key], int):
        parent[key] += draw.choice((-512, -1, 1, 512, 10**6))
    else:
        parent[key] = copy.deepcopy(draw.choice(ODD))


def _place(document: Any, draw: random.Random) -> tuple[Any, Any]:
    """Return a container and a key in it, deep ones as likely as others."""
    parent, key = document, draw.choice(_keys(document))
    while isinstance(parent[key], dict | list) and parent[key] and draw.random() < 0.85:
        parent = parent[key]
        key = draw.choice(_keys(parent))
    return parent, key


def _keys(value: Any) -> list[Any]:
    return sorted(value) if isinstance(value, dict) else list(range(len(value)))


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return a file in which up to eight bytes are changed, and which may be cut or have more at its end."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    cut = draw.choice((len(changed), len(changed), draw.randrange(len(changed))))
    return bytes(changed[:cut]) + draw.choice((b"", b"", b"\0" * 100))
