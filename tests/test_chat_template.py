"""Conversations become the prompts that transformers makes of them, and what a template must not do it cannot."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.tiny import TOKENIZER
from tunesmith.chat_template import ChatTemplate, Conversation, Message
from tunesmith.tokenizer import Tokenizer

BOX = Tokenizer.from_folder(TOKENIZER.parent)
NOW = datetime(2026, 11, 22, 20, 0)
IM = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' }}\n"
    "    {%- generation %}{{- message.content + '<|im_end|>\\n' }}{%- endgeneration %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
BEGINNING = (
    "{{ bos_token }}{% set names = namespace(last='') %}{% for m in messages %}{% if loop.index > 20 %}{% break %}"
    "{% endif %}{% set names.last = m['role'] | upper %}[{{ names.last }}]{{ m['content'] | trim | tojson }}"
    "{% endfor %}"
)
MESSAGES = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), st.text(max_size=20)), min_size=1, max_size=5
)


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), bos_token="<|endoftext|>")


@pytest.mark.parametrize("source", [IM, BEGINNING])
@settings(max_examples=30)
@given(messages=MESSAGES)
def test_a_template_gives_what_transformers_gives(
    theirs: PreTrainedTokenizerFast, source: str, messages: list[Message]
) -> None:
    plain = [{"role": message.role, "content": message.content} for message in messages]
    expected = theirs.apply_chat_template(plain, chat_template=source, tokenize=False, add_generation_prompt=True)
    template = ChatTemplate(source, {"bos_token": "<|endoftext|>"})
    got = template.prompt(Conversation(tuple(messages)), now=NOW)
    assert got.text == expected
    assert got.has_marks
    ids = theirs.apply_chat_template(plain, chat_template=source, add_generation_prompt=True)["input_ids"]
    assert (BOX.prompt_ids(got.text, marked=True) or [0]) == (ids or [0])


def test_the_plain_template_reads_like_a_play() -> None:
    conversation = Conversation(
        (
            Message("system", "Be kind."),
            Message("user", "Hi!"),
            Message("assistant", "Hello.\nWho is it?"),
            Message("user", "It is me", name="Ann"),
        )
    )
    prompt = ChatTemplate(None, {}).prompt(conversation, now=NOW)
    assert prompt.text == "Be kind.\n\nUser: Hi!\nAssistant: Hello.\nWho is it?\nAnn: It is me\nAssistant:"
    assert prompt.stops == ("\nUser:", "\nAnn:")
    assert (prompt.unshown, prompt.has_marks) == (" ", False)


def folder_with(tmp_path: Path, options: dict[str, object] | None = None, beside: str | None = None) -> Path:
    shutil.copy(TOKENIZER, tmp_path / "tokenizer.json")
    if options is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    if beside is not None:
        (tmp_path / "chat_template.jinja").write_text(beside)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "beside", "expected"),
    [
        (None, None, "User: x\nAssistant:"),
        ({"chat_template": None}, None, "User: x\nAssistant:"),
        ({"chat_template": "{{ bos_token }}one", "bos_token": "<s>"}, None, "<s>one"),
        ({"chat_template": "{{ bos_token }}one", "bos_token": {"content": "<s>"}}, None, "<s>one"),
        (
            {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "one"}]},
            None,
            "one",
        ),
        ({"chat_template": "one"}, "two {{ messages[0].name }}", "two Ann"),
        ({"chat_template": "{{ strftime_now('%d %b %Y') }}"}, None, "22 Nov 2026"),
    ],
)
def test_where_a_template_is_found(
    tmp_path: Path, options: dict[str, object] | None, beside: str | None, expected: str
) -> None:
    template = ChatTemplate.from_folder(folder_with(tmp_path, options, beside))
    named = beside is not None
    assert template.prompt(Conversation((Message("user", "x", "Ann" if named else None),)), now=NOW).text == expected


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('first the user, then you') }}", "first the user, then you"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{{ 1 / 0 }}", "zero"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ nothing.of.it }}", "undefined"),
    ],
)
def test_what_a_template_refuses_or_must_not_do(source: str, says: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(ValueError, match=says):
        template.prompt(Conversation((Message("user", "x"),)), now=NOW)


def test_a_template_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        ChatTemplate.from_folder(folder_with(tmp_path, beside="{% for %}"))
