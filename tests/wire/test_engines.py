"""Engines on the wire: models under their old name, and the completions of 2020."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.wire.harness import create_job, error_of, finish, masked
from tests.wire.test_completions import chunks_of
from tunesmith.server import Parts

pytestmark = pytest.mark.anyio

ENGINE = {"id": "ada", "object": "engine", "ready": True, "created": None, "permissions": None}
GENERATE = "/v1/engines/ada/generate"


async def generate(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post(GENERATE, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_engines_are_the_models(shared: httpx.AsyncClient) -> None:
    body = (await shared.get("/v1/engines")).json()
    assert [engine["id"] for engine in body["data"]] == ["ada", "babbage", "curie", "davinci"]
    assert body["data"][0] == ENGINE | {"owner": body["data"][0]["owner"]}
    engine = (await shared.get("/v1/engines/ada")).json()
    assert engine.items() >= body["data"][0].items()


async def test_one_replica_is_loaded_when_it_is_asked_for(client: httpx.AsyncClient) -> None:
    unloaded = (await client.get("/v1/engines/ada")).json()
    assert unloaded == ENGINE | {"owner": unloaded["owner"], "replicas": 1, "ready_replicas": 0, "max_replicas": 1}
    for nothing in ({}, {"replicas": None}):
        assert (await client.post("/v1/engines/ada", json=nothing)).json() == unloaded
    loaded = await client.post("/v1/engines/ada", json={"replicas": 1})
    assert loaded.json() == unloaded | {"ready_replicas": 1}
    assert (await client.get("/v1/models/ada")).json()["state"] == "resident"


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "told"),
    [
        ("ada", {"replicas": 2}, 400, "replicas", "must be 1 here; it is 2"),
        ("ada", {"replicas": 0}, 400, "replicas", "must be 1 here; it is 0"),
        ("ada", {"replicas": "one"}, 400, "replicas", "must be an integer"),
        ("ada", {"size": 1}, 400, "size", "Unrecognized request argument supplied: size"),
        ("nope", {"replicas": 1}, 404, "model", "`nope` does not exist"),
        ("ada/generate", {"length": -1}, 400, "length", "'length' must be at least 0; -1 was given"),
        ("ada/generate", {"length": "x"}, 400, "length", "'length' must be an integer"),
        ("ada/generate", {"completions": 0}, 400, "completions", "'completions' must be at least 1"),
        ("ada/generate", {"completions": 4, "length": 100_000}, 400, "length", "100000); at most"),
        ("ada/generate", {"completions": 3, "best_of": 2}, 400, "best_of", "set 'completions' (currently 3)"),
        ("ada/generate", {"best_of": 2, "stream": True}, 400, "best_of", "cannot be streamed"),
        ("ada/generate", {"context": ["a"]}, 400, "context", "'context' must be a string"),
        ("ada/generate", {"context": "x", "length": 9999}, 400, None, "This model's maximum context length is"),
        ("ada/generate", {"logprobs": 6}, 400, "logprobs", "at most 5"),
        ("ada/generate", {"temperature": 3}, 400, "temperature", "between 0 and 2"),
        ("ada/generate", {"stop": list("abcde")}, 400, "stop", "at most 4 sequences"),
        ("ada/generate", {"prompt": "x"}, 400, "prompt", "Unrecognized request argument supplied: prompt"),
        ("ada/generate", {"model": "curie"}, 400, "model", "'curie', which runs on engine 'curie'"),
        ("ada/generate", {"model": "nope"}, 404, "model", "`nope` does not exist"),
        ("nope/generate", {}, 404, "model", "`nope` does not exist"),
    ],
    ids=str,
)
async def test_errors_name_the_field_as_it_was_sent(
    shared: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, param: str | None, told: str
) -> None:
    response = await shared.post(f"/v1/engines/{path}", json=body)
    assert response.status_code == status
    error = error_of(response)
    assert error["param"] == param
    assert told in error["message"]
    assert "max_tokens" not in error["message"]


async def test_generate_is_the_completion_with_its_context(shared: httpx.AsyncClient) -> None:
    context = "Say this is a test: é"
    asked = {"temperature": 0.7, "seed": 5, "stop": ["zzz"]}
    body = await generate(shared, context=context, length=6, completions=2, **asked)
    plain = await shared.post(
        "/v1/completions", json={"model": "ada", "prompt": context, "max_tokens": 6, "n": 2, "logprobs": 0, **asked}
    )
    data = body.pop("data")
    assert masked(body) == {
        "id": "cmpl-*",
        "object": "text_completion",
        "created": "<unix>",
        "model": "ada",
        "usage": plain.json()["usage"],
    }
    for item, choice in zip(data, plain.json()["choices"], strict=True):
        assert "".join(item["text"]) == context + choice["text"]
        assert item["text"][0] == context
        assert item == {
            "text": item["text"],
            "index": choice["index"],
            "text_offset": [0, *choice["logprobs"]["text_offset"]],
            "token_logprobs": None,
            "top_logprobs": None,
            "finish_reason": choice["finish_reason"],
        }


async def test_log_probabilities_run_parallel_to_the_texts(shared: httpx.AsyncClient) -> None:
    asked = {"temperature": 0, "logprobs": 2}
    (item,) = (await generate(shared, context="Once upon", length=4, **asked))["data"]
    body = {"model": "ada", "prompt": "Once upon", "max_tokens": 4, "echo": True, **asked}
    (choice,) = (await shared.post("/v1/completions", json=body)).json()["choices"]
    assert "".join(item["text"]) == choice["text"]
    for name in ("text_offset", "token_logprobs", "top_logprobs"):
        assert item[name] == choice["logprobs"][name]
        assert len(item[name]) == len(item["text"])
    assert item["text"] == choice["logprobs"]["tokens"]


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("completions", [1, 3])
async def test_a_stream_comes_to_the_plain_answer(
    shared: httpx.AsyncClient, completions: int, logprobs: int | None
) -> None:
    asked = {"context": "Hello", "length": 12, "completions": completions, "seed": 3, "logprobs": logprobs}
    # Stops that the text often begins and seldom has: ends of tokens are held back.
    plain = await generate(shared, **asked, stop=["e ", "th", "qq"])
    joined: dict[int, dict[str, Any]] = {}
    for chunk in chunks_of(await shared.post(GENERATE, json={**asked, "stop": ["e ", "th", "qq"], "stream": True})):
        (item,) = chunk["data"]
        one = joined.setdefault(item["index"], {"text": "", "rows": []})
        assert len(item["text"]) == len(item["text_offset"])
        for text, offset in zip(item["text"], item["text_offset"], strict=True):
            assert offset == len(one["text"])
            one["text"] += text
        one["rows"] += [value for value in item["token_logprobs"] or [] if value is not None]
        one["finish_reason"] = item["finish_reason"]
    for item in plain["data"]:
        one = joined[item["index"]]
        assert one["text"] == "".join(item["text"])
        assert one["rows"] == [value for value in item["token_logprobs"] or [] if value is not None]
        assert one["finish_reason"] == item["finish_reason"]


async def test_the_start_of_a_document(shared: httpx.AsyncClient) -> None:
    nulls = dict.fromkeys(["context", "length", "completions", "logprobs", "stop", "stream", "model", "top_p"])
    body = await generate(shared, **nulls, seed=3)
    assert body["data"] == (await generate(shared, context="", seed=3))["data"]
    assert body["usage"]["completion_tokens"] == 16


async def test_a_tuned_model_answers_on_the_engine_it_was_tuned_from(
    parts: Parts, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    job_id = await create_job(client)
    claim = parts.services.jobs.claim("test", 60)
    assert claim is not None
    parts.services.jobs.started(claim, "handle", parts.services.jobs.hyperparameters(claim.job, 8))
    finish(parts, claim, tmp_path)
    name = (await client.get(f"/v1/fine-tunes/{job_id}")).json()["fine_tuned_model"]
    assert (await generate(client, context="x", model=name, length=1))["model"] == name
    (itself,) = {(await client.post(f"/v1/engines/{name}/generate", json={"length": 1})).json()["model"]}
    assert itself == name
    refused = await client.post("/v1/engines/curie/generate", json={"model": name})
    assert error_of(refused)["param"] == "model"
