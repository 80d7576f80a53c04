"""What an engine's asynchronous side and its worker say to each other, and how that is written on a line of JSON.

Commands go to the worker, events come back; both refer to a request by a number that the sender chose. A worker in
the same process is handed these objects, one in another process their lines: no pickle, so nothing on the socket runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from tunesmith.engine.base import EngineOutput, GenerateRequest, PromptScored, SampledToken, SamplingParams, TokenScore

FailureKind = Literal["unknown handle", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Load:
    """Answered by `Loaded`."""

    number: int
    handle: str
    base_dir: str
    adapter_dir: str | None


@dataclass(frozen=True, slots=True)
class Unload:
    """Not answered."""

    handle: str


@dataclass(frozen=True, slots=True)
class Generate:
    """Answered by `Produced` events; `Ended` follows unless the last token says so itself."""

    number: int
    request: GenerateRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    """Not answered; events under way may still arrive."""

    number: int


Command = Load | Unload | Generate | Cancel


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model is ready, or `error` says why not."""

    number: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Produced:
    """The next output of a request."""

    number: int
    output: EngineOutput


@dataclass(frozen=True, slots=True)
class Ended:
    """A request ended without a last token: nothing was to be generated, or it failed."""

    number: int
    failure: FailureKind | None = None
    reason: str = ""


Event = Loaded | Produced | Ended


def command_to_line(command: Command) -> bytes:
    """One line, its newline included."""
    match command:
        case Load(number, handle, base_dir, adapter_dir):
            return _line(["load", number, handle, base_dir, adapter_dir])
        case Unload(handle):
            return _line(["unload", handle])
        case Generate(number, request):
            return _line(["generate", number, _shallow(request) | {"sampling": _shallow(request.sampling)}])
        case Cancel(number):
            return _line(["cancel", number])


def command_from_line(line: bytes) -> Command:
    """The inverse of `command_to_line`."""
    match json.loads(line):
        case ["load", number, handle, base_dir, adapter_dir]:
            return Load(number, handle, base_dir, adapter_dir)
        case ["unload", handle]:
            return Unload(handle)
        case ["generate", number, sent]:
            return Generate(number, _request(sent))
        case ["cancel", number]:
            return Cancel(number)
        case other:
            raise ValueError(f"not a command: {other!r}")


def events_to_line(events: Sequence[Event]) -> bytes:
    """All events of a message of the engine on one line."""
    return _line([_event_to_list(event) for event in events])


def events_from_line(line: bytes) -> list[Event]:
    """The inverse of `events_to_line`."""
    return [_event_from_list(item) for item in json.loads(line)]


def _line(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _shallow(value: GenerateRequest | SamplingParams) -> dict[str, Any]:
    """The fields as they are: `asdict` copies every token of a prompt."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _request(sent: dict[str, Any]) -> GenerateRequest:
    sampling = sent["sampling"]
    bias = {int(token_id): value for token_id, value in sampling["logit_bias"].items()}  # JSON has string keys only
    stops = tuple(sampling["stop_token_ids"])
    params = SamplingParams(**sampling | {"logit_bias": bias, "stop_token_ids": stops})
    return GenerateRequest(**sent | {"prompt_ids": tuple(sent["prompt_ids"]), "sampling": params})


def _event_to_list(event: Event) -> list[Any]:
    match event:
        case Loaded(number, error):
            return ["loaded", number, error]
        case Produced(number, output):
            if isinstance(output, SampledToken):
                return ["token", number, *_score_to_list(output.score), output.finish]
            return ["scored", number, [_score_to_list(score) for score in output.scores]]
        case Ended(number, failure, reason):
            return ["ended", number, failure, reason]


def _event_from_list(item: list[Any]) -> Event:
    match item:
        case ["loaded", number, error]:
            return Loaded(number, error)
        case ["token", number, token_id, logprob, top, finish]:
            return Produced(number, SampledToken(_score_from_list([token_id, logprob, top]), finish))
        case ["scored", number, scores]:
            return Produced(number, PromptScored(tuple(map(_score_from_list, scores))))
        case ["ended", number, failure, reason]:
            return Ended(number, failure, reason)
        case _:
            raise ValueError(f"not an event: {item!r}")


def _score_to_list(score: TokenScore) -> list[Any]:
    return [score.token_id, score.logprob, score.top]


def _score_from_list(item: list[Any]) -> TokenScore:
    token_id, logprob, top = item
    return TokenScore(token_id, logprob, tuple((i, value) for i, value in top))
