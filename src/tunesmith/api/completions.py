"""`/v1/completions` and `/v1/engines/{id}/completions`: wire body -> `CompletionRequest` -> choices.

Unknown fields, and the one known field that is not honoured here (`suffix`), end as a 400 that names them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tunesmith.api.body import Fields, read_json
from tunesmith.api.connection import while_connected
from tunesmith.api.generating import (
    MAX_LOGPROBS,
    Asked,
    GeneratingApi,
    begin,
    check_amount,
    model_name,
    sampling_values,
    stream_values,
    usage_to_wire,
)
from tunesmith.api.routing import path_id
from tunesmith.api.sse import DONE, EventStream, frame
from tunesmith.core.accounts import Caller
from tunesmith.errors import InvalidRequest
from tunesmith.serving.completer import (
    Choice,
    ChoiceDelta,
    CompletionRequest,
    CompletionStream,
    Logprobs,
    Usage,
)
from tunesmith.serving.request import Prompt


class CompletionsApi(GeneratingApi):
    """The verb of completions, under both of its URLs."""

    async def create(self, request: Request, caller: Caller) -> Response:
        """POST /v1/completions. A client that hangs up ends the generation, streamed or not."""
        return await self._create(request, caller, engine=None)

    async def create_for_engine(self, request: Request, caller: Caller) -> Response:
        """POST /v1/engines/{id}/completions: the same, the model named by the path."""
        return await self._create(request, caller, engine=path_id(request))

    async def _create(self, request: Request, caller: Caller, engine: str | None) -> Response:
        fields = await read_json(request)
        name = model_name(fields, engine)
        asked = await run_in_threadpool(self._parse, fields, caller, name)
        head = self.head("text_completion", name, prefix="cmpl-")
        if not asked.stream:
            done = await while_connected(request.receive, self.completer.complete(asked.completion))
            choices = [_choice_to_wire(choice) for choice in done.choices]
            return JSONResponse({**head, "choices": choices, "usage": usage_to_wire(done.usage)})
        # Up to the first token an error is still an answer of its own, with its own status.
        first, rest = await while_connected(request.receive, begin(self.completer, asked.completion))
        return EventStream(_frames(first, rest, head, asked.include_usage), heartbeat_s=self.heartbeat_s)

    def _parse(self, fields: Fields, caller: Caller, name: str) -> Asked:
        stream, include_usage = stream_values(fields)
        if fields.text("suffix"):
            raise InvalidRequest(
                "'suffix' (inserting text between a prompt and its end) is not available for these models. Leave it "
                "out and let the prompt end where the text is to go on.",
                param="suffix",
            )
        fields.text("user")  # tells for whom the caller asks; nothing depends on it
        values = sampling_values(fields, caller) | {
            "prompts": _prompts(fields.take("prompt")),
            "max_tokens": fields.integer("max_tokens"),
            "best_of": fields.integer("best_of"),
            "echo": fields.flag("echo"),
            "logprobs": fields.integer("logprobs", 0, MAX_LOGPROBS),
        }
        fields.done()
        given = {field: value for field, value in values.items() if value is not None}
        completion = CompletionRequest(model=self.models.resolve(caller, name), **given)
        check_amount(completion, stream=stream)
        return Asked(completion, stream, include_usage)


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
    if set(map(type, values)) != {int} or min(values) < 0:
        raise InvalidRequest("A 'prompt' of token ids must be a list of one or more integers from 0.", param="prompt")
    return tuple(values)


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
                yield frame({**head, "choices": [], "usage": usage_to_wire(item)})
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
