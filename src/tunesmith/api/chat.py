"""`/v1/chat/completions`: messages -> `CompletionRequest` over one conversation -> what the assistant says.

Fields for what these models cannot do (tools, pictures, sound, given formats) end as a 400 that names them; those that
change nothing about an answer (who asks, labels, caches) are taken and passed over.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from functools import cache
from hashlib import blake2b
from importlib.metadata import version
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tunesmith import __version__
from tunesmith.api.body import Fields, read_json
from tunesmith.api.connection import while_connected
from tunesmith.api.generating import (
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
from tunesmith.chat_template import Conversation, Message
from tunesmith.core.accounts import Caller
from tunesmith.errors import InvalidRequest
from tunesmith.serving.choice import Logprobs
from tunesmith.serving.completer import Choice, ChoiceDelta, CompletionRequest, CompletionStream, Usage
from tunesmith.tokenizer import bytes_text

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""On the wire -> in templates, which know no developer: that is the newer name of the same."""
MAX_TOP_LOGPROBS = 20
MAX_NAME_CHARACTERS = 64
NOT_HERE: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that are not honoured -> the values that ask for nothing but what is done anyway."""
PASSED_OVER = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "store",
    "user",
)


class ChatApi(GeneratingApi):
    """The verb of chat, under both of its URLs."""

    async def create(self, request: Request, caller: Caller) -> Response:
        """POST /v1/chat/completions. A client that hangs up ends the generation, streamed or not."""
        return await self._create(request, caller, engine=None)

    async def create_for_engine(self, request: Request, caller: Caller) -> Response:
        """POST /v1/engines/{id}/chat/completions: the same, the model named by the path."""
        return await self._create(request, caller, engine=path_id(request))

    async def _create(self, request: Request, caller: Caller, engine: str | None) -> Response:
        fields = await read_json(request)
        name = model_name(fields, engine)
        asked = await run_in_threadpool(self._parse, fields, caller, name)
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        head = self.head(kind, name, prefix="chatcmpl-") | {"system_fingerprint": _fingerprint()}
        if not asked.stream:
            done = await while_connected(request.receive, self.completer.complete(asked.completion))
            choices = [_choice_to_wire(choice) for choice in done.choices]
            return JSONResponse({**head, "choices": choices, "usage": usage_to_wire(done.usage)})
        # Up to the first token an error is still an answer of its own, with its own status.
        first, rest = await while_connected(request.receive, begin(self.completer, asked.completion))
        frames = _frames(first, rest, head, asked.completion.n, asked.include_usage)
        return EventStream(frames, heartbeat_s=self.heartbeat_s)

    def _parse(self, fields: Fields, caller: Caller, name: str) -> Asked:
        stream, include_usage = stream_values(fields)
        values = sampling_values(fields, caller) | {"logprobs": _logprobs(fields)}
        conversation = _conversation(fields)
        max_tokens = _max_tokens(fields)
        for field in PASSED_OVER:
            fields.take(field)
        for field, neutral in NOT_HERE.items():
            value = fields.take(field)
            if value is not None and value not in neutral:
                raise InvalidRequest(f"'{field}' is not available for these models. Leave it out.", param=field)
        fields.done()
        given = {field: value for field, value in values.items() if value is not None}
        model = self.models.resolve(caller, name)
        completion = CompletionRequest(model=model, prompts=(conversation,), max_tokens=max_tokens, **given)
        check_amount(completion, stream=stream)
        return Asked(completion, stream, include_usage)


@cache
def _fingerprint() -> str:
    """Answers to the same request with the same seed can differ where this does."""
    return "fp_" + blake2b(f"{__version__} {version('torch')}".encode(), digest_size=5).hexdigest()


def _logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs") or False
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': set logprobs to true.", param="top_logprobs")
    return (top or 0) if wanted else None


def _max_tokens(fields: Fields) -> int | None:
    older, newer = (fields.integer(name, 1) for name in ("max_tokens", "max_completion_tokens"))
    if older is not None and newer is not None and older != newer:
        raise InvalidRequest(
            f"'max_tokens' is {older} and 'max_completion_tokens', its newer name, is {newer}. Give one of them.",
            param="max_tokens",
        )
    return older if newer is None else newer


def _conversation(fields: Fields) -> Conversation:
    messages = fields.take("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(
            '\'messages\' must be a list of one or more messages, such as [{"role": "user", "content": "Hello!"}].',
            param="messages",
        )
    return Conversation(tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages)))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise InvalidRequest(f"'{where}' must be an object with role and content.", param=where)
    fields = Fields(value, within=f"{where}.")
    role = fields.required_text("role")
    if role not in ROLES:
        raise InvalidRequest(
            f"'{where}.role' is {role[:40]!r}; roles here are {', '.join(ROLES)}.", param=f"{where}.role"
        )
    name = fields.text("name")
    if name is not None and (not name.isprintable() or not 0 < len(name) <= MAX_NAME_CHARACTERS):
        raise InvalidRequest(
            f"'{where}.name' must be of 1 to {MAX_NAME_CHARACTERS} printable characters.", param=f"{where}.name"
        )
    content = _content(fields.take("content"), f"{where}.content")
    refusal = fields.text("refusal")  # what an assistant says when it declines
    content = refusal if content is None else content
    fields.take("annotations")  # come back with answers of ours and of others; they are no words
    for field in ("tool_calls", "function_call", "audio"):
        if fields.take(field):
            raise InvalidRequest(f"'{where}.{field}' is not available for these models.", param=f"{where}.{field}")
    fields.done()
    if content is None:
        raise InvalidRequest(f"'{where}.content' is missing: say what was said.", param=f"{where}.content")
    return Message(ROLES[role], content, name)


def _content(value: Any, where: str) -> str | None:
    """Text, or parts of it, which are paragraphs."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
        raise InvalidRequest(f"'{where}' must be a string or a list of parts.", param=where)
    return "\n".join(_part(part, f"{where}[{index}]") for index, part in enumerate(value))


