"""Conversations as examples to train on: one for each answer, with all that was said before in its prompt. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunesmith.chat_template import ChatTemplate, Conversation, Message
from tunesmith.data.formats import Example

SYSTEM = ("system", "developer")
_ONE_TIME = datetime(2024, 7, 26, tzinfo=UTC)
"""For templates with a date in them: the same file gives the same examples on every day. It is the one that Llama 3's
template takes where it is told none."""


class NotChat(ValueError):
    """A row that is no conversation which can be trained on; the message tells why."""


class Chat:
    """Reads conversations in the words in which one base is spoken to."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    @classmethod
    def plain(cls) -> Chat:
        """That of bases without a template of their own."""
        return cls(ChatTemplate(None, {}))

    @classmethod
    def of(cls, base_dir: Path) -> Chat:
        """That of a checkpoint folder. Raises ValueError for a template that cannot be read."""
        return cls(ChatTemplate.from_folder(base_dir))

    def __call__(self, row: dict[str, Any]) -> Iterator[Example]:
        r"""An example for each answer in `{"messages": [...]}` that is not weighted 0. Raises NotChat.

        >>> talk = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
        >>> list(Chat.plain()({"messages": talk}))
        [Example(prompt='User: Hi!\nAssistant:', completion=' Hello.\nUser:', marked=False)]
        """
        messages = row.get("messages")
        if not isinstance(messages, list):
            raise NotChat("it has no list of messages")
        said: list[Message] = []
        answers = 0
        for message in messages:
            one = _message(message)
            if one.role == "assistant" and said and message.get("weight") != 0:
                yield self._example(tuple(said), one)
                answers += 1
            said.append(one)
        if not answers:
            raise NotChat("it has no answer of an assistant to learn from")

    def _example(self, said: tuple[Message, ...], answer: Message) -> Example:
        try:
            prompt = self._template.prompt(Conversation(said), now=_ONE_TIME)
            if not prompt.has_marks:
                return Example(prompt.text, f"{prompt.unshown}{answer.content}{prompt.stops[0]}")
            whole = self._template.told(Conversation((*said, answer)), now=_ONE_TIME)
        except ValueError as error:
            raise NotChat(f"the chat template of the model does not take it: {error}") from error
        completion = whole.removeprefix(prompt.text)
        if completion == whole or not completion:
            raise NotChat("the chat template of the model puts the answer elsewhere than after what was asked")
        return Example(prompt.text, completion, marked=True)


def _message(value: Any) -> Message:
    role, content = (value.get("role"), value.get("content")) if isinstance(value, dict) else (None, None)
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "\n".join(str(part.get("text")) for part in content)
    if role not in (*SYSTEM, "user", "assistant") or not isinstance(content, str):
        raise NotChat(f"a message of role {role!r} is not text that somebody said")
    return Message("system" if role in SYSTEM else role, content, value.get("name"))
