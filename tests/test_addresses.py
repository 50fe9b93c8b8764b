"""How objects are called: the key stays as it is, whatever letters it has."""

from __future__ import annotations

import pytest

from batchrun.addresses import address_of, beside, is_address, name_of


@pytest.mark.parametrize(
    ("address", "name", "other"),
    [
        ("s3://b/a/in.jsonl", "in.jsonl", "s3://b/a/x"),
        ("s3://b/in.jsonl?region=eu-west-1", "in.jsonl", "s3://b/x?region=eu-west-1"),
        ("s3://b/day=1 2/ä #3%20.jsonl", "ä #3%20.jsonl", "s3://b/day=1 2/x"),
        (
            "abfss://c@a.dfs.core.windows.net/k/in.jsonl",
            "in.jsonl",
            "abfss://c@a.dfs.core.windows.net/k/x",
        ),
        ("S3://b/in.jsonl", "in.jsonl", "s3://b/x"),
        ("s3://b", "", "s3://b/x"),
    ],
)
def test_names_in_a_folder(address: str, name: str, other: str) -> None:
    assert is_address(address)
    assert name_of(address) == name
    assert beside(address, "x") == other


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://id:secret@b/k", "s3://b/k"),
        ("s3://id@b/k", "s3://b/k"),
        ("abfss://c:secret@a/k", "abfss://a/k"),
        ("gs://anonymous@b/k", None),
        ("abfss://c@a/k", None),
    ],
)
def test_credentials_are_found_and_not_shown(address: str, shown: str | None) -> None:
    parts = address_of(address)
    assert parts.has_credentials is (shown is not None)
    assert parts.shown() == (shown or address)


def test_a_local_path_has_a_name_too() -> None:
    assert name_of("a?/b#c.jsonl") == "b#c.jsonl"


def test_what_is_no_address() -> None:
    assert not any(map(is_address, ("in.jsonl", "https://a/b", "xs3://b/k", "s3:/b/k", "")))
