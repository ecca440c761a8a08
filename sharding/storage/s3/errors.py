"""Errors of S3 and botocore: the transient ones, and messages for the user about the others.

No message of this module contains the endpoint or a credential: both may be secrets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sharding.errors import UserError
from sharding.storage.base import BucketNotFoundError, NotFoundError, StorageUnavailableError
from sharding.storage.s3.access import hint, token_hint

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
_KEY_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch"}
_TOKEN_CODES = {"ExpiredToken", "InvalidToken", "ExpiredTokenException", "TokenRefreshRequired"}
_DENIED_CODES = {"AccessDenied", "AllAccessDisabled", "403"}
_NO_LOGIN = "run `aws sso login`, with --profile NAME if it has one"
# Errors of botocore before anything is sent to S3, by name: what is wrong, and what to do. Their own texts may hold
# paths, commands and endpoints.
_NO_KEYS = {
    "NoCredentialsError": "there is no S3 key: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; a "
    "public bucket needs no key: set AWS_NO_SIGN_REQUEST=YES",
    "PartialCredentialsError": "only one half of the S3 key is set: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "ProfileNotFound": "the profile that AWS_PROFILE names is in neither AWS configuration file: correct its name, or "
    "unset AWS_PROFILE",
    "UnauthorizedSSOTokenError": f"the profile's SSO login has expired: {_NO_LOGIN}",
    "SSOTokenLoadError": f"the profile has no SSO login yet: {_NO_LOGIN}",
    "TokenRetrievalError": f"the profile's SSO login has expired and cannot be renewed: {_NO_LOGIN}",
    "SSOError": f"the profile's SSO login does not work: {_NO_LOGIN}",
    "LoginRefreshRequired": "the profile's login has expired: run `aws login` again",
    "LoginTokenLoadError": "the profile has no login yet: run `aws login`",
    "CredentialRetrievalError": "the profile's program or role gives no S3 key: run its credential_process, or "
    "`aws sts get-caller-identity`, to see why",
    "InvalidConfigError": "the profile is incomplete: complete it in the AWS configuration file",
    "ConfigParseError": "the AWS configuration file cannot be parsed: correct it",
    "ConfigNotFound": "the file that AWS_CONFIG_FILE names does not exist: correct its path",
}


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
        return BucketNotFoundError(f"bucket {bucket!r} does not exist: create it, or correct the URI {where}{hint()}")
    if code in {"NoSuchKey", "404"}:
        return NotFoundError(f"{where} does not exist")
    if code == "NoSuchUpload":
        return NotFoundError(
            f"the unfinished upload of {where} was removed by another command or a lifecycle rule: run this again"
        )
    if code in _KEY_CODES:
        return UserError(
            f"the S3 server refused the access key for {where} ({code}): check AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY, or the profile{token_hint()}"
        )
    if code in _TOKEN_CODES:
        return UserError(
            f"the S3 server refused the session token for {where} ({code}): temporary keys have expired, or "
            "AWS_SESSION_TOKEN belongs to other keys; get new ones, or unset it for a lasting key"
        )
    if code in _DENIED_CODES:
        return UserError(
            f"access to {where} is denied ({code}): check the access key, the bucket's name and policy{hint()}"
        )
    return UserError(f"the S3 server refused {where} ({code}): check the URI and AWS_ENDPOINT_URL{hint()}")


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
    for kind in type(error).__mro__:
        if kind.__name__ in _NO_KEYS:
            return UserError(f"cannot open {where}, since {_NO_KEYS[kind.__name__]}")
    if name == "ParamValidationError":
        return UserError(f"{where} is no valid S3 URI: a bucket has 3 to 63 small letters, digits, dots and hyphens")
    if isinstance(error, ValueError):
        return UserError(f"cannot open {where}: AWS_ENDPOINT_URL is no valid http:// or https:// URL")
    return UserError(f"cannot open {where} ({name}): check the AWS_ variables and the AWS configuration file")


def _is_untrusted(error: Exception) -> bool:
    from botocore.exceptions import SSLError  # slow to import, and folders need none

    return isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error)
