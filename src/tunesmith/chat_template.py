r"""From the messages of a conversation to the prompt a model was taught to answer: by its own template, or a plain one.

A checkpoint's template is a program in a small language (Jinja), run in a sandbox: it sees the messages, the marks of
its tokenizer and the date; no file, no attribute that Python hides, nothing that it could change.

A base without one reads a conversation as a play: what the system says as a paragraph, then `User:` and `Assistant:` by
turns. An answer begins with a space, which is not shown, and ends where the next turn of a user would begin. That is
what rows to fine-tune such a model on look like, too: prompt `User: Hi!\nAssistant:`, completion ` Hello.\nUser:`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE = "chat_template.jinja"
"""Beside a tokenizer, or else within `tokenizer_config.json`."""
OPTIONS = "tokenizer_config.json"
MARKS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

_FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template can fail with: its own errors, and those of the Python objects it works on."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """What one side said."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str
    name: str | None = None
    """Whose words they are, where a side has several voices."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, oldest first; at least one. The assistant is to speak next."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What a conversation is to a model."""

    text: str
    has_marks: bool
    """Whether the text holds whatever begins a text for this model, so that nothing may be put before it."""
    stops: tuple[str, ...] = ()
    """Where an answer ends, besides the end of the text."""
    unshown: str = ""
    """What an answer begins with that is not a part of what is said."""


class ChatTemplate:
    """How one base is spoken to."""

    def __init__(self, source: str | None, marks: Mapping[str, str]) -> None:
        """`source`: Jinja; None is the plain template. `marks`: what the template may call by name, as `bos_token`.

        Raises ValueError for what is no Jinja.
        """
        self._marks = dict(marks)
        try:
            self._template = None if source is None else _environment().from_string(source)
        except TemplateError as error:
            raise ValueError(f"its chat template cannot be read: {error}") from error

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate:
        """The template of a checkpoint folder; the plain one where it has none. Raises ValueError."""
        options = _object(folder / OPTIONS)
        names = _object(folder / "special_tokens_map.json") | options
        contents = {mark: _content(names.get(mark)) for mark in MARKS}
        marks = {mark: content for mark, content in contents.items() if content is not None}
        return cls(template_source(folder), marks)

    def prompt(self, conversation: Conversation, *, now: datetime) -> ChatPrompt:
        """The text after which the assistant's answer comes. Raises ValueError telling why the template refuses."""
        if self._template is None:
            return _plain(conversation)
        return ChatPrompt(self._rendered(self._template, conversation, now, add_generation_prompt=True), has_marks=True)

    def told(self, conversation: Conversation, *, now: datetime) -> str:
        """A conversation that an answer has ended, with its marks. For templates alone; raises ValueError as `prompt`.

        It begins with the prompt of what was said before, where the template is made to be trained with.
        """
        assert self._template is not None
        return self._rendered(self._template, conversation, now, add_generation_prompt=False)

    def _rendered(
        self, template: Template, conversation: Conversation, now: datetime, *, add_generation_prompt: bool
    ) -> str:
        messages = [
            {"role": one.role, "content": one.content} | ({} if one.name is None else {"name": one.name})
            for one in conversation.messages
        ]
        try:
            return template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                strftime_now=now.strftime,
                raise_exception=_raise,
                **self._marks,
            )
        except _FAULTS as error:
            raise ValueError(str(error)) from error


def template_source(folder: Path) -> str | None:
    """The Jinja that a checkpoint folder comes with, if any."""
    beside = folder / TEMPLATE
    return beside.read_text() if beside.is_file() else _default(_object(folder / OPTIONS).get("chat_template"))


def _plain(conversation: Conversation) -> ChatPrompt:
    said = []
    speakers = {"User": None}  # in order, each once
    for message in conversation.messages:
        match message.role:
            case "system":
                said.append(f"{message.content}\n\n")
            case "user":
                speaker = message.name or "User"
                speakers[speaker] = None
                said.append(f"{speaker}: {message.content}\n")
            case _:
                said.append(f"Assistant: {message.content}\n")
    stops = tuple(f"\n{speaker}:" for speaker in speakers)
    return ChatPrompt("".join([*said, "Assistant:"]), has_marks=False, stops=stops, unshown=" ")


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as the templates of checkpoints expect it. Source: transformers, `chat_template_utils.py`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    return environment


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said, for trainers; here it is what is inside."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Called by Jinja at the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # Jinja's own escapes what HTML would take for tags


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _default(template: Any) -> str | None:
    """A template, or the default one of a list of named ones."""
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _content(mark: Any) -> str | None:
    content = mark.get("content") if isinstance(mark, dict) else mark
    return content if isinstance(content, str) else None


def _object(path: Path) -> Json:
    """The object in a JSON file; empty where there is none: what is damaged, `vocabulary` has refused."""
    value = json.loads(path.read_bytes()) if path.is_file() else {}
    return value if isinstance(value, dict) else {}