def _part(part: dict[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        raise InvalidRequest(
            f"'{where}.type' is {str(kind)[:40]!r}; these models read text only.", param=f"{where}.type"
        )
    fields = Fields(part, within=f"{where}.")
    fields.take("type")
    text = fields.required_text(kind)
    fields.done()
    return text


async def _frames(
    first: ChoiceDelta | Usage, rest: CompletionStream, head: dict[str, Any], n: int, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    tail = {"usage": None} if include_usage else {}
    async with aclosing(rest):
        for index in range(n):
            opening = {"role": "assistant", "content": "", "refusal": None}
            yield frame({**head, "choices": [_piece(index, opening)], **tail})
        item: ChoiceDelta | Usage | None = first
        while item is not None:
            if isinstance(item, ChoiceDelta):
                for piece in _pieces(item):
                    yield frame({**head, "choices": [piece], **tail})
            elif include_usage:
                yield frame({**head, "choices": [], "usage": usage_to_wire(item)})
            item = await anext(rest, None)
    yield DONE


def _pieces(delta: ChoiceDelta) -> Iterator[dict[str, Any]]:
    """What was said, and, by itself, that it was the last."""
    if delta.text or (delta.logprobs is not None and delta.logprobs.rows):
        yield _piece(delta.index, {"content": delta.text}, delta.logprobs)
    if delta.finish_reason is not None:
        yield _piece(delta.index, {}, finish_reason=delta.finish_reason)


def _piece(
    index: int, delta: dict[str, Any], logprobs: Logprobs | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "logprobs": _logprobs_to_wire(logprobs),
        "finish_reason": finish_reason,
    }


def _choice_to_wire(choice: Choice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": _logprobs_to_wire(choice.logprobs),
        "finish_reason": choice.finish_reason,
    }


def _logprobs_to_wire(logprobs: Logprobs | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    content = [
        {**_token(row.content, row.logprob), "top_logprobs": [_token(*one) for one in row.top]} for row in logprobs.rows
    ]
    return {"content": content, "refusal": None}


def _token(content: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": bytes_text(content), "logprob": logprob, "bytes": list(content)}
