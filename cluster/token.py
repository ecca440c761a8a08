"""Token of a local cluster: a file that only its owner can read, found by the address of the cluster's job server.

Without its token, Ray's job server, dashboard, GCS and raylets refuse every request. For other clusters Ray's own
variables apply: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN, else the file ~/.ray/auth_token.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import IO

import psutil

from sharding.errors import UserError

MODE_VARIABLE, PATH_VARIABLE, TOKEN_VARIABLE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN"
SERVER_VARIABLE = "SATFUSION_JOB_SERVER"
"""Environment variable of a local cluster's processes: the URL of its job server."""


_MOST_BYTES = 1 << 26


def create_token(path: Path) -> None:
    """Write a new random token to a new file that only this user can read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def token_file(address: str) -> Path | None:
    """Return the token file of this user's local cluster whose job server is at ``address``; None if it is none.

    Every process of the cluster names both in its environment, which other users cannot read. Processes of other users
    are skipped even where this user may read them: they could name any file, whose content would be sent to them.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.uids().real != os.getuid():
                continue
            environment = process.environ()
            if environment.get(SERVER_VARIABLE) == address.rstrip("/") and environment.get(PATH_VARIABLE):
                return Path(environment[PATH_VARIABLE])
    return None


def authorization(path: Path) -> dict[str, str]:
    """Return the HTTP header with the token of a file.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        return {"Authorization": f"Bearer {path.read_text().strip()}"}
    except OSError as error:
        raise UserError(
            f"cannot read the cluster's token in {path} ({error.strerror}): start the cluster again with "
            "`satfusion cluster down` and `satfusion cluster up`"
        ) from None


def ask(url: str, headers: Mapping[str, str], timeout: float) -> bytes:
    """Return the answer of a cluster to a GET request, without a proxy and without following redirects.

    So the token reaches the address that it belongs to and no other.

    Args:
        url: ``http://`` or ``https://``.
        headers: Headers, such as that of `authorization`.
        timeout: Seconds without a byte after which the request fails.

    Raises:
        urllib.error.HTTPError: For another status than 200, such as a redirect.
        OSError: The server does not answer.
        ValueError: It does not speak HTTP, or its answer is too large.
    """
    request = urllib.request.Request(url, headers=dict(headers))  # noqa: S310 - http(s) only
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
    try:
        with opener.open(request, timeout=timeout) as response:
            answer: bytes = response.read(_MOST_BYTES + 1)
    except http.client.HTTPException as error:
        raise ValueError(f"no HTTP ({error!r})") from error
    if len(answer) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES} bytes")
    return answer


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None
