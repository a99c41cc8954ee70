"""What can go wrong, whose fault it is, and how it is said on the wire and over HTTP.

Every error carries a wire `code`, an HTTP status and whether another worker may succeed where this one failed. The message says
whose fault it is and what to do about it.
"""

from __future__ import annotations

from typing import ClassVar

from protocol.messages import Failed


class EpdError(Exception):
    """Base of all errors that epd raises on purpose."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def to_wire(self) -> Failed:
        return Failed(code=self.code, message=self.message, retryable=self.retryable)


class InternalError(EpdError):
    """A mistake of ours."""


# --- the client's ---------------------------------------------------------------------------------------------------


class BadRequest(EpdError):
    """The client's request cannot be served as written; `param` names the field at fault."""

    code = "bad_request"
    http_status = 400

    def __init__(self, message: str, *, param: str = "") -> None:
        super().__init__(message)
        self.param = param


class Unsupported(BadRequest):
    code = "unsupported"


class PromptTooLong(BadRequest):
    code = "context_length_exceeded"


class BadImage(BadRequest):
    code = "bad_image"


class GuideTooComplex(BadRequest):
    """What an output is to look like takes more to follow than is given to one request."""

    code = "guide_too_complex"


class BodyTooLarge(EpdError):
    code = "body_too_large"
    http_status = 413


class UnknownModel(EpdError):
    code = "model_not_found"
    http_status = 404


class Cancelled(EpdError):
    """Whoever asked went away."""

    code = "cancelled"
    http_status = 499


# --- the operator's -------------------------------------------------------------------------------------------------


class BadConfig(EpdError):
    """The command line, a checkpoint or the environment is wrong; nothing was started."""

    code = "bad_config"


class BadCheckpoint(BadConfig):
    code = "bad_checkpoint"


class Refused(EpdError):
    """A peer did not prove itself (token, version, model, layout)."""

    code = "refused"
    http_status = 502


# --- passing --------------------------------------------------------------------------------------------------------


class Overloaded(EpdError):
    code = "overloaded"
    http_status = 429
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0, limit: str = "") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.limit = limit  # the setting that was reached


class Unavailable(EpdError):
    """No worker can take this now."""

    code = "unavailable"
    http_status = 503
    retryable = True


class DeadlineExceeded(EpdError):
    code = "deadline_exceeded"
    http_status = 504


class PeerLost(EpdError):
    """The link to a worker broke or never came up."""

    code = "peer_lost"
    http_status = 502
    retryable = True


class StaleHandle(EpdError):
    """A KV or embedding handle was refused: wrong generation, expired lease, wrong epoch or layout."""

    code = "stale_handle"
    http_status = 502
    retryable = True


class CorruptTransfer(EpdError):
    """Bytes arrived that do not have the checksum their sender computed."""

    code = "corrupt_transfer"
    http_status = 502
    retryable = True


def _all_subclasses(cls: type[EpdError]) -> list[type[EpdError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _all_subclasses(sub))]


_BY_CODE: dict[str, type[EpdError]] = {cls.code: cls for cls in reversed(_all_subclasses(EpdError)[1:])}


class RemoteError(EpdError):
    """A code that this version does not know."""


class RetryableRemoteError(RemoteError):
    """The same, of which the other end says that another worker may succeed."""

    retryable = True


def from_wire(failed: Failed) -> EpdError:
    """The exception that a `Failed` message stands for."""
    unknown = RetryableRemoteError if failed.retryable else RemoteError
    return _BY_CODE.get(failed.code, unknown)(failed.message)
