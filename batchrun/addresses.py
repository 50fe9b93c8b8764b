"""How things in object storage are called: ``s3://bucket/folder/name.parquet?region=eu-west-1``."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Final
from urllib.parse import urlsplit

SCHEMES: Final = ("s3", "gs", "gcs", "abfs", "abfss")
_ADDRESS: Final = re.compile(rf"({'|'.join(SCHEMES)})://", re.IGNORECASE)


def is_address(text: str) -> bool:
    """Whether this names something in object storage."""
    return _ADDRESS.match(text) is not None


def name_of(address: str) -> str:
    """The last part of an address, without its options."""
    return PurePosixPath(urlsplit(address).path).name


def beside(address: str, name: str) -> str:
    """The address of ``name`` in the same folder."""
    parts = urlsplit(address)
    return parts._replace(path=str(PurePosixPath(parts.path or "/").parent / name)).geturl()
