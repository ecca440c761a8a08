"""Metadata of products in XML: of bounded size, without entities, read by the names of its elements."""

from __future__ import annotations

import math
from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from sharding.errors import UnusableError
from sharding.sources.scenes.layout import File

MAX_BYTES = 16 << 20
"""Size limit of a file; the largest of Sentinel-2's and of Pleiades' have 1 MB."""


def read_xml(file: File) -> Element:
    """Return the root element of a file.

    Raises:
        UnusableError: ``absurd-size`` beyond the limit, or ``unreadable`` for what is no XML or declares entities.
    """
    with file.open() as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UnusableError("absurd-size", f"{file.name} has more than {MAX_BYTES} bytes, which no metadata need")
    try:
        root: Element = fromstring(data, forbid_dtd=True)
    except DefusedXmlException:
        raise UnusableError(
            "unreadable", f"{file.name} declares a document type or entities, which are never read"
        ) from None
    except (ParseError, ValueError, LookupError) as error:
        raise UnusableError("unreadable", f"{file.name} is no XML ({error})") from error
    return root


def text_of(root: Element, path: str) -> str | None:
    """Return the text of the first element with this path at any depth; None if there is none, or it is empty."""
    found = root.find(f".//{path}")
    return (found.text or "").strip() or None if found is not None else None


def number_of(file: File, root: Element, path: str) -> float | None:
    """Return the number in the first element with this path at any depth; None if there is none.

    Raises:
        UnusableError: ``unreadable`` for another text.
    """
    text = text_of(root, path)
    return None if text is None else as_number(file, path, text)


def as_number(file: File, name: str, text: str | None) -> float:
    """Return a text as a finite number.

    Raises:
        UnusableError: ``unreadable`` for another text; the message names the element or attribute.
    """
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UnusableError("unreadable", f"{file.name}: {name} is {text!r}, and a number is needed")
    return number
