"""Conversations as training data: one example for each answer, in the words in which the base will be spoken to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tunesmith.chat_template import ChatTemplate
from tunesmith.data.chat import Chat, NotChat
from tunesmith.data.formats import Example, read_examples
from tunesmith.errors import InvalidRequest

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye."},
    {"role": "assistant", "content": "Hm.", "weight": 0},
    {"role": "user", "content": [{"type": "text", "text": "Bye!"}]},
    {"role": "assistant", "content": "Goodbye."},
]
IM = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ELSEWHERE = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"


def test_each_answer_is_an_example() -> None:
    first, second = Chat.plain()({"messages": TALK})
    assert first == Example("Be kind.\n\nUser: Hi!\nAssistant:", " Hello.\nUser:")
    assert second.prompt.endswith("User: Bye.\nAssistant: Hm.\nUser: Bye!\nAssistant:")
    assert second.completion == " Goodbye.\nUser:"


def test_a_base_with_a_template_is_trained_in_its_own_words() -> None:
    first, second = Chat(ChatTemplate(IM, {}))({"messages": TALK})
    said = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    assert first == Example(said, "Hello.<|im_end|>\n", marked=True)
    assert second.prompt.startswith(said + "Hello.<|im_end|>\n")
    assert second.completion == "Goodbye.<|im_end|>\n"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": "hello"},
        {"messages": [{"role": "user", "content": "Hi!"}]},
        {"messages": [{"role": "assistant", "content": "Hi!"}]},
        {"messages": [{"role": "tool", "content": "4"}]},
        {"messages": ["Hi!"]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    ],
)
def test_what_is_no_conversation(row: dict[str, Any]) -> None:
    with pytest.raises(NotChat):
        list(Chat.plain()(row))


@pytest.mark.parametrize(
    ("template", "reason"), [(ELSEWHERE, "elsewhere"), ("{{ raise_exception('system first') }}", "system first")]
)
def test_a_template_that_does_not_take_it(template: str, reason: str) -> None:
    with pytest.raises(NotChat, match=reason):
        list(Chat(ChatTemplate(template, {}))({"messages": TALK}))


def test_files_may_hold_rows_of_both_kinds() -> None:
    lines = [json.dumps(row).encode() for row in ({"messages": TALK}, {"prompt": "a", "completion": "b"})]
    assert len(list(read_examples(lines, Chat.plain()))) == 3
    with pytest.raises(InvalidRequest, match="Line 1 of the file has no field `prompt`"):
        list(read_examples(lines))


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": TALK[:2]}, "is no conversation to train on: it has no answer of an assistant"),
        ({"messages": TALK, "tools": []}, "has a field 'tools' beside `messages`"),
        ({"messages": [TALK[1], {"role": "assistant", "content": "\ud800"}]}, "has half a character"),
    ],
)
def test_faults_are_named_by_line(row: dict[str, Any], fault: str) -> None:
    good = json.dumps({"messages": TALK}).encode()
    with pytest.raises(InvalidRequest, match=f"Line 2 of the file {fault}") as caught:
        list(read_examples([good, json.dumps(row).encode()], Chat.plain()))
    assert caught.value.param == "file"
