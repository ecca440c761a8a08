"""Options of objects written to S3: parts, encryption, storage class."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from sharding.arguments import check_values
from sharding.errors import UserError

MIB = 1 << 20
LEAST_PART_MIB = 5
MOST_PART_MIB = 1024
MOST_CONCURRENCY = 64

_SSE = re.compile(r"(?P<kind>AES256|aws:kms)(?:(?<=kms):(?P<key>\S+))?")
_CLASS = re.compile(r"[A-Za-z0-9_-]+")
_ARCHIVES = ("GLACIER", "DEEP_ARCHIVE")


@dataclass(frozen=True)
class StorageOptions:
    """Options of each object written to S3. Reads ignore them."""

    part_size: Annotated[int, Meta(ge=LEAST_PART_MIB * MIB, le=MOST_PART_MIB * MIB)] = field(
        default=16 * MIB, metadata={"metavar": "MIB", "unit": MIB}
    )
    """Larger objects are sent in parts of this size. In bytes, 5 MiB to 1 GiB; the option is in MiB."""

    concurrency: Annotated[int, Meta(ge=1, le=MOST_CONCURRENCY)] = 4
    """Parts of an object that are sent in parallel, 1 to 64. Each is held in memory while it is sent."""

    sse: str | None = field(default=None, metadata={"metavar": "KIND"})
    """Encryption in the store: ``AES256``, ``aws:kms`` or ``aws:kms:KEY-ID``. None leaves it to the bucket."""

    storage_class: str | None = field(default=None, metadata={"metavar": "CLASS"})
    """Class of the store, such as ``STANDARD_IA``. None leaves it to the store."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: For an invalid value; it names the option, the value and the valid ones.
        """
        check_values(self)
        if self.sse is not None and not _SSE.fullmatch(self.sse):
            raise UserError(f"--sse {self.sse!r} is unknown: it may be AES256, aws:kms or aws:kms:KEY-ID")
        if self.storage_class is not None and not _CLASS.fullmatch(self.storage_class):
            raise UserError(
                f"--storage-class {self.storage_class!r} is no storage class: give one of the store, as STANDARD_IA"
            )
        if self.storage_class in _ARCHIVES:
            raise UserError(
                f"--storage-class {self.storage_class} cannot be read without restoring each object: "
                "give one that can, such as STANDARD_IA or GLACIER_IR"
            )

    def request(self) -> dict[str, str]:
        """Return these options as parameters of PutObject and CreateMultipartUpload."""
        wanted = {}
        if self.sse is not None and (match := _SSE.fullmatch(self.sse)):
            wanted["ServerSideEncryption"] = match["kind"]
            if match["key"]:
                wanted["SSEKMSKeyId"] = match["key"]
        if self.storage_class is not None:
            wanted["StorageClass"] = self.storage_class
        return wanted
