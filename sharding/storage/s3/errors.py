"""Errors of S3 and botocore: the transient ones, and messages for the user about the others.

No message of this module contains the endpoint or a credential: both may be secrets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sharding.errors import UserError
from sharding.storage.base import BucketNotFoundError, NotFoundError, StorageUnavailableError

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

_BUSY_STATUSES = {408, 429, 500, 502, 503, 504}
# Transient codes with other statuses. The digest errors mean that a request's body was damaged on its way.
_PASSING_CODES = {
    "RequestTimeout",
    "SlowDown",
    "OperationAborted",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
_KEY_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_DENIED_CODES = {"AccessDenied", "AllAccessDisabled", "403"}
_NO_KEY_ERRORS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}


class RestartReadError(Exception):
    """Error of a body whose received pieces cannot be completed to an object."""


def code_of(error: ClientError) -> str:
    """Return S3's error code, or the HTTP status if the response had no body."""
    return str(error.response["Error"]["Code"])


def status_of(error: ClientError) -> int:
    """Return the HTTP status."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def passing_reason(error: Exception) -> str | None:
    """Return the reason of a transient failure in a word; None if a retry is of no use."""
    # Slow to import, and folders need none.
    from botocore.exceptions import ClientError, FlexibleChecksumError, HTTPClientError, IncompleteReadError
    from botocore.exceptions import ConnectionError as NotConnectedError  # slow to import, and folders need none
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError  # a TLS record damaged in a body: botocore lets it through

    if isinstance(error, ClientError):
        code = code_of(error)
        return code if code in _PASSING_CODES or status_of(error) in _BUSY_STATUSES else None
    if _is_untrusted(error):
        return None
    passing = (
        NotConnectedError,
        HTTPClientError,
        HTTPError,
        IncompleteReadError,
        FlexibleChecksumError,
        ResponseParserError,  # a listing or a confirmation whose body was cut
    )
    return type(error).__name__ if isinstance(error, passing) else None


@contextlib.contextmanager
def explained(where: str, bucket: str) -> Iterator[None]:
    """Convert errors of botocore to errors for the user. ``from None``: their text holds the endpoint.

    Args:
        where: URI of the request.
        bucket: Its bucket.
    """
    from botocore.exceptions import BotoCoreError, ClientError  # slow to import, and folders need none
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as error:
        raise _refusal(where, bucket, error) from None
    except (BotoCoreError, ResponseParserError, HTTPError, ValueError) as error:
        raise _no_answer(where, error) from None
    except RestartReadError as error:
        raise StorageUnavailableError(f"{where} {error}: try again") from None


def _refusal(where: str, bucket: str, error: ClientError) -> UserError:
    code = code_of(error)
    if passing_reason(error):
        return StorageUnavailableError(
            f"the S3 server cannot serve {where} now ({code}): try again later, or ask its operator"
        )
    if code == "NoSuchBucket":
        return BucketNotFoundError(f"bucket {bucket!r} does not exist: create it, or correct the URI {where}")
    if code in {"NoSuchKey", "404"}:
        return NotFoundError(f"{where} does not exist")
    if code in _KEY_CODES:
        return UserError(
            f"the S3 server refused the access key for {where} ({code}): check AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or the profile"
        )
    if code in _DENIED_CODES:
        return UserError(f"access to {where} is denied ({code}): check the access key, the bucket's name and policy")
    return UserError(f"the S3 server refused {where} ({code}): check the URI and AWS_ENDPOINT_URL")


def _no_answer(where: str, error: Exception) -> UserError:
    """Return the error for a request without a response from S3."""
    name = type(error).__name__
    if _is_untrusted(error):
        return UserError(
            f"the S3 server's certificate is not trusted, so {where} is not used: give your CA's file in AWS_CA_BUNDLE"
        )
    if passing_reason(error):
        return StorageUnavailableError(
            f"the S3 endpoint does not answer for {where} ({name}): check that it runs, and that "
            "AWS_ENDPOINT_URL names it"
        )
    if name in _NO_KEY_ERRORS:
        return UserError(
            f"no complete S3 credentials for {where} ({name}): set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if name == "ParamValidationError":
        return UserError(f"{where} is no valid S3 URI: a bucket has 3 to 63 small letters, digits, dots and hyphens")
    if isinstance(error, ValueError):
        return UserError(f"cannot open {where}: AWS_ENDPOINT_URL is no valid http:// or https:// URL")
    return UserError(f"cannot open {where} ({name}): check the AWS_ variables and the AWS configuration file")


def _is_untrusted(error: Exception) -> bool:
    from botocore.exceptions import SSLError  # slow to import, and folders need none

    return isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error)
