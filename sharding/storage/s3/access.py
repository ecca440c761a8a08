"""How a bucket is asked, by environment variables: without a key, at the requester's cost; and at which endpoint."""

from __future__ import annotations

import logging
import os
import urllib.parse
from typing import TYPE_CHECKING, Any

from sharding.errors import UserError
from sharding.names import refuse_secret

if TYPE_CHECKING:
    from botocore.model import OperationModel

_YES, _NO = {"YES", "TRUE", "ON", "1"}, {"", "NO", "FALSE", "OFF", "0"}
_warned: set[str] = set()
"""Endpoints with a path that were logged."""
logger = logging.getLogger(__name__)


def is_unsigned() -> bool:
    """Return whether ``AWS_NO_SIGN_REQUEST`` is YES, as GDAL and rasterio read it: requests then carry no key.

    Raises:
        UserError: For a value that is neither yes nor no.
    """
    value = os.environ.get("AWS_NO_SIGN_REQUEST", "").strip().upper()
    if value not in {*_YES, *_NO}:
        raise UserError(f"AWS_NO_SIGN_REQUEST is {value!r}, which is neither yes nor no: set it to YES or NO")
    return value in _YES


def is_requester_charged() -> bool:
    """Return whether ``AWS_REQUEST_PAYER`` is ``requester``.

    Raises:
        UserError: For another value.
    """
    value = os.environ.get("AWS_REQUEST_PAYER", "").strip()
    if value.lower() not in {"", "requester"}:
        raise UserError(f"AWS_REQUEST_PAYER is {value!r}: set it to requester, or unset it")
    return bool(value)


def charge_requester(params: dict[str, Any], model: OperationModel, **context: object) -> dict[str, Any]:
    """Return a request's parameters, with the requester as payer if the operation has that; a handler of botocore."""
    takes = "RequestPayer" in model.input_shape.members
    return {**params, "RequestPayer": "requester"} if takes else params


def hint() -> str:
    """Return the end of a message about a refusal: what is unusual in how this process asks, or may be missing."""
    if is_unsigned():
        return "; AWS_NO_SIGN_REQUEST is set, so requests carry no key, and only public buckets answer them"
    return token_hint() or (
        "" if is_requester_charged() else "; a requester-pays bucket needs AWS_REQUEST_PAYER=requester"
    )


def token_hint() -> str:
    """Return the end of a message about a refused key: the session token, if one is set."""
    if not os.environ.get("AWS_SESSION_TOKEN"):
        return ""
    return "; AWS_SESSION_TOKEN must be the key's own and not expired: get new keys, or unset it for a lasting key"


def check_endpoint(url: str, bucket: str) -> None:
    """Refuse an endpoint with a secret or with the bucket in its path; log one with another path. It is not repeated.

    Raises:
        UserError: For such an endpoint.
    """
    where = "the S3 endpoint (AWS_ENDPOINT_URL, or endpoint_url of the profile)"
    refuse_secret(where, url)
    parts = urllib.parse.urlsplit(url).path.strip("/").split("/")
    if bucket in parts:
        raise UserError(
            f"{where} has a path that holds the bucket {bucket!r}, which the server would take for a key's beginning: "
            "give http(s)://HOST:PORT alone, and the bucket in the URI"
        )
    if parts != [""] and url not in _warned:
        _warned.add(url)
        logger.warning("%s has a path, which few servers expect; without it, it is http(s)://HOST:PORT", where)
