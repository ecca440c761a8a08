"""Frozen dataclasses from plain values, such as those of a TOML file, with errors that name the key."""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sharding.errors import UserError, nearest
from sharding.names import refuse_secret

T = TypeVar("T")

TEXTS = str | tuple[str, ...]
"""Type of a key that is a string or a list of strings."""


def build_config(kind: type[T], values: Mapping[str, Any], source: str) -> T:
    """Build a frozen dataclass, whose fields may be sections, from nested plain values such as those of a TOML file.

    Args:
        kind: Dataclass that checks its own ranges; a field is a str, int, float, bool, tuple[str, ...] or dataclass.
        values: Values by key; absent keys keep their defaults.
        source: File or place named in errors.

    Raises:
        UserError: An unknown key (the nearest is named), a value of the wrong type or out of range, a secret in a URI.
    """
    _refuse_secrets(values, "", source)
    return typing.cast(T, _build(kind, values, "", source))


def require(condition: bool, option: str, value: object, wanted: str) -> None:
    """Raise a `UserError` about a value out of range unless ``condition`` holds."""
    if not condition:
        raise UserError(f"{option} = {value!r} is out of range: it must be {wanted}")


def require_one_of(option: str, value: str, known: Sequence[str]) -> None:
    """Raise a `UserError` that names the nearest of ``known`` unless ``value`` is one of them."""
    if value not in known:
        raise UserError(f"{option} = {value!r} is not known{nearest(value, known)}")


def _refuse_secrets(values: Mapping[str, Any], prefix: str, source: str) -> None:
    """Refuse a secret in any value, before an error message repeats it."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _refuse_secrets(value, f"{prefix}{key}.", source)
        else:
            refuse_secret(f"{source}: {prefix}{key}", str(value))


def _build(kind: type, values: Mapping[str, Any], prefix: str, source: str) -> object:
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{source}: unknown key {prefix + key!r}{nearest(key, hints)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise UserError(f"{source}: {prefix + key!r} is a section, written [{prefix + key}], not a value")
            arguments[key] = _build(typing.cast(type, hints[key]), value, f"{prefix}{key}.", source)
        elif typing.get_origin(hints[key]) is dict:  # a section that checks its own keys
            if not isinstance(value, Mapping):
                raise UserError(f"{source}: {prefix + key!r} is a section, written [{prefix + key}], not a value")
            arguments[key] = dict(value)
        else:
            arguments[key] = _coerce(hints[key], value, prefix + key, source)
    try:
        return kind(**arguments)
    except ValueError as error:  # a section that does not use UserError, such as the one of `models`
        raise UserError(f"{source}: {error}") from None


def _coerce(hint: Any, value: object, option: str, source: str) -> object:
    if typing.get_origin(hint) is typing.Literal:  # the section checks the word and names the nearest valid one
        hint = str
    if hint == TEXTS:
        hint = tuple[str, ...] if isinstance(value, list) else str
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return tuple(value)
        raise UserError(f"{source}: {option} = {value!r} must be a list of strings")
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    for kind in kinds:
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    wanted = " or ".join(words[kind] for kind in kinds)
    raise UserError(f"{source}: {option} = {reprlib.repr(value)} must be {wanted}")
