"""What `camserve explain --local` asks in place of a server: the few methods of `Client` that the command calls.

Found by the light client through the entry-point group `camserve.local`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from camserve.client import CamserveError, ModelCard, ModelStatus, NotFound, Result
from camserve.client.inputs import AnyInput
from camserve.client.requests import SharedOptions
from camserve.client.specs import AnySpec
from camserve.server.local.explainer import LocalExplainer

__all__ = ["LocalClient"]

_DEMO = "demo"


class LocalClient:
    """One model of this process, asked as a server is.

    Args:
        model: as for `LocalExplainer.load`; "demo" is the shipped one.
        size: height and width of the input, pixels.
        labels: text file, one a line.
        timeout: seconds for each image.

    Raises:
        ValueError: the model cannot be loaded.
        CamserveError: nothing in it can be explained.
    """

    def __init__(self, model: str, *, size: int | None, labels: Path | None, timeout: float) -> None:
        self._explainer = LocalExplainer.load("" if model == _DEMO else model, size=size, labels=labels)
        self._timeout = timeout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._explainer.close()

    def models(self) -> tuple[ModelStatus, ...]:
        """The one model there is."""
        card = self._explainer.card
        return (
            ModelStatus(
                name=card.name,
                version=card.version,
                state="ready",
                error="",
                class_count=card.class_count,
                default_layer=card.default_layer,
            ),
        )

    def model(self, name: str, version: str | None = None) -> ModelCard:
        """Its card; raises NotFound for another name or version."""
        card = self._explainer.card
        if name != card.name or version not in (None, "", card.version):
            asked = f"{name!r}, version {version!r}" if version else repr(name)
            raise NotFound(
                "NOT_FOUND", "MODEL_NOT_FOUND", f"{asked} is not loaded; it is {card.name!r}, {card.version!r}"
            )
        return card

    def explain_many(
        self,
        images: Iterable[AnyInput],
        *,
        model: str,
        specs: Sequence[AnySpec],
        concurrency: int = 1,  # noqa: ARG002 - one device, one thread: as many requests at a time would be no faster
        on_error: str = "raise",
        **options: Unpack[SharedOptions],
    ) -> Generator[Result | CamserveError]:
        """Explains images one after another; `on_error="return"` yields a failure in its image's place and goes on."""
        self.model(model, options.get("version"))
        options.setdefault("timeout", self._timeout)
        for image in images:
            try:
                yield self._explainer.explain(image, specs, **options)
            except CamserveError as error:
                if on_error == "raise":
                    raise
                yield error
