"""Conversations as rows to train on: one row for each answer, with all that was said before in its prompt. Pure.

In the words of the plain template of `chat_template`, in which bases without a template of their own are spoken to.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from tunesmith.chat_template import ChatTemplate, Conversation, Message

_PLAIN = ChatTemplate(None, {})
_ANY_TIME = datetime.fromtimestamp(0, UTC)
"""The plain template has no date in it."""
SYSTEM = ("system", "developer")


class NotChat(Exception):
    """A row that is no conversation which can be trained on; the message tells why."""


def chat_rows(row: Any) -> Iterator[dict[str, str]]:
    r"""`{"prompt", "completion"}` of each answer in `{"messages": [...]}` that is not weighted 0. Raises NotChat.

    >>> talk = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
    >>> list(chat_rows({"messages": talk}))
    [{'prompt': 'User: Hi!\nAssistant:', 'completion': ' Hello.\nUser:'}]
    """
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list):
        raise NotChat("it has no list of messages")
    said: list[Message] = []
    answers = 0
    for message in messages:
        one = _message(message)
        if one.role == "assistant" and said and message.get("weight") != 0:
            prompt = _PLAIN.prompt(Conversation(tuple(said)), now=_ANY_TIME)
            yield {"prompt": prompt.text, "completion": f"{prompt.unshown}{one.content}{prompt.stops[0]}"}
            answers += 1
        said.append(one)
    if not answers:
        raise NotChat("it has no answer of an assistant to learn from")


def _message(value: Any) -> Message:
    role, content = (value.get("role"), value.get("content")) if isinstance(value, dict) else (None, None)
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "\n".join(str(part.get("text")) for part in content)
    if role not in (*SYSTEM, "user", "assistant") or not isinstance(content, str):
        raise NotChat(f"a message of role {role!r} is not text that somebody said")
    return Message("system" if role in SYSTEM else role, content, value.get("name"))
