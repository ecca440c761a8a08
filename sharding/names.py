"""Checks of external names: keys of a store must stay below their folder, and URIs must not hold a secret.

All code that turns a key into a local path uses `path_below`. Messages show keys escaped, and never show a secret.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from sharding.errors import UserError

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_URI = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*):/+(?P<rest>\S*)", re.IGNORECASE)
_SIGNED = re.compile(
    r"[?&;](sig|[^=&;]*(signature|credential|token|secret|password|access[-_]?key)[^=&;]*)=", re.IGNORECASE
)
# `--output=URI`, `output.uri=URI`: the option is part of the argument.
_OPTION = re.compile(r"(-{0,2}[A-Za-z][\w.-]*)=")


def climbs(key: str) -> bool:
    """Return True if a path could lead outside its folder on any system."""
    return "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in key.split("/"))


def holds_control(text: str) -> bool:
    """Return True if a text has a control character, which could steer a terminal."""
    return _CONTROL.search(text) is not None


def is_text(name: str) -> bool:
    """Return False for a text that is no Unicode: a file's name that is not UTF-8, or half a pair of JSON's escapes."""
    return _SURROGATE.search(name) is None


def path_below(folder: Path, key: str, place: str) -> Path:
    """Return the path of a key's object below a folder.

    Args:
        folder: Folder; it is not read.
        key: Name from a listing or an index, with ``/`` between parts.
        place: Name of the folder or store in the error.

    Raises:
        UserError: For a key that could lead elsewhere, or that holds control characters.
    """
    if climbs(key) or holds_control(key):
        raise UserError(
            f"{key!r} is no key of {place}: keys are relative and never climb with '..', and have no empty part, "
            "backslash or control character; correct or remove what has that name"
        )
    return folder.joinpath(*key.split("/"))


def refuse_secret(where: str, text: str) -> None:
    """Refuse a text with a URI that holds a user name, a password or a signature, before it is sent or logged.

    Args:
        where: Name of the option in the error, which does not repeat the text.
        text: URI, or any text that may contain one.

    Raises:
        UserError: For ``s3://KEY:SECRET@bucket``, ``https://user:password@host``, ``...?X-Amz-Signature=...`` and such.
    """
    if any(map(_holds_secret, _URI.finditer(text))):
        raise UserError(
            f"{where} holds a user name, password or signature, which is not sent anywhere: take it out, since a URI "
            "names only bucket and prefix, or host and folder; S3 keys go into the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Refuse a command line with a secret in a URI, before any message can repeat it.

    Raises:
        UserError: For such a URI; it names the option, or the word before the URI.
    """
    before = "satfusion"
    for argument in arguments:
        option = _OPTION.match(argument)
        refuse_secret(option[1] if option else f"the argument after {before!r}", argument)
        before = argument


def check_uri(where: str, uri: str) -> None:
    """Refuse a URI with a secret, and one that looks like an S3 URI but would be taken for a folder.

    Args:
        where: Name of the option in the error.
        uri: URI as the user gave it.

    Raises:
        UserError: For such a URI; it names ``where``.
    """
    refuse_secret(where, uri)
    if uri.lower().startswith("s3:") and not uri.lower().startswith("s3://"):
        raise UserError(f"{where} {uri!r} is no S3 URI: write s3://BUCKET/PREFIX, or ./{uri} for a folder of that name")


def local_path(where: str, text: str) -> Path:
    """Return a local path of the command line, with ``~`` expanded.

    Args:
        where: Name of the option in the error.
        text: Path as the user gave it.

    Raises:
        UserError: For an empty text or a URI; it names ``where``.
    """
    check_uri(where, text)
    if not text or ("://" in text and not is_file_uri(text)):
        raise UserError(f"{where} {text!r} is no local path: give a file or folder of this machine")
    return expanded(text)


def expanded(path: str) -> Path:
    """Return the path that ``file:///FOLDER`` or a local path names, with a leading ``~`` as the home folder.

    A shell does not expand the ``~`` of ``--output=~/x``.

    Raises:
        UserError: If there is no such home folder, or for a ``file:`` URI without an absolute path on this machine.
    """
    if is_file_uri(path):
        parts = urllib.parse.urlsplit(path)
        here = path[5:7] == "//" and parts.netloc.lower() in {"", "localhost"} and parts.path.startswith("/")
        if not here or parts.query or parts.fragment:
            raise UserError(
                f"{path!r} names no folder of this machine: write file:///FOLDER, an absolute path with %3F for '?' "
                "and %23 for '#'"
            )
        return Path(urllib.parse.unquote(parts.path))
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path!r} names a home folder that is not known: write the full path") from None


def is_file_uri(uri: str) -> bool:
    """Return True for a URI of the scheme ``file``, which names a local path."""
    return uri[:5].lower() == "file:"


def absolute_uri(uri: str, folder: Path) -> str:
    """Return a URI that names the same place in any working directory: a local path becomes absolute.

    Args:
        uri: URI, or a path that is relative to ``folder``.
        folder: Absolute path.

    Raises:
        UserError: Like `expanded`.
    """
    return uri if "://" in uri and not is_file_uri(uri) else str(folder / expanded(uri))


def _holds_secret(uri: re.Match[str]) -> bool:
    # A password may hold a slash, so that its @ stands in what looks like a path; an S3 key may be called a@b.
    if is_file_uri(uri[0]) and not uri["rest"].partition("/")[0].count("@"):
        return False  # a local path has no login
    named = uri["rest"].partition("/")[0] if uri["scheme"].lower() == "s3" else uri["rest"]
    is_s3_login = uri["scheme"].lower() == "s3" and ":" in named
    return "@" in named or is_s3_login or _SIGNED.search(uri["rest"]) is not None
