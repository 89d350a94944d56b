"""The file of callers: what is read, and what is refused with which words."""

from __future__ import annotations

import pytest
from support.credentials import key_entry

from camserve.server.callers import Role
from camserve.server.callers.api_keys import caller_of_key, new_key
from camserve.server.callers.caller_file import read_caller_file
from camserve.server.errors import CamserveError, Reason

HASH = "0" * 64


def test_keys_and_certificates_are_read():
    """Both kinds of entry, with their times."""
    _, key = key_entry("line-3", ["explain", "admin"], expires="2030-01-01T00:00:00Z")

    found = read_caller_file(f'{key}\n[[certificate]]\nidentity = "*"\nroles = ["explain"]\n'.encode())

    assert ["line-3"] == [entry.name for entry in found.key]
    assert {Role.EXPLAIN, Role.ADMIN} == found.key[0].roles
    assert 2030 == found.key[0].expires.year
    assert ["*"] == [entry.identity for entry in found.certificate]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[[key]", "not TOML: .*line 1"),
        ("\xff".encode("latin-1"), "not UTF-8"),
        ('[[key]]\nname = "a"\nroles = ["explain"]', r"key\[0\].sha256: Field required"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH}"\nroles = []', r"key\[0\].roles: .*at least 1"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH}"\nroles = ["root"]', r"key\[0\].roles.*'explain', 'admin' or 'audit'"),
        (f'[[key]]\nname = "ipv4:1.2.3.4"\nsha256 = "{HASH}"\nroles = ["admin"]', "begin like an address"),
        (f'[[key]]\nname = "a\\nb"\nsha256 = "{HASH}"\nroles = ["admin"]', "printable"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH}"\nroles = ["admin"]\nexpires = 2030-01-01T00:00:00', "timezone"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH}"\nroles = ["admin"]\nexpire = 2030-01-01', r"key\[0\].expire: Extra"),
        ('[[keys]]\nname = "a"', "keys: Extra"),
        (
            '[[certificate]]\nidentity = "*"\nroles = ["explain"]\nconcurrency = 1',
            r"certificate\[0\].*nobody's: give it a name",
        ),
    ],
)
def test_what_is_wrong_is_named(content, why):
    """With its place."""
    with pytest.raises(ValueError, match=why):
        read_caller_file(content if isinstance(content, bytes) else content.encode())


def test_a_key_in_the_place_of_its_hash_is_not_told():
    """The complaint goes to a log."""
    key = new_key()

    with pytest.raises(ValueError, match="sha256") as caught:
        read_caller_file(f'[[key]]\nname = "a"\nsha256 = "{key}"\nroles = ["explain"]'.encode())

    assert key not in str(caught.value)


def test_keys_are_told_apart_and_timed():
    """The right one within its time is its caller; the refusals say which of the rest it is, and never the key."""
    key, entry = key_entry("a", ["explain"], not_before="2020-01-01T00:00:00Z", expires="2030-01-01T00:00:00Z")
    entries = read_caller_file(entry.encode()).key
    start, end = entries[0].not_before.timestamp(), entries[0].expires.timestamp()

    assert ("a", "api-key") == (
        caller_of_key(key, entries, now=start).name,
        caller_of_key(key, entries, now=end - 1).how,
    )
    for sent, now, reason in (
        (key, start - 1, Reason.CREDENTIALS_NOT_YET_VALID),
        (key, end, Reason.CREDENTIALS_EXPIRED),
        (key[:-1], start, Reason.CREDENTIALS_INVALID),
        (entries[0].sha256, start, Reason.CREDENTIALS_INVALID),
        ("", start, Reason.CREDENTIALS_INVALID),
    ):
        with pytest.raises(CamserveError) as caught:
            caller_of_key(sent, entries, now=now)
        assert reason == caught.value.reason
        assert key not in caught.value.message


def test_keys_are_of_256_random_bits():
    """As many as it takes that a fast hash is enough; no two are alike."""
    keys = {new_key() for _ in range(100)}

    assert 100 == len(keys)
    assert {len("camserve_") + 43} == {len(key) for key in keys}
