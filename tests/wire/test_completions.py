"""Completions on the wire, answered by the scripted engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.wire.harness import error_of, ids_of, masked
from tunesmith.server import Parts

pytestmark = pytest.mark.anyio

Body = dict[str, Any]


async def complete(client: httpx.AsyncClient, **body: Any) -> Body:
    response = await client.post("/v1/completions", json={"model": "ada", **body})
    assert response.status_code == 200, response.text
    answer: Body = response.json()
    return answer


def chunks_of(response: httpx.Response) -> list[Body]:
    """The objects of a stream that ends as it must."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["connection"] == "close"
    messages = response.text.split("\n\n")
    assert messages[-2:] == ["data: [DONE]", ""]
    return [json.loads(message.removeprefix("data: ")) for message in messages[:-2] if not message.startswith(":")]


async def test_answer(shared: httpx.AsyncClient) -> None:
    body = await complete(shared, prompt="Say this is a test", max_tokens=3, seed=1)
    (choice,) = body.pop("choices")
    assert masked(body) == {
        "id": "cmpl-*",
        "object": "text_completion",
        "created": "<unix>",
        "model": "ada",
        "usage": {
            "prompt_tokens": body["usage"]["prompt_tokens"],
            "completion_tokens": 3,
            "total_tokens": body["usage"]["prompt_tokens"] + 3,
        },
    }
    assert choice == {"text": choice["text"], "index": 0, "logprobs": None, "finish_reason": "length"}
    assert isinstance(choice["text"], str)


async def test_nulls_are_defaults(shared: httpx.AsyncClient) -> None:
    names = ["n", "max_tokens", "logprobs", "temperature", "top_p", "stop", "stream", "echo", "best_of", "suffix"]
    names += ["presence_penalty", "frequency_penalty", "logit_bias", "user", "stream_options"]
    body = await complete(shared, prompt="Hello", seed=3, **dict.fromkeys(names))
    plain = await complete(shared, prompt="Hello", seed=3)
    assert body["choices"] == plain["choices"]
    assert body["usage"]["completion_tokens"] == 16
    assert (await complete(shared, prompt=None, max_tokens=1, seed=1))["usage"]["prompt_tokens"] == 1
    assert (await complete(shared, max_tokens=1, seed=1))["usage"]["prompt_tokens"] == 1


async def test_forms_of_prompt(shared: httpx.AsyncClient, tiny_base: Path) -> None:
    ids = list(ids_of(tiny_base, "Hello there"))
    other = list(ids_of(tiny_base, "Bye"))

    async def texts(prompt: Any) -> list[str]:
        body = await complete(shared, prompt=prompt, temperature=0, max_tokens=5)
        assert [choice["index"] for choice in body["choices"]] == list(range(len(body["choices"])))
        return [choice["text"] for choice in body["choices"]]

    (hello,) = await texts("Hello there")
    (bye,) = await texts("Bye")
    assert hello != bye
    assert await texts(["Hello there"]) == [hello]
    assert await texts(ids) == [hello]
    assert await texts([ids]) == [hello]
    assert await texts(["Hello there", "Bye"]) == [hello, bye]
    assert await texts([other, ids]) == [bye, hello]


async def test_engine_in_the_path(shared: httpx.AsyncClient) -> None:
    body = {"prompt": "Hello", "temperature": 0}
    plain = await complete(shared, **body)
    for engine, more in [("ada", {}), ("ada", {"model": "ada"}), ("ada", {"model": None}), ("%61da", {})]:
        response = await shared.post(f"/v1/engines/{engine}/completions", json=body | more)
        assert response.status_code == 200
        assert response.json()["choices"] == plain["choices"]
        assert response.json()["model"] == "ada"
    response = await shared.post("/v1/engines/ada/completions", json={**body, "model": "curie"})
    assert response.status_code == 400
    assert error_of(response)["param"] == "model"


async def test_n_best_of_and_order(shared: httpx.AsyncClient) -> None:
    body = await complete(shared, prompt=["a", "b"], n=2, best_of=3, max_tokens=4, seed=5, logprobs=0)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["completion_tokens"] >= 4 * 3
    means = [sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["token_logprobs"]) for c in body["choices"]]
    assert means[0] >= means[1]
    assert means[2] >= means[3]


async def test_logprobs_and_echo(shared: httpx.AsyncClient) -> None:
    prompt = "Hällo wörld"
    body = await complete(shared, prompt=prompt, max_tokens=3, temperature=0, logprobs=2)
    table = body["choices"][0]["logprobs"]
    assert table.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert table["text_offset"][0] == len(prompt)
    assert all(2 <= len(top) <= 3 for top in table["top_logprobs"])
    echoed = (await complete(shared, prompt=prompt, max_tokens=3, temperature=0, logprobs=2, echo=True))["choices"][0]
    assert echoed["text"] == prompt + body["choices"][0]["text"]
    assert echoed["logprobs"]["text_offset"][0] == 0
    assert echoed["logprobs"]["token_logprobs"][0] is None
    assert echoed["logprobs"]["top_logprobs"][0] is None
    scored = (await complete(shared, prompt=prompt, max_tokens=0, logprobs=0, echo=True))["choices"][0]
    assert scored["text"] == prompt


