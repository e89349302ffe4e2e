"""The errors of this project. Foreign errors are mapped to these at the edge where they arise.

BatonError
├── SettingError            a bad setting: one line naming it, exit status 2
├── StartError              a worker cannot start or join: one line saying why, exit status 1
├── MessageError            bytes that are not the message they should be
├── QueueError              Redis is away or refuses
├── EngineError             the engine hangs, or fails whatever it is given: the worker ends, exit status 1
├── TransferError           pages did not arrive: peer gone, deadline, checksum
└── RequestError            the client's request cannot be served; carries the HTTP status
    ├── BadRequest          400: says what to change
    ├── NotFound            404: unknown model or path
    ├── TooLarge            413: the body is beyond the limit
    ├── Overloaded          429: come back after `retry_after_s`
    └── Unavailable         503: no live worker of a role, or Redis is away; come back after `retry_after_s`
"""

from __future__ import annotations


class BatonError(Exception):
    """Base of everything this project raises on purpose."""


class SettingError(BatonError):
    """A setting has a value that cannot be used."""


class StartError(BatonError):
    """The process cannot start or cannot join its fleet."""


class MessageError(BatonError):
    """Received bytes do not decode to the expected message."""


class QueueError(BatonError):
    """The job queue cannot be reached or refuses the operation."""


class EngineError(BatonError):
    """The engine can compute no more."""


class TransferError(BatonError):
    """A transfer of pages failed."""


class RequestError(BatonError):
    """A request that gets an HTTP error. `param` names the offending field, `code` is OpenAI's error code."""

    status = 400
    type = "invalid_request_error"
    retry_after_s: float | None = None
    """When to come back, if that is known."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class BadRequest(RequestError):
    status = 400


class NotFound(RequestError):
    status = 404


class TooLarge(RequestError):
    status = 413


class Overloaded(RequestError):
    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, code="overloaded")
        self.retry_after_s = retry_after_s


class Unavailable(RequestError):
    status = 503
    type = "service_unavailable_error"

    def __init__(self, message: str, *, code: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s
