"""What stays the same from image to image becomes a plan, and a plan and an input become an `ExplainRequest`.

Both clients take the same options, told once here; `RequestPlan` checks them before the first image is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from camserve.client import words
from camserve.client.boxes import Box
from camserve.client.inputs import PreparedInput, TensorInput, to_tensor
from camserve.client.specs import AnySpec, Spec, to_protos
from camserve.v1 import explanation_service_pb2


class SharedOptions(TypedDict, total=False):
    """Options that may hold for many images.

    Attributes:
        version: the model's version; left out means the newest that is ready.
        top_k: how many classes the prediction lists; left out means 5.
        labels: own strings, kept with the server's record of the request.
        lane: how urgent it is: "interactive", "standard" (the default) or "bulk".
        region_of_interest: the part of the source to look at.
        extra_inputs: further inputs by name, for models that take several.
        deadline: seconds the answer is worth having; the server stops working then, and says so.
        timeout: seconds for the call, retries included; None waits for ever; left out means the client's.
        skip_rules: whether to leave out the explanations that the rules of the model's card would add.
    """

    version: str
    top_k: int
    labels: Mapping[str, str]
    lane: str
    region_of_interest: Box
    extra_inputs: Mapping[str, TensorInput]
    deadline: float
    timeout: float | None
    skip_rules: bool


class RequestOptions(SharedOptions, total=False):
    """Options of one request.

    Attributes:
        request_id: id for logs and answers; left out lets the server make one.
    """

    request_id: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestPlan:
    """Everything about a request but its input.

    Attributes:
        template: the request without input and deadline.
        deadline_seconds: how long the answer is worth having, or None.
        timeout_seconds: how long the call may take, retries included, or None.
    """

    template: explanation_service_pb2.ExplainRequest
    deadline_seconds: float | None
    timeout_seconds: float | None

    @property
    def limit_seconds(self) -> float | None:
        """The shorter of deadline and timeout; None when neither is set."""
        limits = [limit for limit in (self.deadline_seconds, self.timeout_seconds) if limit is not None]
        return min(limits, default=None)

    def request(self, source: PreparedInput, elapsed_seconds: float) -> explanation_service_pb2.ExplainRequest:
        """Returns the message to send for one input, `elapsed_seconds` after the caller asked."""
        request = explanation_service_pb2.ExplainRequest()
        request.CopyFrom(self.template)
        source.put_into(request)
        if self.deadline_seconds is not None:
            # A retry must not be given more time than the caller gave the first attempt.
            left = max(self.deadline_seconds - elapsed_seconds, 0.001)
            request.deadline.FromNanoseconds(int(left * 1e9))
        return request


def plan(
    model: str,
    specs: Sequence[AnySpec] | str | Spec,
    default_timeout: float | None,
    **options: Unpack[RequestOptions],
) -> RequestPlan:
    """Checks what holds for all images of a call.

    Raises:
        ValueError: for a word that does not exist or a limit that is not positive.
        TypeError: for an option that does not exist.
    """
    unknown = set(options) - set(RequestOptions.__annotations__)
    if unknown:
        known = ", ".join(sorted(RequestOptions.__annotations__))
        raise TypeError(f"no option {', '.join(sorted(map(repr, unknown)))}; there are {known}")
    template = explanation_service_pb2.ExplainRequest(
        model=model,
        version=options.get("version"),
        request_id=options.get("request_id"),
        specs=to_protos(specs),
        top_k=options.get("top_k"),
        lane=words.LANES.name(options["lane"]) if options.get("lane") else None,
        labels=options.get("labels"),
        skip_rules=options.get("skip_rules", False),
    )
    if box := options.get("region_of_interest"):
        template.region_of_interest.CopyFrom(box.to_proto())
    for name, tensor in (options.get("extra_inputs") or {}).items():
        template.extra_inputs[name].CopyFrom(to_tensor(tensor))
    return RequestPlan(
        template=template,
        deadline_seconds=_positive("deadline", options.get("deadline")),
        timeout_seconds=_positive("timeout", options.get("timeout", default_timeout)),
    )


def _positive(name: str, value: Any) -> float | None:
    if value is not None and not value > 0:
        raise ValueError(f"{name} is {value}; it is a number of seconds above 0")
    return None if value is None else float(value)
