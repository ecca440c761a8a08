"""What S3's and botocore's errors mean: which of them pass by themselves, and what to tell the user of the others.

Neither the endpoint nor a credential stands in a sentence of this module: both may be secrets.
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
# These come with other statuses. The digests are of a request's body that was damaged on its way.
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
    """The pieces of a body that arrived cannot be completed to an object."""


def code_of(error: ClientError) -> str:
    """Return S3's error code; the HTTP status where the answer had no body."""
    return str(error.response["Error"]["Code"])


def status_of(error: ClientError) -> int:
    """Return the HTTP status."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def passing_reason(error: Exception) -> str | None:
    """Return in a word why a request failed that may succeed when it is sent again; None where it will not."""
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
        ResponseParserError,  # a listing or an acknowledgement whose body was cut
    )
    return type(error).__name__ if isinstance(error, passing) else None


@contextlib.contextmanager
def explained(where: str, bucket: str) -> Iterator[None]:
    """Turn errors of botocore into sentences. ``from None``: their text holds the endpoint.

    Args:
        where: the URI that the request was for.
        bucket: its bucket.
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
            f"the S3 server cannot serve {where} now ({code}): try again later, or ask who runs it"
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
    """Explain a request that got no answer from S3."""
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
