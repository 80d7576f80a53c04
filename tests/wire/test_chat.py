"""Chat on the wire, answered by the scripted engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiny import make_tiny_base
from tests.wire.harness import client_of, error_of, masked, parts_of, settings_for
from tests.wire.published import check, needs_spec
from tests.wire.test_completions import chunks_of
from tunesmith.server import Parts

pytestmark = pytest.mark.anyio

Body = dict[str, Any]
HELLO = [{"role": "user", "content": "Hello"}]
WORDS = ["role", "content", "name", "type", "text", "user", "assistant", "refusal", "include_usage", "0", "17"]
FIELDS = ["messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "best_of", "stop"]
FIELDS += ["logprobs", "top_logprobs", "echo", "logit_bias", "presence_penalty", "seed", "stream_options", "tools"]
FIELDS += ["response_format", "metadata", "user", "model", "suffix"]


async def chat(client: httpx.AsyncClient, **body: Any) -> Body:
    response = await client.post("/v1/chat/completions", json={"model": "ada", "messages": HELLO, **body})
    assert response.status_code == 200, response.text
    answer: Body = response.json()
    return answer


async def complete(client: httpx.AsyncClient, **body: Any) -> Body:
    response = await client.post("/v1/completions", json={"model": "ada", **body})
    assert response.status_code == 200, response.text
    answer: Body = response.json()
    return answer


@pytest.fixture(scope="module")
async def templated(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    """A server whose base has a chat template of its own, for messages by turns."""
    folder = tmp_path_factory.mktemp("templated")
    base = make_tiny_base(folder / "base")
    (base / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
        "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    (base / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>"}))
    async with parts_of(settings_for(folder / "home", base)) as parts, client_of(parts) as client:
        yield client


async def test_answer(shared: httpx.AsyncClient) -> None:
    body = await chat(shared, max_tokens=3, seed=1)
    (choice,) = body.pop("choices")
    fingerprint = body.pop("system_fingerprint")
    assert fingerprint.startswith("fp_")
    assert body.pop("id").startswith("chatcmpl-")
    assert masked(body) == {
        "object": "chat.completion",
        "created": "<unix>",
        "model": "ada",
        "usage": {
            "prompt_tokens": body["usage"]["prompt_tokens"],
            "completion_tokens": 3,
            "total_tokens": body["usage"]["prompt_tokens"] + 3,
        },
    }
    content = choice["message"].pop("content")
    assert isinstance(content, str)
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }


async def test_it_is_a_completion_of_the_plain_prompt(shared: httpx.AsyncClient) -> None:
    messages = [{"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}]}]
    messages += [HELLO[0], {"role": "assistant", "content": "Hi", "refusal": None}, {"role": "user", "content": "So?"}]
    asked = {"n": 2, "seed": 4, "max_tokens": 9, "temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5}
    asked |= {"frequency_penalty": 0.5, "logit_bias": {"5": 3, "0": -100}}
    answer = await chat(shared, messages=messages, **asked)
    prompt = "Be\nkind.\n\nUser: Hello\nAssistant: Hi\nUser: So?\nAssistant:"
    plain = await complete(shared, prompt=prompt, stop="\nUser:", **asked)
    told = [(c["index"], c["message"]["content"], c["finish_reason"]) for c in answer["choices"]]
    assert told == [(c["index"], c["text"].removeprefix(" "), c["finish_reason"]) for c in plain["choices"]]
    assert answer["usage"] == plain["usage"]


async def test_the_template_of_the_base(templated: httpx.AsyncClient) -> None:
    asked: Body = {"seed": 2, "max_tokens": 6}
    answer = await chat(templated, **asked)
    plain = await complete(templated, prompt="<|endoftext|>[user]Hello[assistant]", **asked)
    assert answer["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    assert answer["usage"] == plain["usage"]
    refused = await templated.post(
        "/v1/chat/completions", json={"model": "ada", "messages": [{"role": "system", "content": "x"}]}
    )
    assert refused.status_code == 400
    assert error_of(refused)["param"] == "messages"
    assert "no system here" in error_of(refused)["message"]


async def test_without_a_limit_the_context_is_the_limit(shared: httpx.AsyncClient) -> None:
    never = {"logit_bias": {"0": -100}, "seed": 1}
    long = [{"role": "user", "content": "the " * 1950}]
    body = await chat(shared, messages=long, **never)
    assert body["usage"]["completion_tokens"] > 16
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == 2049


async def test_logprobs(shared: httpx.AsyncClient) -> None:
    asked: Body = {"max_tokens": 4, "temperature": 0}
    body = await chat(shared, logprobs=True, top_logprobs=7, **asked)
    (choice,) = body["choices"]
    table = choice["logprobs"]
    assert table["refusal"] is None
    plain = await complete(shared, prompt="User: Hello\nAssistant:", stop="\nUser:", logprobs=5, **asked)
    lists = plain["choices"][0]["logprobs"]
    assert [row["token"] for row in table["content"]] == lists["tokens"]
    assert [row["logprob"] for row in table["content"]] == lists["token_logprobs"]
    for row, top in zip(table["content"], lists["top_logprobs"], strict=True):
        assert len(row["top_logprobs"]) == 7
        assert row["top_logprobs"][0]["logprob"] == max(top.values())
        for one in [row, *row["top_logprobs"]]:
            if not one["token"].startswith("bytes:"):
                assert bytes(one["bytes"]).decode() == one["token"]
    said = b"".join(bytes(row["bytes"]) for row in table["content"]).decode(errors="replace")
    assert said.removeprefix(" ") == choice["message"]["content"]
    bare = (await chat(shared, logprobs=True, **asked))["choices"][0]["logprobs"]["content"]
    assert [row["top_logprobs"] for row in bare] == [[]] * len(bare)


async def test_stream_adds_up_to_the_plain_answer(shared: httpx.AsyncClient) -> None:
    asked = {"model": "ada", "messages": HELLO, "max_completion_tokens": 8, "seed": 7, "n": 3, "logprobs": True}
    plain = (await shared.post("/v1/chat/completions", json=asked)).json()
    chunks = chunks_of(await shared.post("/v1/chat/completions", json={**asked, "stream": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    for choice in plain["choices"]:
        first, *middle, last = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert (first["delta"]["role"], first["delta"]["content"]) == ("assistant", "")
        assert "".join(piece["delta"]["content"] for piece in middle) == choice["message"]["content"]
        assert [row for piece in middle for row in piece["logprobs"]["content"]] == choice["logprobs"]["content"]
        assert [piece["finish_reason"] for piece in [first, *middle]] == [None] * (len(middle) + 1)
        assert (last["delta"], last["finish_reason"]) == ({}, choice["finish_reason"])


async def test_usage_of_a_stream(shared: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    asked = {"model": "ada", "messages": HELLO, "max_tokens": 2, "stream": True, "stream_options": options}
    chunks = chunks_of(await shared.post("/v1/chat/completions", json=asked))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


async def test_what_changes_nothing_is_taken(shared: httpx.AsyncClient) -> None:
    neutral = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "tools": [],
        "tool_choice": "none",
        "audio": None,
        "functions": None,
        "stream_options": None,
    }
    plain = await chat(shared, max_tokens=3, seed=1)
    assert (await chat(shared, max_tokens=3, seed=1, **neutral))["choices"] == plain["choices"]
    by_path = await shared.post(
        "/v1/engines/ada/chat/completions", json={"messages": HELLO, "max_tokens": 3, "seed": 1}
    )
    assert by_path.json()["choices"] == plain["choices"]


def said(**fields: Any) -> Body:
    return {"messages": [{"role": "user", "content": "x", **fields}]}


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"messages": None}, "messages", "one or more"),
        ({"messages": []}, "messages", "one or more"),
        ({"messages": "Hello"}, "messages", "one or more"),
        ({"messages": ["Hello"]}, "messages[0]", "an object"),
        ({"messages": [*HELLO, {"content": "x"}]}, "messages[1].role", "must provide"),
        (said(role="tool"), "messages[0].role", "system, developer, user, assistant"),
        (said(content=None), "messages[0].content", "missing"),
        (said(content=5), "messages[0].content", "a string or a list of parts"),
        (said(content=[]), "messages[0].content", "a string or a list of parts"),
        (said(content=[{"type": "image_url", "image_url": {}}]), "messages[0].content[0].type", "'image_url'"),
        (said(content=[{"type": "text"}]), "messages[0].content[0].text", "must provide"),
        (said(content=[{"type": "text", "text": "x", "y": 1}]), "messages[0].content[0].y", "Unrecognized"),
        (said(name="a\nb"), "messages[0].name", "printable"),
        (said(tool_calls=[{"id": "x"}]), "messages[0].tool_calls", "not available"),
        (said(mood="good"), "messages[0].mood", "Unrecognized"),
        ({"frobnicate": 1}, "frobnicate", "Unrecognized request argument supplied: frobnicate"),
        ({"prompt": "x"}, "prompt", "Unrecognized"),
        ({"best_of": 2}, "best_of", "Unrecognized"),
        ({"tools": [{"type": "function"}]}, "tools", "not available"),
        ({"tool_choice": "required"}, "tool_choice", "not available"),
        ({"functions": [{}]}, "functions", "not available"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not available"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "not available"),
        ({"modalities": ["text", "audio"]}, "modalities", "not available"),
        ({"audio": {"voice": "x"}}, "audio", "not available"),
        ({"prediction": {"type": "content"}}, "prediction", "not available"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not available"),
        ({"web_search_options": {}}, "web_search_options", "not available"),
        ({"logprobs": 2}, "logprobs", "true or false"),
        ({"top_logprobs": 2}, "top_logprobs", "needs 'logprobs'"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "newer name"),
        ({"n": 129}, "n", "129"),
        ({"stop": ["a"] * 5}, "stop", "5"),
        ({"temperature": 2.5}, "temperature", "2.5"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", ""),
        ({"max_tokens": 3000}, "messages", "maximum context length is 2049 tokens. However, you requested 300"),
        ({"messages": [{"role": "user", "content": "word " * 200_000}]}, "messages", "at least"),
        ({"n": 128, "max_tokens": 2049}, "max_tokens", "262272 tokens"),
    ],
)
async def test_refused(shared: httpx.AsyncClient, body: Body, param: str, told: str) -> None:
    response = await shared.post("/v1/chat/completions", json={"model": "ada", "messages": HELLO, **body})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["code"] == ("context_length_exceeded" if "context length" in error["message"] else None)
    assert told in error["message"]


async def test_unknown_model(shared: httpx.AsyncClient) -> None:
    response = await shared.post("/v1/chat/completions", json={"model": "nope", "messages": HELLO})
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


async def test_a_dead_engine_is_told_before_the_first_token(client: httpx.AsyncClient, parts: Parts) -> None:
    await parts.engine.close()
    for stream in (False, True):
        asked = {"model": "ada", "messages": HELLO, "stream": stream}
        response = await client.post("/v1/chat/completions", json=asked)
        assert response.status_code == 429
        assert response.headers["x-should-retry"] == "true"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(field=st.sampled_from(FIELDS), value=JSON, chat=st.booleans())
async def test_no_value_of_any_field_is_a_fault_of_ours(
    shared: httpx.AsyncClient, field: str, value: Any, chat: bool
) -> None:
    body: Body = {"model": "ada", "max_tokens": 1, **({"messages": HELLO} if chat else {"prompt": "x"})}
    body[field] = (
        [{"role": "user", "content": "x", **value}] if field == "messages" and isinstance(value, dict) else value
    )
    path = "/v1/chat/completions" if chat else "/v1/completions"
    response = await shared.post(path, json=body)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert error_of(response)["message"]


@needs_spec
async def test_answers_keep_the_published_schema(shared: httpx.AsyncClient) -> None:
    asked: Body = {"max_tokens": 4, "logprobs": True, "top_logprobs": 2, "n": 2}
    check("CreateChatCompletionResponse", await chat(shared, **asked))
    check("CreateChatCompletionResponse", await chat(shared, max_tokens=1))
    body = {"model": "ada", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    for chunk in chunks_of(await shared.post("/v1/chat/completions", json=body | asked)):
        check("CreateChatCompletionStreamResponse", chunk)
    check("CreateCompletionResponse", await complete(shared, prompt=["a", "b"], n=2, max_tokens=3, logprobs=2))
