"""How objects are called: the key stays as it is, whatever letters it has."""

from __future__ import annotations

import pytest

from batchrun.addresses import beside, is_address, name_of
from batchrun.errors import UsageError


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
        ("s3://id:canary@b/k", "s3://b/k"),
        ("s3://canary@b/k", "s3://b/k"),
        ("abfss://c:canary@a/k", "abfss://a/k"),
    ],
)
def test_an_address_with_credentials_is_refused_and_does_not_show_them(
    address: str, shown: str
) -> None:
    with pytest.raises(UsageError, match="credentials do not belong") as refused:
        is_address(address)
    assert refused.value.message.startswith(f"{shown}: ")
    assert "canary" not in refused.value.message


@pytest.mark.parametrize("address", ["gs://anonymous@b/k", "abfss://c@a/k"])
def test_what_stands_before_the_host_need_not_be_credentials(address: str) -> None:
    assert is_address(address)


def test_a_local_path_has_a_name_too() -> None:
    assert name_of("a?/b#c.jsonl") == "b#c.jsonl"


def test_what_is_no_address() -> None:
    assert not any(map(is_address, ("in.jsonl", "https://a/b", "xs3://b/k", "s3:/b/k", "")))
