"""How things in object storage are called: ``s3://bucket/folder/name.parquet?region=eu-west-1``.

What stands between the bucket and the ``?`` is the key as it is: nothing in it is decoded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

from batchrun.errors import UsageError

SCHEMES: Final = ("s3", "gs", "gcs", "abfs", "abfss")
_ADDRESS: Final = re.compile(
    rf"({'|'.join(SCHEMES)})://([^/?]*)/?([^?]*)(?:\?(.*))?", re.IGNORECASE | re.DOTALL
)


class Address(NamedTuple):
    """The parts of an address; of some storages the ``host`` is the bucket."""

    scheme: str
    host: str
    key: str
    options: str

    def at(self, key: str) -> str:
        """The address of another key in the same place."""
        options = f"?{self.options}" if self.options else ""
        return f"{self.scheme}://{self.host}/{key}{options}"


def is_address(text: str) -> bool:
    """Whether this names something in object storage.

    UsageError for one with credentials in it: nothing may keep or show that.
    """
    if _ADDRESS.match(text) is None:
        return False
    address = address_of(text)
    user, at, place = address.host.rpartition("@")
    # Names that are none stand there too: a container's, or ``anonymous``.
    if at and (":" in user or address.scheme == "s3"):
        raise UsageError(
            f"{address._replace(host=place).at(address.key)}: credentials do not belong in an"
            " address",
            next_steps=("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",),
        )
    return True


def address_of(text: str) -> Address:
    """The parts of an address."""
    found = _ADDRESS.fullmatch(text)
    assert found is not None
    scheme, host, key, options = found.groups("")
    return Address(scheme.lower(), host, key, options)


def name_of(place: str) -> str:
    """The last part of an address, without its options, or of a local path."""
    return address_of(place).key.rpartition("/")[2] if is_address(place) else Path(place).name


def beside(address: str, name: str) -> str:
    """The address of ``name`` in the same folder."""
    parts = address_of(address)
    return parts.at("".join(parts.key.rpartition("/")[:2]) + name)