async def test_stream_adds_up_to_the_plain_answer(shared: httpx.AsyncClient) -> None:
    asked = {"model": "ada", "prompt": ["Hello", "Bye"], "max_tokens": 6, "seed": 7, "logprobs": 1, "n": 2}
    plain = (await shared.post("/v1/completions", json=asked)).json()
    chunks = chunks_of(await shared.post("/v1/completions", json={**asked, "stream": True}))
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    for choice in plain["choices"]:
        pieces = [piece for chunk in chunks for piece in chunk["choices"] if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
        offsets = [offset for piece in pieces if piece["logprobs"] for offset in piece["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]


async def test_usage_of_a_stream(shared: httpx.AsyncClient) -> None:
    asked = {
        "model": "ada",
        "prompt": "Hello",
        "max_tokens": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    chunks = chunks_of(await shared.post("/v1/completions", json=asked))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"model": ""}, "model", "must provide"),
        ({"model": 7}, "model", "a string"),
        ({"frobnicate": 1}, "frobnicate", "Unrecognized request argument supplied: frobnicate"),
        ({"frobnicate": None}, "frobnicate", "Unrecognized request argument supplied: frobnicate"),
        ({"suffix": "the end"}, "suffix", "suffix"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "one or more"),
        ({"prompt": ["a", 1]}, "prompt", "prompt"),
        ({"prompt": [True]}, "prompt", "integers"),
        ({"prompt": [-1]}, "prompt", "integers"),
        ({"prompt": [99_999]}, "prompt", "99999"),
        ({"prompt": {"text": "x"}}, "prompt", "prompt"),
        ({"prompt": ["x"] * 2049}, "prompt", "2049"),
        ({"max_tokens": -1}, "max_tokens", "-1"),
        ({"max_tokens": 1.5}, "max_tokens", "an integer"),
        ({"max_tokens": "16"}, "max_tokens", "an integer"),
        ({"max_tokens": True}, "max_tokens", "an integer"),
        ({"max_tokens": int("9" * 4300)}, "max_tokens", "at most 63 bits and a sign; it is an integer of 14285 bits"),
        ({"n": 2**63}, "n", "64 bits"),
        ({"prompt": "word " * 200_000}, None, "maximum context length is 2049 tokens, however you requested at least"),
        ({"max_tokens": 3000}, None, "maximum context length is 2049 tokens"),
        ({"temperature": 2.1}, "temperature", "2.1"),
        ({"temperature": -0.1}, "temperature", "-0.1"),
        ({"temperature": 10**400}, "temperature", "a number"),
        ({"top_p": 1.1}, "top_p", "1.1"),
        ({"n": 0}, "n", "0"),
        ({"n": 129}, "n", "129"),
        ({"best_of": 21}, "best_of", "21"),
        ({"prompt": ["a"] * 1025, "n": 2}, "prompt", "2050 sequences"),
        ({"prompt": ["a"] * 2, "n": 128, "max_tokens": 1025}, "max_tokens", "262400 tokens"),
        ({"n": 3, "best_of": 2}, "best_of", "best_of"),
        ({"best_of": 2, "stream": True}, "best_of", "stream"),
        ({"logprobs": 6}, "logprobs", "6"),
        ({"logprobs": -1}, "logprobs", "-1"),
        ({"stop": ""}, "stop", "stop"),
        ({"stop": ["a"] * 5}, "stop", "5"),
        ({"stop": [1]}, "stop", "strings"),
        ({"presence_penalty": 2.5}, "presence_penalty", "2.5"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "-2.5"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"05": 1, "5": 2}}, "logit_bias", "'05' is none"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "101"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ({"logit_bias": [1]}, "logit_bias", "an object"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias", "not 1025"),
        ({"echo": "yes"}, "echo", "true or false"),
        ({"stream": 1}, "stream", "true or false"),
        ({"seed": 2**63}, "seed", "at most 63 bits and a sign; it is an integer of 64 bits"),
        ({"seed": -(2**63)}, "seed", "at most 63 bits and a sign; it is an integer of 64 bits"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unrecognized"),
        ({"user": 5}, "user", "a string"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refused(shared: httpx.AsyncClient, body: Body, param: str | None, told: str, stream: bool) -> None:
    if stream and "stream_options" not in body:
        body = {"stream": True, **body}
    response = await shared.post("/v1/completions", json={"model": "ada", "prompt": "Hello", **body})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["code"] is None
    assert told in error["message"]


async def test_unknown_model(shared: httpx.AsyncClient) -> None:
    for path, body in [("/v1/completions", {"model": "nope"}), ("/v1/engines/nope/completions", {})]:
        for stream in (False, True):
            response = await shared.post(path, json={"prompt": "x", "stream": stream, **body})
            assert response.status_code == 404
            error = error_of(response)
            assert error["code"] == "model_not_found"
            assert "`nope` does not exist" in error["message"]


async def test_a_dead_engine_is_told_before_the_first_token(client: httpx.AsyncClient, parts: Parts) -> None:
    await parts.engine.close()
    for stream in (False, True):
        response = await client.post("/v1/completions", json={"model": "ada", "prompt": "x", "stream": stream})
        assert response.status_code == 429
        assert error_of(response)["type"] == "server_error"
        assert response.headers["x-should-retry"] == "true"
        assert 1 <= int(response.headers["retry-after"]) <= 60
