"""What is asked under load: kinds of request by weight over a set of inputs, serialised once so that sending costs little.

`kind` and `input_bytes` turn specs and inputs into bytes, `Mix.draws` joins them in an order that comes from a seed. Protobuf
reads two messages laid end to end as one, so a request is its kind's bytes followed by its input's.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Unpack

from camserve.client.inputs import AnyInput, prepare
from camserve.client.requests import SharedOptions, plan
from camserve.client.specs import AnySpec, Spec
from camserve.v1 import explanation_service_pb2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of request.

    Attributes:
        name: for tables, such as "grad-cam".
        weight: how often it is drawn, against the others.
        message: the serialised request without its input.
    """

    name: str
    weight: float
    message: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Draw:
    """A request to send.

    Attributes:
        kind: index of its kind.
        message: the whole of it, serialised.
    """

    kind: int
    message: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What is drawn from.

    Attributes:
        kinds: at least one.
        inputs: at least one, as `input_bytes` gives them; each kind may come with each.
    """

    kinds: tuple[Kind, ...]
    inputs: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if not self.kinds or not self.inputs:
            raise ValueError("a mix needs at least one kind of request and one input")

    def draws(self, seed: int) -> Iterator[Draw]:
        """Yields requests without end: kinds by their weights, inputs in turn in a shuffled order.

        Args:
            seed: the same seed gives the same requests.
        """
        chance = random.Random(seed)  # noqa: S311  # No secret.
        inputs = list(self.inputs)
        chance.shuffle(inputs)
        indices = range(len(self.kinds))
        weights = list(itertools.accumulate(kind.weight for kind in self.kinds))
        for source in itertools.cycle(inputs):
            (index,) = chance.choices(indices, cum_weights=weights)
            yield Draw(index, self.kinds[index].message + source)


def kind(
    model: str,
    specs: Sequence[AnySpec] | str | Spec,
    *,
    name: str = "",
    weight: float = 1.0,
    **options: Unpack[SharedOptions],
) -> Kind:
    """Returns a kind of request.

    Args:
        model: whom to ask.
        specs: what to ask of it; none asks for the prediction alone.
        name: for tables; left out means the methods' names.
        weight: how often it is drawn, against the other kinds of its mix.
        options: as for `AsyncClient.explain`; a `timeout` is given to `Connections` instead.

    Raises:
        ValueError: for a word that does not exist, a deadline or a weight that is not positive.
    """
    if not 0 < weight < float("inf"):
        raise ValueError(f"weight is {weight}; it is a number above 0")
    request_plan = plan(model, specs, None, **options)
    request = request_plan.template
    if request_plan.deadline_seconds is not None:
        request.deadline.FromNanoseconds(int(request_plan.deadline_seconds * 1e9))
    return Kind(name=name or _told(specs), weight=weight, message=request.SerializeToString())


def input_bytes(image: AnyInput) -> bytes:
    """Returns an input as the part of a request; raises InvalidInput when it cannot be read."""
    request = explanation_service_pb2.ExplainRequest()
    prepare(image).put_into(request)
    return request.SerializeToString()


def _told(specs: Sequence[AnySpec] | str | Spec) -> str:
    if isinstance(specs, str | Spec):
        specs = [specs]
    names = [spec if isinstance(spec, str) else getattr(spec, "method", "") for spec in specs]
    return ", ".join(map(str, names)) or "prediction"
