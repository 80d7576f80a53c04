"""`/v1/engines`: models as they were called before 2022, and `generate`, which was completions before 2021.

No description of `generate` was ever published for good. Its body is that of the 0.28 client and of programs of 2020,
which also tell how its answer was read: `data[i].text` is a list of texts that begins with the context, and
`text_offset`, `token_logprobs` and `top_logprobs` run parallel to it.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tunesmith.api.body import Fields, read_json
from tunesmith.api.connection import while_connected
from tunesmith.api.generating import (
    MAX_LOGPROBS,
    GeneratingApi,
    begin,
    check_amount,
    sampling_values,
    usage_to_wire,
)
from tunesmith.api.pages import envelope
from tunesmith.api.routing import path_id
from tunesmith.api.sse import DONE, EventStream, frame
from tunesmith.core.accounts import Caller
from tunesmith.core.models import Model, ModelRef
from tunesmith.errors import InvalidRequest, TunesmithError
from tunesmith.serving.completer import Choice, ChoiceDelta, CompletionRequest, CompletionStream, Usage

OLD_NAMES = {"prompt": "context", "max_tokens": "length", "n": "completions"}
"""Fields of completions -> what `generate` calls them."""


class EnginesApi(GeneratingApi):
    """The verbs of engines."""

    async def list(self, _request: Request, caller: Caller) -> Response:
        """GET /v1/engines: the models, as they were called before 2022."""
        models = await run_in_threadpool(self.models.list, caller)
        return JSONResponse(envelope([engine_to_wire(model) for model in models]))

    async def get(self, request: Request, caller: Caller) -> Response:
        """GET /v1/engines/{id}: with its replicas."""
        return JSONResponse(await self._engine(caller, path_id(request)))

    async def update(self, request: Request, caller: Caller) -> Response:
        """POST /v1/engines/{id}: `replicas` 1 loads the model now, and is answered when it is loaded.

        There is one engine, which answers all requests of a model together, so that more replicas are refused; and so
        are none, since a model leaves by itself when others need its room. Without `replicas` nothing changes.
        """
        name = path_id(request)
        engine = await self._engine(caller, name)
        fields = await read_json(request)
        replicas = fields.integer("replicas")
        fields.done()
        if replicas is None:
            return JSONResponse(engine)
        if replicas != 1:
            raise InvalidRequest(
                f"'replicas' must be 1 here; it is {replicas}. One copy of a model answers all its requests together "
                "and leaves the memory when others need the room; 1 loads it now.",
                param="replicas",
            )
        model = await run_in_threadpool(self.models.resolve, caller, name)
        await while_connected(request.receive, self._load(model))
        return JSONResponse(await self._engine(caller, name))

    async def generate(self, request: Request, caller: Caller) -> Response:
        """POST /v1/engines/{id}/generate: completions in the words of 2020, the context always before the rest."""
        fields = await read_json(request)
        stream = fields.flag("stream") or False
        asked = await run_in_threadpool(self._parse, fields, caller, path_id(request))
        head = self.head("text_completion", asked.model.name, prefix="cmpl-")
        (context,) = asked.prompts
        assert isinstance(context, str)
        writer = _Writer(None if asked.echo else context)
        with _in_old_words():
            check_amount(asked, stream=stream)
            if not stream:
                done = await while_connected(request.receive, self.completer.complete(asked))
                data = [writer.item(choice) for choice in done.choices]
                return JSONResponse({**head, "data": data, "usage": usage_to_wire(done.usage)})
            first, rest = await while_connected(request.receive, begin(self.completer, asked))
        return EventStream(_frames(first, rest, head, writer), heartbeat_s=self.heartbeat_s)

    async def _engine(self, caller: Caller, name: str) -> dict[str, Any]:
        """The engine object, with what is true of its replicas."""
        model = await run_in_threadpool(self.models.get, caller, name)
        try:
            state = self.completer.state(await run_in_threadpool(self.models.resolve, caller, name))
        except (TunesmithError, ValueError):  # what is wrong with it, those hear who use it
            state = None
        replicas = {"replicas": 1, "ready_replicas": int(state == "resident"), "max_replicas": 1}
        return engine_to_wire(model) | replicas

    async def _load(self, model: ModelRef) -> None:
        """As a completion of no tokens does, with all that can be wrong with it."""
        nothing = CompletionRequest(model=model, prompts=("",), max_tokens=0)
        async with aclosing(await self.completer.open(nothing)):
            pass

    def _parse(self, fields: Fields, caller: Caller, engine: str) -> CompletionRequest:
        model = self._model(caller, engine, fields.text("model"))
        context = fields.text("context") or ""
        logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
        values = sampling_values(fields, caller, how_many="completions") | {
            "max_tokens": fields.integer("length"),
            "best_of": fields.integer("best_of"),
        }
        fields.text("user")  # tells for whom the caller asks; nothing depends on it
        fields.done()
        given = {name: value for name, value in values.items() if value is not None}
        # The tokens are asked for in any case: they part the text. Those of the context cost a scoring of it.
        return CompletionRequest(
            model=model, prompts=(context,), echo=logprobs is not None, logprobs=logprobs or 0, **given
        )

    def _model(self, caller: Caller, engine: str, named: str | None) -> ModelRef:
        """What is to answer: the engine itself, or a model named beside it that was tuned from it."""
        model = self.models.resolve(caller, named or engine)
        if named not in (None, engine) and model.base_name != engine:
            raise InvalidRequest(
                f"'model' is {named!r}, which runs on engine {model.base_name!r}; the URL names {engine!r}. Name the "
                "engine that the model was tuned from, or leave out the model.",
                param="model",
            )
        return model


@dataclass(slots=True)
class _Writer:
    """Makes items of `data` out of choices, whole or in pieces."""

    context: str | None
    """Put before each choice; None where the choices hold it themselves, and their log-probabilities are shown."""
    _given: dict[int, int] = field(default_factory=dict)
    """Characters given so far, by index of choice."""

    def item(self, choice: Choice | ChoiceDelta) -> dict[str, Any]:
        """One item. Its texts joined are the text of `choice`, after the context the first time."""
        table = choice.logprobs
        assert table is not None
        start = self._given.get(choice.index)
        before: list[tuple[str, int]] = []
        if start is None:
            start = 0 if self.context is None else len(self.context)
            before = [] if self.context is None else [(self.context, 0)]
        end = self._given[choice.index] = start + len(choice.text)
        # The end of a token that is held back, for it may begin a stop sequence, comes without a row of its own.
        if choice.text and (not table.rows or table.rows[0].offset > start):
            rest = table.rows[0].offset if table.rows else end
            before.append((choice.text[: rest - start], start))
        edges = [*(row.offset for row in table.rows), end]
        pieces = [choice.text[a - start : b - start] for a, b in pairwise(edges)]
        unscored = [None] * len(before)
        return {
            "text": [*(text for text, _ in before), *pieces],
            "index": choice.index,
            "text_offset": [*(offset for _, offset in before), *table.text_offset],
            "token_logprobs": [*unscored, *table.token_logprobs] if self.context is None else None,
            "top_logprobs": [*unscored, *table.top_logprobs] if self.context is None else None,
            "finish_reason": choice.finish_reason,
        }


async def _frames(
    first: ChoiceDelta | Usage, rest: CompletionStream, head: dict[str, Any], writer: _Writer
) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        item: ChoiceDelta | Usage | None = first
        while item is not None:
            if isinstance(item, ChoiceDelta):
                yield frame({**head, "data": [writer.item(item)]})
            item = await anext(rest, None)
    yield DONE


@contextmanager
def _in_old_words() -> Iterator[None]:
    """Errors about fields of completions name those that the caller knows."""
    try:
        yield
    except InvalidRequest as error:
        message = re.sub(r"'(prompt|max_tokens|n)'|\b(max_tokens)\b", _old_name, error.message)
        param = None if error.param is None else OLD_NAMES.get(error.param, error.param)
        raise InvalidRequest(message, param=param, code=error.code) from error


def _old_name(found: re.Match[str]) -> str:
    quoted, plain = found.groups()
    return OLD_NAMES[plain] if plain else f"'{OLD_NAMES[quoted]}'"


def engine_to_wire(model: Model) -> dict[str, Any]:
    """The engine object."""
    return {
        "id": model.name,
        "object": "engine",
        "owner": model.owned_by,
        "ready": model.alias is None or model.alias.model_name is not None,
        "created": None,
        "permissions": None,
    }
