"""Options written once: fields of a frozen dataclass as arguments of the command line and as keys of a job's file.

An argument takes name, type, choices (a `Literal`) and default from the field, and its help from the first sentence of
the field's docstring. The field's ``metadata`` holds the rest:

- ``option``: the name on the command line, if it differs from the field's
- ``metavar``: the placeholder of the value in the help; by default the choices, or N for a number
- ``parse``: the function that converts the text to a value; by default the field's type
- ``unit``: the field's units per unit of the command line: 1,000,000 for a field in bytes and an option in MB
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sharding.errors import UserError
from sharding.names import local_path
from sharding.schema import check_ranges

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)


def add_options(parser: argparse._ActionsContainer, kind: type[DataclassInstance]) -> None:
    """Add an argument for each field of a dataclass, except fields that are dataclasses themselves."""
    helps = _first_sentences(kind)
    for item, hint in _typed_fields(kind):
        if _is_nested(hint):
            continue
        more, choices, text = item.metadata, _choices(hint), helps[item.name]
        unit = more.get("unit", 1)
        if hint is not bool and item.default is not MISSING and item.default is not None:
            text += f" (default: {_shown(item.default, unit)})"
        values: dict[str, Any] = {"action": "store_true"}
        if hint is not bool:
            usual = f"{{{','.join(choices)}}}" if choices else "N"
            usual_parse = functools.partial(local_path, _option_of(item)) if hint is Path else hint
            parse = more.get("parse", str if choices else usual_parse)
            values = {"type": _scaled(parse, unit), "metavar": more.get("metavar", usual)}
        # No default here: the dataclass has it.
        values |= {"dest": item.name, "default": argparse.SUPPRESS, "required": item.default is MISSING}
        parser.add_argument(_option_of(item), help=text.replace("%", "%%"), **values)


def add_path(parser: argparse._ActionsContainer, option: str, metavar: str, text: str, **more: Any) -> None:
    """Add an argument that is a path on this machine: ``file:///`` is accepted, other URIs are refused."""
    parse = functools.partial(local_path, option)
    parser.add_argument(option, type=parse, metavar=metavar, help=text, **more)


def read_options(kind: type[T], values: Mapping[str, object]) -> T:
    """Build a dataclass and its nested dataclasses from the given arguments: ``vars()`` of a parsed namespace.

    Raises:
        UserError: From the dataclass, which names the invalid argument.
    """
    found: dict[str, Any] = {}
    for item, hint in _typed_fields(kind):
        if _is_nested(hint):
            found[item.name] = read_options(hint, values)
        elif item.name in values:
            value = values[item.name]  # argparse collects several in a list
            found[item.name] = tuple(value) if isinstance(value, list) else value
    return kind(**found)


def check_values(options: DataclassInstance) -> None:
    """Compare each field whose type is a `Literal` with its choices, and each number with the range in its type.

    None passes where it is the default.

    Raises:
        UserError: For another value; it names the option, the value, and the choices or the range.
    """
    for item, hint in _typed_fields(type(options)):
        value, choices = getattr(options, item.name), _choices(hint)
        if choices and value not in choices and not (value is None and item.default is None):
            raise UserError(f"{_option_of(item)} {value!r} is unknown: it may be {', '.join(choices)}")
    check_ranges(options, _option_of)


@functools.cache
def _typed_fields(kind: type[DataclassInstance]) -> tuple[tuple[Field[Any], Any], ...]:
    """Return the fields with their types; for ``X | None``, the type is X."""
    hints = typing.get_type_hints(kind)
    return tuple((item, _without_none(hints[item.name])) for item in fields(kind))


def _without_none(hint: Any) -> Any:
    parts = typing.get_args(hint)
    return next(part for part in parts if part is not NoneType) if NoneType in parts else hint


def _is_nested(hint: Any) -> bool:
    return is_dataclass(hint)


def _choices(hint: Any) -> tuple[str, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _option_of(item: Field[Any]) -> str:
    option: str = item.metadata.get("option") or f"--{item.name.replace('_', '-')}"
    return option


def _scaled(parse: Callable[[str], Any], unit: int) -> Callable[[str], Any]:
    if unit == 1:
        return parse

    def scaled(text: str) -> float:
        value = parse(text) * unit
        return int(value) if math.isfinite(value) else value  # the dataclass refuses the others, with the valid range

    scaled.__name__ = parse.__name__  # argparse says "invalid float value"
    return scaled


def _shown(default: Any, unit: int) -> str:
    if isinstance(default, tuple):
        return ",".join(f"{part:g}" for part in default)
    return f"{default / unit:g}" if isinstance(default, float) or unit != 1 else str(default)


def _first_sentences(kind: type[DataclassInstance]) -> dict[str, str]:
    """Return the first sentence of each field's docstring, which Python keeps only in the source."""
    (body,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(after, ast.Expr), f"{kind.__name__}.{statement.target.id} has no docstring"
            text = " ".join(str(ast.literal_eval(after.value)).split()).replace("``", "")
            sentence = text.partition(". ")[0].removesuffix(".")
            found[statement.target.id] = sentence if sentence[1].isupper() else sentence[0].lower() + sentence[1:]
    return found
