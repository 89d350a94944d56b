"""Reasons are a promise: the contract's list is ours, and each comes with the status its comment tells."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from google.rpc import code_pb2, error_details_pb2

from camserve.server import errors
from camserve.server.errors import CamserveError, Reason
from camserve.server.wire.answers import status_of
from camserve.v1 import errors_pb2

ROOT = Path(__file__).resolve().parents[2]
PROTO = (ROOT / "protos/camserve/v1/errors.proto").read_text(encoding="utf-8")
# Comment lines directly above a value; the last word of the last line is the status.
DOCUMENTED = {name: status for status, name in re.findall(r"([A-Z_]+)\.\n  ERROR_REASON_(\w+) = \d+;", PROTO)}
CLASSES = {kind.__name__ for kind in (CamserveError, *CamserveError.__subclasses__())}


def raised() -> set[tuple[str, str]]:
    """Every (class, reason) that the server's source constructs."""
    found = set()
    for path in sorted((ROOT / "server/camserve/server").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES and node.args:
                reason = node.args[0]
                if isinstance(reason, ast.Attribute) and ast.unparse(reason.value) == "Reason":
                    found.add((node.func.id, reason.attr))
    return found


RAISED = sorted(raised())


def test_our_reasons_are_the_contracts():
    """Nothing is sent that the contract does not list, and nothing listed is unknown to us."""
    listed = {name.removeprefix("ERROR_REASON_") for name, _ in errors_pb2.ErrorReason.items()} - {"UNSPECIFIED"}

    assert listed == set(Reason)
    assert set(Reason) == {reason.name for reason in Reason}


def test_every_reason_tells_its_status():
    """The comment's last word is a gRPC status."""
    assert set(Reason) == DOCUMENTED.keys()
    assert set(DOCUMENTED.values()) <= set(code_pb2.Code.keys())


def test_every_reason_is_raised_somewhere():
    """A reason that nothing gives is a promise without meaning."""
    assert set(Reason) == {reason for _, reason in RAISED}


@pytest.mark.parametrize(("kind", "reason"), RAISED)
def test_a_reason_comes_with_its_documented_status(kind, reason):
    """Whichever class a room raises it with."""
    status = status_of(getattr(errors, kind)(Reason(reason), "why"))

    assert DOCUMENTED[reason] == code_pb2.Code.Name(status.code)


@pytest.mark.parametrize(("kind", "reason"), RAISED)
def test_every_status_has_exactly_one_error_info(kind, reason):
    """With our domain; field violations only where the request is at fault, a time to retry only where one was given."""
    error = getattr(errors, kind)(Reason(reason), "why", field="a.field", metadata={"oneThing": 1})

    status = status_of(error)

    infos = [detail for detail in status.details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    assert 1 == len(infos)
    info = error_details_pb2.ErrorInfo.FromString(infos[0].value)
    assert (reason, "camserve", "1") == (info.reason, info.domain, info.metadata["oneThing"])
    kinds = {detail.TypeName().removeprefix("google.rpc.") for detail in status.details}
    assert (DOCUMENTED[reason] == "INVALID_ARGUMENT") == ("BadRequest" in kinds)
    assert (DOCUMENTED[reason] == "NOT_FOUND") == ("ResourceInfo" in kinds)
    assert "RetryInfo" not in kinds
