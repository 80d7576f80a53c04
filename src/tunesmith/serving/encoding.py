"""From prompts to token ids, bounded: what cannot fit is refused before it costs much. Knows no engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from tunesmith.chat_template import ChatPrompt, ChatTemplate, Conversation
from tunesmith.errors import InvalidRequest
from tunesmith.serving.request import CompletionRequest
from tunesmith.tokenizer import Tokenizer

ENCODED_AT_ONCE = 32
"""Texts given to the tokenizer together: enough to keep its threads busy, with a bounded need of memory."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the engine takes it, and what a writer of choices has to know of it."""

    ids: tuple[int, ...]
    """At least one."""
    text: str | None = None
    """None where only the ids are known."""
    stops: tuple[str, ...] = ()
    unshown: str = ""
    """Both: see `ChatPrompt`."""


def encode(
    request: CompletionRequest, tokenizer: Tokenizer, template: ChatTemplate | None, now: datetime
) -> list[EncodedPrompt]:
    """The prompts of a request. `template` is for conversations: None only where there are none.

    Raises InvalidRequest for what the model cannot read, and for a prompt that does not fit with what is to follow it.
    """
    texts = [prompt for prompt in request.prompts if isinstance(prompt, str)]
    encoded = _encode_texts(request, tokenizer, texts)
    prompts = []
    for prompt in request.prompts:
        match prompt:
            case str():
                prompts.append(EncodedPrompt(tuple(next(encoded)), prompt))
            case Conversation():
                assert template is not None
                prompts.append(_encode_chat(request, tokenizer, _rendered(template, prompt, now)))
            case ids:
                _check_ids(tokenizer, ids)
                prompts.append(EncodedPrompt(ids or tuple(tokenizer.prompt_ids(""))))
    longest = max(len(prompt.ids) for prompt in prompts)
    least = 1 if request.max_tokens is None else request.max_tokens
    if longest + least > request.model.context_tokens:
        raise _too_long(request, longest)
    return prompts


def _encode_texts(request: CompletionRequest, tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """The ids of each text.

    The tokenizer takes hundreds of bytes for each byte of text: so texts that cannot fit are refused before it sees
    them, and the others are encoded some at a time.
    """
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        some = texts[start : start + ENCODED_AT_ONCE]
        try:
            _refuse_what_cannot_fit(request, max(map(tokenizer.fewest_tokens, some)))
            encoded = tokenizer.prompt_ids_many(some)
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"'prompt' holds half of a surrogate pair ({error.object[error.start]!r}), no character. Remove it.",
                param="prompt",
            ) from error
        longest = max(map(len, encoded))
        if longest > request.model.context_tokens:
            raise _too_long(request, longest)
        yield from encoded


def _rendered(template: ChatTemplate, conversation: Conversation, now: datetime) -> ChatPrompt:
    try:
        return template.prompt(conversation, now=now)
    except ValueError as error:
        raise InvalidRequest(
            f"The chat template of this model does not take these messages: {error}. Order them as it wants: a system "
            "message first if any, then user and assistant by turns.",
            param="messages",
        ) from error


def _encode_chat(request: CompletionRequest, tokenizer: Tokenizer, prompt: ChatPrompt) -> EncodedPrompt:
    _refuse_what_cannot_fit(request, tokenizer.fewest_tokens(prompt.text))
    ids = tokenizer.prompt_ids(prompt.text, prompt.has_marks)
    return EncodedPrompt(tuple(ids), prompt.text, prompt.stops, prompt.unshown)


def _refuse_what_cannot_fit(request: CompletionRequest, fewest_tokens: int) -> None:
    if fewest_tokens > request.model.context_tokens:
        raise _too_long(request, fewest_tokens, at_least=True)


def _check_ids(tokenizer: Tokenizer, prompt_ids: tuple[int, ...]) -> None:
    size = tokenizer.vocabulary_size
    if prompt_ids and not (min(prompt_ids) >= 0 and max(prompt_ids) < size):
        position, token_id = next((at, token_id) for at, token_id in enumerate(prompt_ids) if not 0 <= token_id < size)
        raise InvalidRequest(
            f"'prompt' holds token id {token_id} at position {position}; this model's ids are 0 to {size - 1}.",
            param="prompt",
        )


def _too_long(request: CompletionRequest, prompt_tokens: int, *, at_least: bool = False) -> InvalidRequest:
    """In the words of the published API: users' code looks for their beginning, or for the code of chat."""
    limit, about = request.model.context_tokens, "at least " if at_least else ""
    completion_tokens = request.max_tokens or 0
    if any(isinstance(prompt, Conversation) for prompt in request.prompts):
        return InvalidRequest(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{about}{prompt_tokens + completion_tokens} tokens ({prompt_tokens} in the messages, {completion_tokens} "
            "in the completion). Please reduce the length of the messages or completion.",
            param="messages",
            code="context_length_exceeded",
        )
    return InvalidRequest(
        f"This model's maximum context length is {limit} tokens, however you requested "
        f"{about}{prompt_tokens + completion_tokens} tokens ({prompt_tokens} in your prompt; {completion_tokens} for "
        "the completion). Please reduce your prompt; or completion length."
    )
