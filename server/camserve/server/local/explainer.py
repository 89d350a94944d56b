"""A model in this process that answers as a server would: an image and specs arrive, the client's own results leave.

Each call writes the request that the client would send and reads the answers that a server would give, so that every word, limit,
default and message is the same; between the two stands `answers.py` in place of the network.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from camserve.client import CamserveError as ClientError
from camserve.client import Event, ModelCard, Result, Spec
from camserve.client.cards import card_from_proto
from camserve.client.errors import closed, from_status
from camserve.client.inputs import AnyInput, PreparedInput, prepare
from camserve.client.requests import RequestOptions, RequestPlan, plan
from camserve.client.results import collect, event_from_proto
from camserve.client.specs import AnySpec
from camserve.server import jobs
from camserve.server.app import resolve_device
from camserve.server.decode import DecodeLimits
from camserve.server.errors import CamserveError, InvalidRequest, NotFound, Reason
from camserve.server.loading import load_served, request_limits
from camserve.server.local.answers import answers
from camserve.server.local.source import source_of
from camserve.server.models.repository import ServedModel
from camserve.server.models.sources import ModelSource
from camserve.server.rules import apply_rules
from camserve.server.settings import Settings
from camserve.server.validate import check_job, check_size
from camserve.server.wire.answers import card_message, response, status_of
from camserve.server.wire.requests import job_from_request, request_id_of

__all__ = ["LocalExplainer"]


class LocalExplainer:
    """One loaded model, explained in the caller's thread.

    A map has the same bytes and the same `raw_sha256` as one from a server with the same settings, versions and device, when the
    pass has as many rows: `batch_rows=served.summary.batch_rows`. Not for several threads at once.

    Attributes:
        card: what is known about the model, as a server would tell it.

    Args:
        source: the model; see `models.sources`.
        settings: device and limits, as a server reads them; None takes the environment's and the defaults.

    Raises:
        ValueError: the model cannot be loaded; the text says why.
    """

    def __init__(self, source: ModelSource, settings: Settings | None = None) -> None:
        self._settings = Settings() if settings is None else settings
        self._limits = request_limits(self._settings)
        self._decode_limits = DecodeLimits(
            max_pixels=self._settings.max_image_pixels, max_bytes=self._settings.max_request_bytes
        )
        with _in_client_terms():
            device = resolve_device(self._settings.device)
            # Paced as a server would, although nobody else waits: other chunks would give an amplified map other last bits.
            self._model: ServedModel | None = load_served(source, self._settings, device)
        self.card: ModelCard = card_from_proto(card_message(self._model.card))

    @classmethod
    def load(
        cls,
        model: str | Path = "",
        *,
        labels: Sequence[str] | Path | None = None,
        size: int | tuple[int, int] | None = None,
        random_seed: int | None = None,
        device: str | None = None,
        settings: Settings | None = None,
    ) -> Self:
        """Loads a model by what `camserve serve --model` takes.

        Args:
            model: an archive (`part.pt`, `part.pt2`), `torchvision:resnet18`, `timm:convnext_tiny`, also with `name=` before
                it, or a folder with a `model.toml` as in a model repository; empty takes the shipped demo model.
            labels: of the classes in order, or a text file with one a line.
            size: height and width of the input in pixels; a number for both; 224 unless told.
            random_seed: for factories: random weights instead of pretrained ones.
            device: such as "cpu" or "cuda:0"; None takes the settings'.
            settings: as for the class.

        Raises:
            ValueError: no such model, or it cannot be loaded.
            camserve.client.CamserveError: nothing in it can be explained.
        """
        settings = Settings() if settings is None else settings
        if device is not None:
            # Built anew rather than copied: a copy would not be checked.
            settings = Settings(**{**settings.model_dump(), "device": device})
        return cls(source_of(str(model), labels=labels, size=size, random_seed=random_seed), settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the model and its memory. May be called twice."""
        self._model = None

    def explain(
        self,
        image: AnyInput,
        specs: Sequence[AnySpec] | str | Spec = (),
        *,
        batch_rows: int = 1,
        **options: Unpack[RequestOptions],
    ) -> Result:
        """Classifies one image and explains it; the same as `Client.explain`.

        Args:
            image: a path, the bytes of an image file, a PIL image, an array or a TensorInput.
            specs: the explanations to make, as `Spec`s or method names; none asks for the prediction only.
            batch_rows: rows of the pass, all but one of them copies; a served result's `summary.batch_rows` gives its bits.
            **options: see `camserve.client.requests.RequestOptions`; `lane` orders nothing here.

        Returns:
            The client's result; specs that could not be explained are in `errors`.

        Raises:
            camserve.client.CamserveError: when the request as a whole failed, of the class that a client would raise.
            ValueError: for a word that does not exist.
        """
        source = prepare(image)
        return collect(self._events(source, self._plan(specs, options), batch_rows), source)

    def stream(
        self,
        image: AnyInput,
        specs: Sequence[AnySpec] | str | Spec = (),
        *,
        batch_rows: int = 1,
        **options: Unpack[RequestOptions],
    ) -> Generator[Event]:
        """Explains one image and yields each event as it is made: work goes on only when the next one is asked for."""
        return self._events(prepare(image), self._plan(specs, options), batch_rows)

    def explain_many(
        self,
        images: Iterable[AnyInput],
        specs: Sequence[AnySpec] | str | Spec = (),
        **options: Unpack[RequestOptions],
    ) -> Iterator[Result]:
        """Explains images one after another, each when it is asked for; the first failure ends it."""
        request_plan = self._plan(specs, options)
        for image in images:
            source = prepare(image)
            yield collect(self._events(source, request_plan, 1), source)

    def _plan(self, specs: Sequence[AnySpec] | str | Spec, options: RequestOptions) -> RequestPlan:
        return plan(self.card.name, specs, None, **options)

    def _events(self, source: PreparedInput, request_plan: RequestPlan, batch_rows: int) -> Generator[Event]:
        if self._model is None:
            raise closed()
        model = self._model
        with _in_client_terms():
            for event in self._answers(source, request_plan, model, batch_rows):
                told = event_from_proto(response(event, model.card), source)
                if told is not None:
                    yield told

    def _answers(
        self, source: PreparedInput, request_plan: RequestPlan, model: ServedModel, batch_rows: int
    ) -> Iterator[jobs.Event]:
        received_at = time.monotonic()
        most = model.card.max_batch_rows
        if not 1 <= batch_rows <= most:
            raise InvalidRequest(
                Reason.FIELD_INVALID,
                f"batch_rows must be from 1 to {most} for model {model.card.name!r}, is {batch_rows}",
            )
        request = request_plan.request(source, 0.0)
        if request.version not in ("", model.card.version):
            raise NotFound(
                Reason.VERSION_NOT_FOUND,
                f"version {request.version!r} is not loaded; it is {model.card.version!r}",
                field="version",
                metadata={"model": model.card.name, "version": request.version},
            )
        check_size(len(request.specs), self._limits)
        limit = request_plan.timeout_seconds
        job = job_from_request(
            request,
            model.card,
            request_id=request_id_of(request),
            received_at=received_at,
            deadline=None if limit is None else received_at + limit,
            caller="local",
        )
        check_job(job, model.card, self._limits)
        if not request.skip_rules:
            job = apply_rules(job, model.card)
        yield from answers(job, model, self._decode_limits, batch_rows=batch_rows)


@contextlib.contextmanager
def _in_client_terms() -> Iterator[None]:
    """Errors leave as the client would raise them."""
    try:
        yield
    except CamserveError as error:
        raise _client_error(error) from error


def _client_error(error: CamserveError) -> ClientError:
    return from_status(status_of(error))
