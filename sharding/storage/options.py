"""How objects are stored in S3: parts, encryption, storage class; and the command line's words for it."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

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
    """What is asked of an S3 store with each object that is written. Reading needs none of it."""

    part_size: int = 16 * MIB
    """Bytes of a part, 5 MiB to 1 GiB. A larger object goes in parts, a smaller one in one request."""

    concurrency: int = 4
    """Parts of one object that are sent side by side, 1 to 64. Each is held in memory while it is sent."""

    sse: str | None = None
    """Encryption in the store: ``AES256``, ``aws:kms`` or ``aws:kms:KEY-ID``; None leaves it to the bucket."""

    storage_class: str | None = None
    """Such as ``STANDARD_IA``; None leaves it to the store."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: naming the option, its value and what it may be.
        """
        if not LEAST_PART_MIB * MIB <= self.part_size <= MOST_PART_MIB * MIB:
            raise UserError(
                f"--part-size {self.part_size / MIB:g} is out of range: "
                f"it may be {LEAST_PART_MIB} to {MOST_PART_MIB} (MiB)"
            )
        if not 1 <= self.concurrency <= MOST_CONCURRENCY:
            raise UserError(f"--concurrency {self.concurrency} is out of range: it may be 1 to {MOST_CONCURRENCY}")
        if self.sse is not None and not _SSE.fullmatch(self.sse):
            raise UserError(f"--sse {self.sse!r} is unknown: it may be AES256, aws:kms or aws:kms:KEY-ID")
        if self.storage_class is not None and not _CLASS.fullmatch(self.storage_class):
            raise UserError(
                f"--storage-class {self.storage_class!r} is no class: give one of the store's, as STANDARD_IA"
            )
        if self.storage_class in _ARCHIVES:
            raise UserError(
                f"--storage-class {self.storage_class} cannot be read without restoring each object: "
                "give one that can, such as STANDARD_IA or GLACIER_IR"
            )

    def request(self) -> dict[str, str]:
        """Return the parameters of PutObject and CreateMultipartUpload that ask for it."""
        wanted = {}
        if self.sse is not None and (match := _SSE.fullmatch(self.sse)):
            wanted["ServerSideEncryption"] = match["kind"]
            if match["key"]:
                wanted["SSEKMSKeyId"] = match["key"]
        if self.storage_class is not None:
            wanted["StorageClass"] = self.storage_class
        return wanted


def add_storage_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--sse``, ``--storage-class``, ``--part-size`` and ``--concurrency`` to a verb that writes objects."""
    default = StorageOptions()
    group = parser.add_argument_group("s3:// output")
    group.add_argument("--sse", metavar="KIND", help="encryption in the store: AES256, aws:kms or aws:kms:KEY-ID")
    group.add_argument("--storage-class", metavar="CLASS", help="the store's class, such as STANDARD_IA")
    group.add_argument(
        "--part-size",
        type=int,
        default=default.part_size // MIB,
        metavar="MIB",
        help="larger objects go in parts of this size (default: %(default)s)",
    )
    group.add_argument(
        "--concurrency",
        type=int,
        default=default.concurrency,
        metavar="N",
        help="parts of an object side by side (default: %(default)s)",
    )


def storage_options(args: argparse.Namespace) -> StorageOptions:
    """Return what the arguments of ``add_storage_arguments`` say.

    Raises:
        UserError: naming the argument that is out of range.
    """
    return StorageOptions(
        part_size=args.part_size * MIB,
        concurrency=args.concurrency,
        sse=args.sse,
        storage_class=args.storage_class,
    )
