"""`/v1/completions` and `/v1/engines/{id}/completions`: wire body -> `CompletionRequest` -> choices.

Unknown fields, and the one known field that is not honoured here (`suffix`), end as a 400 that names them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tunesmith.api.body import Fields, read_json
from tunesmith.api.connection import while_connected
from tunesmith.api.routing import path_id
from tunesmith.api.sse import DONE, EventStream, frame
from tunesmith.core.accounts import Caller
from tunesmith.core.models import Models
from tunesmith.core.store import Clock, NewId
from tunesmith.errors import InvalidRequest
from tunesmith.serving.completer import (
    Choice,
    ChoiceDelta,
    Completer,
    CompletionRequest,
    CompletionStream,
    Logprobs,
    Usage,
)
from tunesmith.serving.request import Prompt

MAX_SEQUENCES = 2048
"""Most sequences one request may generate: prompts times `best_of`."""
MAX_TOKENS = 262_144
"""Most tokens all sequences of one request may come to. Their log-probabilities are held until the answer is whole."""
MAX_BIASES = 1024
"""Most tokens with a `logit_bias`; each costs at every step of every sequence."""
SEED_BITS = 63


@dataclass(frozen=True, slots=True)
class Asked:
    """A parsed body: what to generate, and how to answer."""

    completion: CompletionRequest
    stream: bool
    include_usage: bool


class CompletionsApi:
    """The verb of completions, under both of its URLs."""

    def __init__(
        self, completer: Completer, models: Models, *, clock: Clock, new_id: NewId, heartbeat_s: float
    ) -> None:
        self.completer = completer
        self.models = models
        self.clock = clock
        self.new_id = new_id
        self.heartbeat_s = heartbeat_s

    async def create(self, request: Request, caller: Caller) -> Response:
        """POST /v1/completions. A client that hangs up ends the generation, streamed or not."""
        return await self._create(request, caller, engine=None)

    async def create_for_engine(self, request: Request, caller: Caller) -> Response:
        """POST /v1/engines/{id}/completions: the same, the model named by the path."""
        return await self._create(request, caller, engine=path_id(request))

    async def _create(self, request: Request, caller: Caller, engine: str | None) -> Response:
        fields = await read_json(request)
        name = _model_name(fields, engine)
        asked = await run_in_threadpool(self._parse, fields, caller, name)
        head = {
            "id": self.new_id("cmpl-"),
            "object": "text_completion",
            "created": int(self.clock()),
            "model": name,
        }
        if not asked.stream:
            done = await while_connected(request.receive, self.completer.complete(asked.completion))
            choices = [_choice_to_wire(choice) for choice in done.choices]
            return JSONResponse({**head, "choices": choices, "usage": _usage_to_wire(done.usage)})
        # Up to the first token an error is still an answer of its own, with its own status.
        first, rest = await while_connected(request.receive, _begin(self.completer, asked.completion))
        return EventStream(_frames(first, rest, head, asked.include_usage), heartbeat_s=self.heartbeat_s)

    def _parse(self, fields: Fields, caller: Caller, name: str) -> Asked:
        stream = fields.flag("stream") or False
        options = fields.nested("stream_options")
        include_usage = options.flag("include_usage") or False
        options.done()
        if options.names and not stream:
            raise InvalidRequest(
                "'stream_options' is for streams: set stream to true, or leave it out.", param="stream_options"
            )
        if fields.text("suffix"):
            raise InvalidRequest(
                "'suffix' (inserting text between a prompt and its end) is not available for these models. Leave it "
                "out and let the prompt end where the text is to go on.",
                param="suffix",
            )
        fields.text("user")  # tells for whom the caller asks; nothing depends on it
        values: dict[str, Any] = {
            "prompts": _prompts(fields.take("prompt")),
            "max_tokens": fields.integer("max_tokens"),
            "temperature": fields.number("temperature"),
            "top_p": fields.number("top_p"),
            "n": fields.integer("n"),
            "best_of": fields.integer("best_of"),
            "echo": fields.flag("echo"),
            "stop": _stops(fields),
            "logprobs": fields.integer("logprobs"),
            "presence_penalty": fields.number("presence_penalty"),
            "frequency_penalty": fields.number("frequency_penalty"),
            "payer": caller.key_id,
            "logit_bias": _logit_bias(fields),
            "seed": fields.integer("seed", -(2**SEED_BITS), 2**SEED_BITS - 1),
        }
        fields.done()
        given = {field: value for field, value in values.items() if value is not None}
        completion = CompletionRequest(model=self.models.resolve(caller, name), **given)
        _check_together(completion, stream)
        return Asked(completion, stream, include_usage)


def _model_name(fields: Fields, engine: str | None) -> str:
    if engine is None:
        return fields.required_text("model")
    named = fields.text("model")
    if named not in (None, engine):
        raise InvalidRequest(f"'model' is {named!r}, and the URL names {engine!r}. Name one model.", param="model")
    return engine


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """A string, token ids, or a list of either -> the prompts. None is the start of a document."""
    match value:
        case None:
            return ("",)
        case str():
            return (value,)
        case [int(), *_]:
            return (_token_ids(value),)
        case [str(), *_] if all(isinstance(item, str) for item in value):
            return tuple(value)
        case [[*_], *_] if all(isinstance(item, list) for item in value):
            return tuple(_token_ids(item) for item in value)
        case _:
            raise InvalidRequest(
                "'prompt' must be a string, a list of strings, a list of token ids or a list of such lists, and no "
                "list may be empty.",
                param="prompt",
            )


def _token_ids(values: list[Any]) -> tuple[int, ...]:
    if not values or not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values):
        raise InvalidRequest("A 'prompt' of token ids must be a list of one or more integers from 0.", param="prompt")
    return tuple(values)


def _stops(fields: Fields) -> tuple[str, ...] | None:
    value = fields.take("stop")
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequest("'stop' must be a string or a list of strings.", param="stop")
    return tuple(stops)


def _logit_bias(fields: Fields) -> dict[int, float]:
    biases = fields.nested("logit_bias")
    if len(biases.names) > MAX_BIASES:
        raise InvalidRequest(
            f"'logit_bias' has at most {MAX_BIASES} tokens, not {len(biases.names)}. Leave some out.",
            param="logit_bias",
        )
    bias: dict[int, float] = {}
    for token in biases.names:
        value = biases.number(token)
        if not (token.isascii() and token.isdecimal() and len(token) <= 9):
            raise InvalidRequest(
                f"'logit_bias' has token ids as keys, such as \"50256\"; {token[:40]!r} is none.", param="logit_bias"
            )
        if value is not None:
            bias[int(token)] = value
    return bias


def _check_together(completion: CompletionRequest, stream: bool) -> None:
    """The rules of the wire; those of the values themselves are with `CompletionRequest.check`."""
    if stream and completion.ranked:
        raise InvalidRequest(
            f"'best_of' ({completion.best_of}) above 'n' ({completion.n}) cannot be streamed: which choices are best "
            "is known at the end only. Leave out stream or best_of.",
            param="best_of",
        )
    sequences = len(completion.prompts) * completion.samples
    if sequences > MAX_SEQUENCES:
        raise InvalidRequest(
            f"The request asks for {sequences} sequences (prompts times best_of); at most {MAX_SEQUENCES} are "
            "generated at once. Send fewer prompts in each request.",
            param="prompt",
        )
    tokens = sequences * completion.max_tokens
    # One sequence alone is bounded by the model's context, and hears of that.
    if sequences > 1 and tokens > MAX_TOKENS:
        raise InvalidRequest(
            f"The request asks for up to {tokens} tokens ({sequences} sequences of 'max_tokens' "
            f"{completion.max_tokens}); at most {MAX_TOKENS} are generated for one request. Lower max_tokens, or send "
            "fewer prompts in each request.",
            param="max_tokens",
        )


async def _begin(completer: Completer, completion: CompletionRequest) -> tuple[ChoiceDelta | Usage, CompletionStream]:
    """The first item of the stream of `completion`, and the rest. What fails up to here fails before any answer."""
    items = await completer.open(completion)
    return await anext(items), items


async def _frames(
    first: ChoiceDelta | Usage,
    rest: CompletionStream,
    head: dict[str, Any],
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    tail = {"usage": None} if include_usage else {}
    async with aclosing(rest):
        item: ChoiceDelta | Usage | None = first
        while item is not None:
            if isinstance(item, ChoiceDelta):
                yield frame({**head, "choices": [_choice_to_wire(item)], **tail})
            elif include_usage:
                yield frame({**head, "choices": [], "usage": _usage_to_wire(item)})
            item = await anext(rest, None)
    yield DONE


def _choice_to_wire(choice: Choice | ChoiceDelta) -> dict[str, Any]:
    return {
        "text": choice.text,
        "index": choice.index,
        "logprobs": None if choice.logprobs is None else _logprobs_to_wire(choice.logprobs),
        "finish_reason": choice.finish_reason,
    }


def _logprobs_to_wire(logprobs: Logprobs) -> dict[str, Any]:
    return {
        "tokens": logprobs.tokens,
        "token_logprobs": logprobs.token_logprobs,
        "top_logprobs": logprobs.top_logprobs,
        "text_offset": logprobs.text_offset,
    }


def _usage_to_wire(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
