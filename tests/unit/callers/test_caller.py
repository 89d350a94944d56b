"""Callers of whom only the address is known."""

from __future__ import annotations

import pytest

from camserve.server.callers import Role, anonymous


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("ipv4:10.0.0.7:51234", "ipv4:10.0.0.7"),
        ("ipv6:%5B::1%5D:51234", "ipv6:%5B::1%5D"),
        ("unix:", "unix:"),
        ("unix:/run/camserve.sock", "unix:/run/camserve.sock"),
    ],
)
def test_connections_of_one_host_are_one_caller(peer, name):
    """The port is another for each connection, and no part of the name."""
    caller = anonymous(peer)

    assert (name, "anonymous", frozenset(Role)) == (caller.name, caller.how, caller.roles)
