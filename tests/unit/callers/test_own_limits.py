"""Limits that the file of callers tells of single ones."""

from __future__ import annotations

import pytest

from camserve.server.callers import CallerLimits
from camserve.server.callers.caller_file import CallerFile, read_caller_file
from camserve.server.callers.own_limits import OwnLimits, limits_by_name

DEFAULT = CallerLimits(requests_per_second=10, burst=20, concurrency=30)


def file_of(*entries: str) -> CallerFile:
    """A file with these entries, each with what it says of limits."""
    parts = []
    for number, entry in enumerate(entries):
        table, name, *limits = entry.split("; ")
        credential = f'sha256 = "{number:064x}"' if table == "key" else f'identity = "spiffe://line/{number}"'
        named = [f'name = "{name}"'] if name else []
        parts.append("\n".join([f"[[{table}]]", *named, credential, 'roles = ["explain"]', *limits]))
    return read_caller_file("\n".join(parts).encode())


def test_what_is_left_out_is_as_for_everybody():
    """Each of the three by itself; 0 is no limit."""
    file = file_of("key; one; concurrency = 1", "certificate; two; requests_per_second = 0", "key; three")

    assert {
        "one": CallerLimits(requests_per_second=10, burst=20, concurrency=1),
        "two": CallerLimits(requests_per_second=0, burst=20, concurrency=30),
    } == limits_by_name(file, DEFAULT)


def test_a_certificate_without_a_name_is_called_by_its_identity():
    """As the caller is."""
    file = file_of("certificate; ; burst = 5")

    assert 5 == limits_by_name(file, DEFAULT)["spiffe://line/0"].burst


def test_two_keys_of_a_caller_are_one_caller():
    """The first entry that says something counts: a new key may be handed out without saying it again."""
    file = file_of("key; one", "key; one; concurrency = 3", "key; one; concurrency = 4")

    assert 3 == limits_by_name(file, DEFAULT)["one"].concurrency


def test_a_file_that_changed_counts_at_once():
    """And who is not in it has what everybody has."""
    files = [file_of("key; one; concurrency = 3")]
    limits = OwnLimits(DEFAULT, lambda: files[0])
    assert (3, 30) == (limits("one").concurrency, limits("two").concurrency)
    files[0] = file_of("key; two; concurrency = 5")

    assert (30, 5) == (limits("one").concurrency, limits("two").concurrency)


@pytest.mark.parametrize("limit", ["requests_per_second = -1", "burst = 0.5", "concurrency = -1", 'burst = "many"'])
def test_a_limit_that_is_none_is_told_by_its_place(limit):
    """With the entry and the name."""
    with pytest.raises(ValueError, match=rf"key\[1\]\.{limit.partition(' ')[0]}"):
        file_of("key; one", f"key; two; {limit}")
