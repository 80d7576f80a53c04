"""What completions and chat have in common on the wire: how to sample, how much, streams and usage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.api.body import Fields
from tunesmith.core.accounts import Caller
from tunesmith.core.models import Models
from tunesmith.core.store import Clock, NewId
from tunesmith.errors import InvalidRequest
from tunesmith.serving.completer import ChoiceDelta, Completer, CompletionRequest, CompletionStream, Usage
from tunesmith.serving.request import MAX_N

MAX_SEQUENCES = 2048
"""Most sequences one request may generate: prompts times `best_of`."""
MAX_TOKENS = 262_144
"""Most tokens all sequences of one request may come to. Their log-probabilities are held until the answer is whole."""
MAX_LOGPROBS = 5
"""Most alternatives that the tables of completions show at each place."""
MAX_BIASES = 1024
"""Most tokens with a `logit_bias`; each costs at every step of every sequence."""


class GeneratingApi:
    """What verbs that generate stand on, and how their answers begin."""

    def __init__(
        self, completer: Completer, models: Models, *, clock: Clock, new_id: NewId, heartbeat_s: float
    ) -> None:
        """`clock` gives seconds since 1970; a stream shows that it is alive every `heartbeat_s`."""
        self.completer = completer
        self.models = models
        self.clock = clock
        self.new_id = new_id
        self.heartbeat_s = heartbeat_s

    def head(self, kind: str, model: str, *, prefix: str) -> dict[str, Any]:
        """The beginning of an answer of that `object`, and of each piece of it; `prefix` is that of its id."""
        return {"id": self.new_id(prefix), "object": kind, "created": int(self.clock()), "model": model}


@dataclass(frozen=True, slots=True)
class Asked:
    """A parsed body: what to generate, and how to answer."""

    completion: CompletionRequest
    stream: bool
    include_usage: bool


def model_name(fields: Fields, engine: str | None) -> str:
    """The model that the body or the path names; both may, if they agree."""
    if engine is None:
        return fields.required_text("model")
    named = fields.text("model")
    if named not in (None, engine):
        raise InvalidRequest(f"'model' is {named!r}, and the URL names {engine!r}. Name one model.", param="model")
    return engine


def sampling_values(fields: Fields, caller: Caller, *, how_many: str = "n") -> dict[str, Any]:
    """The values of a `CompletionRequest` that every kind of request has; None where none was given.

    `how_many` is what the wire calls `n`.
    """
    return {
        "temperature": fields.number("temperature"),
        "top_p": fields.number("top_p"),
        "n": fields.integer(how_many, 1, MAX_N),
        "stop": _stops(fields),
        "presence_penalty": fields.number("presence_penalty"),
        "frequency_penalty": fields.number("frequency_penalty"),
        "logit_bias": _logit_bias(fields),
        "seed": fields.integer("seed"),
        "payer": caller.key_id,
    }


def stream_values(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether with a last chunk that tells the usage."""
    stream = fields.flag("stream") or False
    options = fields.nested("stream_options")
    include_usage = options.flag("include_usage") or False
    if options.flag("include_obfuscation"):
        raise InvalidRequest(
            "'stream_options.include_obfuscation' (chunks filled up to hide their lengths) is not available here. "
            "Leave it out, or set it to false.",
            param="stream_options.include_obfuscation",
        )
    options.done()
    if options.names and not stream:
        raise InvalidRequest(
            "'stream_options' is for streams: set stream to true, or leave it out.", param="stream_options"
        )
    return stream, include_usage


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
        # Of "05" and "5" one would be lost.
        if not (token.isascii() and token.isdecimal() and len(token) <= 9 and token == str(int(token))):
            raise InvalidRequest(
                f"'logit_bias' has token ids as keys, such as \"50256\"; {token[:40]!r} is none.", param="logit_bias"
            )
        if value is not None:
            bias[int(token)] = value
    return bias


def check_amount(completion: CompletionRequest, *, stream: bool) -> None:
    """Raises InvalidRequest for more than one request may ask for, and for a stream of what has to be ranked first."""
    if stream and completion.ranked:
        raise InvalidRequest(
            f"'best_of' ({completion.best_of}) above 'n' ({completion.n}) cannot be streamed: which choices are "
            "best is known at the end only. Leave out stream or best_of.",
            param="best_of",
        )
    sequences = len(completion.prompts) * completion.samples
    if sequences > MAX_SEQUENCES:
        raise InvalidRequest(
            f"The request asks for {sequences} sequences (prompts times best_of); at most {MAX_SEQUENCES} are "
            "generated at once. Send fewer prompts in each request.",
            param="prompt",
        )
    each = completion.model.context_tokens if completion.max_tokens is None else completion.max_tokens
    tokens = sequences * each
    # One sequence alone is bounded by the model's context, and hears of that.
    if sequences > 1 and tokens > MAX_TOKENS:
        raise InvalidRequest(
            f"The request asks for up to {tokens} tokens ({sequences} sequences of 'max_tokens' "
            f"{each}); at most {MAX_TOKENS} are generated for one request. Lower max_tokens, or ask for fewer "
            "sequences.",
            param="max_tokens",
        )


async def begin(completer: Completer, completion: CompletionRequest) -> tuple[ChoiceDelta | Usage, CompletionStream]:
    """The first item of the stream of `completion`, and the rest. What fails up to here fails before any answer."""
    items = await completer.open(completion)
    return await anext(items), items


def usage_to_wire(usage: Usage) -> dict[str, Any]:
    """The usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
