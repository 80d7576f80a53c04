"""The error tree: what went wrong, for whom, which field. Status codes are chosen in `api/errors.py`, nowhere else.

TunesmithError
├── InvalidRequest          a field breaks a rule
│   └── UnsupportedMedia    the body is of a kind that is not read here
├── AuthenticationFailed    no key, or one that is not ours
├── PermissionDenied        the key is ours, its role does not allow this
├── NotFound                no such object, or another organisation's
├── RateLimited             come back in `retry_after_s`
├── StorageFull             nothing was kept, the disk has no room
├── EngineUnavailable       the engine is starting or has died; asking again can help
└── LeaseLost               another dispatcher holds the job (never reaches a client)
"""

from __future__ import annotations


class TunesmithError(Exception):
    """Root of everything raised on purpose. `message` is for the reader of the answer, whole and in plain words."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequest(TunesmithError):
    """A request breaks a rule; the message names the field, the rule, the value given and the way out."""


class UnsupportedMedia(InvalidRequest):
    """The body is not of the content type this endpoint reads."""


class AuthenticationFailed(TunesmithError):
    """No API key, or one that no organisation has."""


class PermissionDenied(TunesmithError):
    """The caller is known and may not do this."""


class NotFound(TunesmithError):
    """The object does not exist for this caller."""


class RateLimited(TunesmithError):
    """The server is at a bound; the same request can succeed after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: int, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class StorageFull(TunesmithError):
    """There was no room for the bytes; whatever had been written of them is gone again."""


class EngineUnavailable(TunesmithError):
    """The engine is starting or has died and is being started again."""


class LeaseLost(TunesmithError):
    """Another dispatcher holds the job: nothing was written."""
