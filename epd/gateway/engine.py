"""What the HTTP layer asks of whatever generates: the seam between the endpoint and the journey.

The endpoint hands over a checked, tokenized request and gets pieces of text back; it knows no worker, no stage, no message.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from epd.request import Delta, GenerateRequest


class Engine(Protocol):
    """Generates text for requests. One per gateway."""

    @property
    def model_name(self) -> str:
        """The name that clients ask for."""

    @property
    def max_choices(self) -> int:
        """Most choices that run at once, over all requests."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """The pieces of all `request.n` choices, as they come; each choice ends with one delta that has a `finish_reason`.

        Closing the generator aborts what is left. With a seed given, choice i draws with a seed of its own that depends on
        (seed, i) only.

        Raises:
            EpdError: the request cannot be served or failed; nothing more comes.
        """

    def ready(self) -> tuple[bool, str]:
        """Whether every stage that a request needs is there, and what is missing if not."""

    def cluster(self) -> dict[str, object]:
        """Workers, their load and the links between them, as plain JSON values."""

    def live(self, *, after_moment: int, after_revision: int) -> dict[str, object]:
        """cluster() with the last minutes: moments, requests and events that came after those that the viewer has seen."""

    def metrics(self) -> bytes:
        """Prometheus text of the whole cluster. May be called on any thread."""
