"""Fine-tunes on the wire; the test plays the dispatcher."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.wire.harness import FILE, create_job, error_of, finish, masked, upload
from tunesmith.api.app import CONCURRENT_ADMISSIONS
from tunesmith.core.accounts import Caller
from tunesmith.core.jobs import Claim, FineTuneRequest, Job
from tunesmith.errors import InvalidRequest
from tunesmith.rundir import ProgressLine
from tunesmith.server import Parts

pytestmark = pytest.mark.anyio

CREATED = {
    "object": "fine-tune-event",
    "created_at": "<unix>",
    "level": "info",
    "message": "Created fine-tune: ft-*",
}
JOB = {
    "id": "ft-*",
    "object": "fine-tune",
    "model": "curie",
    "created_at": "<unix>",
    "updated_at": "<unix>",
    "status": "pending",
    "fine_tuned_model": None,
    "organization_id": "org-*",
    "hyperparams": {
        "n_epochs": 4,
        "batch_size": None,
        "prompt_loss_weight": 0.01,
        "learning_rate_multiplier": None,
    },
    "training_files": [FILE],
    "validation_files": [],
    "result_files": [],
}


def claim(parts: Parts) -> Claim:
    claimed = parts.services.jobs.claim("test", 60)
    assert claimed is not None
    return claimed


def start(parts: Parts) -> Claim:
    claimed = claim(parts)
    jobs = parts.services.jobs
    jobs.started(claimed, "handle", jobs.hyperparameters(claimed.job, 8))
    return claimed


async def test_requests_being_checked_leave_threads_for_others(
    client: httpx.AsyncClient, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most, leave, lock = 0, 0, threading.Event(), threading.Lock()

    def create(caller: Caller, request: FineTuneRequest) -> Job:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        assert leave.wait(30)
        with lock:
            inside -= 1
        raise InvalidRequest("seen")

    monkeypatch.setattr(parts.services.jobs, "create", create)
    asked = [
        asyncio.create_task(client.post("/v1/fine-tunes", json={"training_file": "file-x"}))
        for _ in range(2 * CONCURRENT_ADMISSIONS)
    ]
    async with asyncio.timeout(30):
        while inside < CONCURRENT_ADMISSIONS:
            await asyncio.sleep(0.01)
        for _ in range(3):  # each goes to the threads and back
            assert (await client.get("/v1/models")).status_code == 200
        leave.set()
        assert [answer.status_code for answer in await asyncio.gather(*asked)] == [400] * len(asked)
    assert most == CONCURRENT_ADMISSIONS


async def test_create_with_the_least(client: httpx.AsyncClient) -> None:
    file_id = await upload(client)
    response = await client.post("/v1/fine-tunes", json={"training_file": file_id})
    assert response.status_code == 200
    assert masked(response.json()) == {**JOB, "events": [CREATED]}
    assert response.json()["events"][0]["message"] == f"Created fine-tune: {response.json()['id']}"


async def test_create_with_everything(client: httpx.AsyncClient) -> None:
    file_id = await upload(client)
    asked = {
        "training_file": file_id,
        "validation_file": file_id,
        "model": "ada",
        "suffix": "custom model name",
        "n_epochs": 2,
        "batch_size": 3,
        "learning_rate_multiplier": 0.1,
        "prompt_loss_weight": 0,
        "compute_classification_metrics": True,
        "classification_positive_class": " yes",
        "classification_betas": [0.5, 1, 2],
        "use_packing": True,
    }
    job = (await client.post("/v1/fine-tunes", json=asked)).json()
    assert job["model"] == "ada"
    assert masked(job["validation_files"]) == [FILE]
    assert job["hyperparams"] == {
        "n_epochs": 2,
        "batch_size": 3,
        "prompt_loss_weight": 0.0,
        "learning_rate_multiplier": 0.1,
        "compute_classification_metrics": True,
        "classification_n_classes": 2,
        "classification_positive_class": " yes",
        "classification_betas": [0.5, 1.0, 2.0],
    }


async def test_nulls_are_defaults(client: httpx.AsyncClient) -> None:
    names = ["validation_file", "model", "suffix", "n_epochs", "batch_size", "learning_rate_multiplier", "use_packing"]
    names += ["prompt_loss_weight", "compute_classification_metrics", "classification_n_classes", "hyperparameters"]
    names += ["classification_positive_class", "classification_betas"]
    body = {"training_file": await upload(client), **dict.fromkeys(names)}
    assert masked((await client.post("/v1/fine-tunes", json=body)).json()) == {**JOB, "events": [CREATED]}


@pytest.mark.parametrize(("epochs", "shown"), [(2, 2), ("auto", 4), (None, 4)])
async def test_epochs_as_late_2023_nests_them(client: httpx.AsyncClient, epochs: Any, shown: int) -> None:
    body = {"training_file": await upload(client), "hyperparameters": {"n_epochs": epochs}}
    job = (await client.post("/v1/fine-tunes", json=body)).json()
    assert job["hyperparams"]["n_epochs"] == shown


async def test_list_is_oldest_first_and_without_events(client: httpx.AsyncClient) -> None:
    ids = [await create_job(client, model="curie") for _ in range(3)]
    body = (await client.get("/v1/fine-tunes")).json()
    assert [job["id"] for job in body["data"]] == ids
    assert [masked(job) for job in body["data"]] == [JOB] * 3
    assert body["object"] == "list"


async def test_a_running_job_shows_what_it_trains_with(client: httpx.AsyncClient, parts: Parts) -> None:
    job_id = await create_job(client, model="curie")
    start(parts)
    job = (await client.get(f"/v1/fine-tunes/{job_id}")).json()
    assert job["status"] == "running"
    assert job["hyperparams"] == {
        "n_epochs": 4,
        "batch_size": 1,
        "prompt_loss_weight": 0.01,
        "learning_rate_multiplier": 0.1,
    }
    assert [event["message"] for event in job["events"]][-1] == "Fine-tune started"


async def test_a_succeeded_job(client: httpx.AsyncClient, parts: Parts, tmp_path: Path) -> None:
    job_id = await create_job(client, suffix="My Model!")
    claimed = start(parts)
    finish(parts, claimed, tmp_path)
    job = (await client.get(f"/v1/fine-tunes/{job_id}")).json()
    assert job["status"] == "succeeded"
    (result,) = job["result_files"]
    assert (result["purpose"], result["filename"]) == ("fine-tune-results", "compiled_results.csv")
    content = await client.get(f"/v1/files/{result['id']}/content")
    assert content.text == "step\n1\n"
    name = job["fine_tuned_model"]
    assert name.startswith("ada:ft-personal:my-model-")
    model = (await client.get(f"/v1/models/{name.replace(':', '%3A')}")).json()
    assert (model["id"], model["root"], model["parent"]) == (name, "ada", "ada")
    assert model["permission"][0]["organization"] == job["organization_id"]
    answer = await client.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 1})
    assert answer.json()["model"] == name
    messages = [event["message"] for event in job["events"]]
    assert messages[-3:] == [f"Uploaded model: {name}", f"Uploaded result file: {result['id']}", "Fine-tune succeeded"]


async def test_only_an_owner_deletes_a_model(
    client: httpx.AsyncClient,
    member: httpx.AsyncClient,
    stranger: httpx.AsyncClient,
    parts: Parts,
    tmp_path: Path,
) -> None:
    job_id = await create_job(client)
    finish(parts, start(parts), tmp_path)
    name = (await client.get(f"/v1/fine-tunes/{job_id}")).json()["fine_tuned_model"]
    assert (await stranger.get(f"/v1/models/{name}")).status_code == 404
    assert (await stranger.delete(f"/v1/models/{name}")).status_code == 404
    refused = await member.delete(f"/v1/models/{name}")
    assert refused.status_code == 403
    assert "owner" in error_of(refused)["message"]
    assert (await client.delete(f"/v1/models/{name}")).json() == {"id": name, "object": "model", "deleted": True}
    gone = await client.post("/v1/completions", json={"model": name, "prompt": "x"})
    assert gone.status_code == 404
    assert error_of(gone)["code"] == "model_not_found"
    assert name not in (await client.get("/v1/models")).text
    assert (await client.get(f"/v1/fine-tunes/{job_id}")).json()["fine_tuned_model"] == name


@pytest.mark.parametrize(
    "headers", [{}, {"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": "application/json"}]
)
async def test_cancel_reads_no_body(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    job_id = await create_job(client)
    response = await client.post(f"/v1/fine-tunes/{job_id}/cancel", headers=headers)
    assert response.status_code == 200
    assert response.json()["status"] == "cancelled"
    assert response.json()["events"][-1]["message"] == "Fine-tune cancelled"
    again = await client.post(f"/v1/fine-tunes/{job_id}/cancel")
    assert again.status_code == 400
    assert job_id in error_of(again)["message"]


async def test_events(client: httpx.AsyncClient, parts: Parts) -> None:
    job_id = await create_job(client)
    parts.services.jobs.enqueue()
    for path in ("events", "events?stream=false"):
        body = (await client.get(f"/v1/fine-tunes/{job_id}/{path}")).json()
        assert [event["message"] for event in body["data"]] == [
            f"Created fine-tune: {job_id}",
            "Fine-tune costs $0.00",
            "Fine-tune enqueued. Queue number: 0",
        ]
        assert {tuple(event) for event in body["data"]} == {("object", "created_at", "level", "message")}


async def test_events_with_the_numbers_of_steps(client: httpx.AsyncClient, parts: Parts) -> None:
    job_id = await create_job(client)
    claimed = claim(parts)
    step = {"step": 1, "training_loss": 0.5}
    parts.services.jobs.record(claimed, [ProgressLine(1, "info", "Step 1/9: training loss=0.50", step, "metrics")])
    await client.post(f"/v1/fine-tunes/{job_id}/cancel")

    messages = (await client.get(f"/v1/fine-tunes/{job_id}/events")).json()["data"]
    whole = (await client.get(f"/v1/fine-tunes/{job_id}/events?metrics=true")).json()["data"]
    (told,) = (event for event in whole if event["type"] == "metrics")
    assert (told["message"], told["data"]) == ("Step 1/9: training loss=0.50", step)
    assert [event["message"] for event in whole if event["type"] == "message"] == [one["message"] for one in messages]

    streamed = await client.get(f"/v1/fine-tunes/{job_id}/events?metrics=true&stream=true")
    lines = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert [json.loads(line) for line in lines] == whole


async def test_stream_of_an_ended_job(client: httpx.AsyncClient) -> None:
    job_id = await create_job(client)
    await client.post(f"/v1/fine-tunes/{job_id}/cancel")
    response = await client.get(f"/v1/fine-tunes/{job_id}/events?stream=true")
    assert response.headers["content-type"] == "text/event-stream"
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    listed = (await client.get(f"/v1/fine-tunes/{job_id}/events")).json()["data"]
    sent = [block.split("\n") for block in blocks[:-2]]
    assert [lines[0] for lines in sent] == [f"id: {n}" for n in range(1, len(listed) + 1)]
    assert [json.loads(lines[1].removeprefix("data: ")) for lines in sent] == listed
    rest = await client.get(f"/v1/fine-tunes/{job_id}/events?stream=true", headers={"Last-Event-ID": "1"})
    assert rest.text == "\n\n".join(blocks[1:])


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("POST", "/cancel"), ("GET", "/events"), ("GET", "/events?stream=true")]
)
async def test_unknown_job(client: httpx.AsyncClient, stranger: httpx.AsyncClient, method: str, path: str) -> None:
    job_id = await create_job(client)
    for response in [
        await stranger.request(method, f"/v1/fine-tunes/{job_id}{path}"),
        await client.request(method, f"/v1/fine-tunes/ft-nope{path}"),
    ]:
        assert response.status_code == 404
        assert error_of(response)["param"] == "id"


async def test_a_question_that_is_none(client: httpx.AsyncClient) -> None:
    job_id = await create_job(client)
    response = await client.get(f"/v1/fine-tunes/{job_id}/events?stream=maybe")
    assert response.status_code == 400
    assert error_of(response)["param"] == "stream"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"training_file": None}, 400, "training_file"),
        ({"training_file": "file-nope"}, 400, "training_file"),
        ({"validation_file": "file-nope"}, 400, "validation_file"),
        ({"model": "nope"}, 404, "model"),
        ({"suffix": "x" * 41}, 400, "suffix"),
        ({"suffix": 5}, 400, "suffix"),
        ({"n_epochs": 0}, 400, "n_epochs"),
        ({"n_epochs": "auto"}, 400, "n_epochs"),
        ({"hyperparameters": {"n_epochs": "many"}}, 400, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 1}}, 400, "hyperparameters.batch_size"),
        ({"batch_size": 0.5}, 400, "batch_size"),
        ({"learning_rate_multiplier": "high"}, 400, "learning_rate_multiplier"),
        ({"prompt_loss_weight": 2}, 400, "prompt_loss_weight"),
        ({"compute_classification_metrics": True}, 400, "validation_file"),
        ({"classification_n_classes": 2}, 400, "classification_n_classes"),
        ({"classification_betas": ["1"]}, 400, "classification_betas"),
        ({"frobnicate": 1}, 400, "frobnicate"),
    ],
)
async def test_refused(client: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str) -> None:
    body = {"training_file": await upload(client), "model": "ada", **fields}
    response = await client.post("/v1/fine-tunes", json=body)
    assert response.status_code == status
    error = error_of(response)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert (await client.get("/v1/fine-tunes")).json()["data"] == []


async def test_training_file_of_another_organisation(client: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    response = await stranger.post("/v1/fine-tunes", json={"training_file": await upload(client)})
    assert response.status_code == 400
    assert error_of(response)["param"] == "training_file"
