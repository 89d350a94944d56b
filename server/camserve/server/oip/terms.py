"""What a ModelInferRequest says besides its inputs and outputs: its id, its urgency, its time, and parameters of heatmaps.

Read before the model is looked up, on the event loop; `requests.py` reads the rest.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from typing import Any, Final

from camserve.server import jobs
from camserve.server.errors import InvalidRequest, Reason, Unsupported
from camserve.server.oip.options import OPTIONS
from camserve.server.oip.parameters import Value, switch, unknown, values, whole
from camserve.server.wire.requests import LONGEST_REQUEST_ID

__all__ = ["HEATMAP", "Terms", "read_terms"]

HEATMAP: Final = "heatmap"
_DEFAULTS: Final = "explain."
_TRITONS: Final = ("triton_enable_empty_final_response", "triton_final_response")
# No model takes or gives as many, and the limit on specs is lower.
_MOST_TENSORS: Final = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a request says besides its inputs and outputs.

    Attributes:
        request_id: the caller's, or ours.
        lane: how urgent it is.
        timeout_seconds: how long the answer is worth having, or None.
        wants_empty_final: whether a stream's request is to be ended by an answer without outputs.
        defaults: parameters of every heatmap.
        of_outputs: parameters of single heatmaps, by the output's name.
    """

    request_id: str
    lane: jobs.Lane = jobs.Lane.STANDARD
    timeout_seconds: float | None = None
    wants_empty_final: bool = False
    defaults: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    of_outputs: Mapping[str, Mapping[str, Value]] = dataclasses.field(default_factory=dict)


def read_terms(request: Any) -> Terms:
    """What a request says besides its inputs and outputs; quick, whatever its size.

    Raises:
        InvalidRequest: the id or a parameter is wrong, or one is unknown that would have changed the answer; or there are more
            inputs or outputs than could be meant, which nobody should go through.
    """
    for field, count in (("inputs", len(request.inputs)), ("outputs", len(request.outputs))):
        if count > _MOST_TENSORS:
            raise InvalidRequest(Reason.FIELD_INVALID, f"{field} holds {count}, more than {_MOST_TENSORS}", field=field)
    given = values(request.parameters, "parameters")
    outputs = {output.name for output in request.outputs}
    defaults: dict[str, Value] = {}
    of_outputs: dict[str, dict[str, Value]] = {}
    for name, value in given.items():
        field = f"parameters[{name}]"
        of_output, _, option = name.rpartition(".")
        if name.startswith(_DEFAULTS):
            option = name.removeprefix(_DEFAULTS)
            if option not in OPTIONS:
                raise unknown("parameter", name, [_DEFAULTS + known for known in OPTIONS], field)
            defaults[option] = value
        elif of_output in outputs and of_output.startswith(HEATMAP):
            of_outputs.setdefault(of_output, {})[option] = value
        else:
            _check_other(name, value, field)
    return Terms(
        request_id=_request_id(request.id),
        lane=_lane(given),
        timeout_seconds=_timeout_seconds(given),
        wants_empty_final=switch(given.get(_TRITONS[0], False), f"parameters[{_TRITONS[0]}]"),
        defaults=defaults,
        of_outputs=of_outputs,
    )


def _check_other(name: str, value: Value, field: str) -> None:
    """Refuses what would go unheard though it was meant; what is anybody's own is let pass."""
    if name.startswith("triton_") and name not in _TRITONS:
        raise unknown("parameter", name, _TRITONS, field)
    if name in OPTIONS:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"{field} belongs to a heatmap: give it to the output, or to all of them as {_DEFAULTS + name!r}",
            field=field,
        )
    if name.startswith(HEATMAP):
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"{field} is for an output that is not asked for; write it as the output's name, a point and the parameter, "
            f"such as '{HEATMAP}:0.layer', and ask for that output",
            field=field,
        )
    if name == "sequence_id" and value not in (0, "", "0"):
        raise Unsupported(
            Reason.FEATURE_NOT_IMPLEMENTED,
            f"{field} is set, but no request here depends on others: leave it out",
            field=field,
        )


def _request_id(given: str) -> str:
    if not given:
        return uuid.uuid4().hex
    if len(given) > LONGEST_REQUEST_ID or not (given.isascii() and given.isprintable()):
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"id must be at most {LONGEST_REQUEST_ID} printable ASCII characters, has {len(given)}",
            field="id",
        )
    return given


def _lane(given: Mapping[str, Value]) -> jobs.Lane:
    """Triton's priorities: 1 is the most urgent, and 0 says nothing."""
    priority = whole(given.get("priority", 0), "parameters[priority]")
    if priority < 0:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"parameters[priority] must be 0 or more, is {priority}: 1 interactive, 2 standard, 3 and above bulk",
            field="parameters[priority]",
        )
    return {0: jobs.Lane.STANDARD, 1: jobs.Lane.INTERACTIVE, 2: jobs.Lane.STANDARD}.get(priority, jobs.Lane.BULK)


def _timeout_seconds(given: Mapping[str, Value]) -> float | None:
    """Microseconds; 0 means none."""
    timeout = whole(given.get("timeout", 0), "parameters[timeout]")
    if timeout < 0:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"parameters[timeout] must be 0 or more microseconds, is {timeout}",
            field="parameters[timeout]",
        )
    return timeout / 1e6 if timeout else None
