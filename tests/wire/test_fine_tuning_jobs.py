"""`/v1/fine_tuning/jobs`: jobs asked for and shown as since late 2023, and the same jobs under `/v1/fine-tunes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.wire.harness import ROWS, error_of, finish, upload
from tests.wire.published import check, needs_spec
from tunesmith.core.jobs import Claim
from tunesmith.rundir import ProgressLine, Snapshot
from tunesmith.server import Parts

pytestmark = pytest.mark.anyio


async def create(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    files = {"file": ("train.jsonl", ROWS)}
    file_id = (await client.post("/v1/files", data={"purpose": "fine-tune"}, files=files)).json()["id"]
    answer = await client.post("/v1/fine-tunes", json={"training_file": file_id, "model": "ada", **fields})
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


async def test_a_job_in_both_shapes(client: httpx.AsyncClient) -> None:
    legacy = await create(client, n_epochs=2)
    modern = (await client.get(f"/v1/fine_tuning/jobs/{legacy['id']}")).json()
    assert modern == {
        "id": legacy["id"],
        "object": "fine_tuning.job",
        "created_at": legacy["created_at"],
        "finished_at": None,
        "estimated_finish": None,
        "model": "ada",
        "fine_tuned_model": None,
        "organization_id": legacy["organization_id"],
        "status": "queued",
        "hyperparameters": {
            "n_epochs": 2,
            "batch_size": "auto",
            "prompt_loss_weight": 0.01,
            "learning_rate_multiplier": "auto",
        },
        "method": {"type": "supervised", "supervised": {"hyperparameters": modern["hyperparameters"]}},
        "training_file": legacy["training_files"][0]["id"],
        "validation_file": None,
        "result_files": [],
        "trained_tokens": None,
        "seed": 0,
        "error": None,
        "integrations": [],
        "user_provided_suffix": None,
        "metadata": None,
    }


async def test_lists_are_newest_first_and_come_in_pages(client: httpx.AsyncClient) -> None:
    ids = [(await create(client))["id"] for _ in range(3)]
    first = (await client.get("/v1/fine_tuning/jobs", params={"limit": 2})).json()
    assert ([job["id"] for job in first["data"]], first["has_more"]) == ([ids[2], ids[1]], True)
    rest = (await client.get("/v1/fine_tuning/jobs", params={"limit": 2, "after": ids[1]})).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == ([ids[0]], False)


async def test_an_unknown_job(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/fine_tuning/jobs/ftjob-none")
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "id"


async def test_integrations_and_alias_are_shown_where_they_were_asked(client: httpx.AsyncClient) -> None:
    plain = await create(client)
    assert not {"integrations", "alias"} & plain.keys()
    wandb = {"type": "wandb", "wandb": {"project": "p", "name": None, "entity": "team", "tags": []}}
    job = await create(
        client, integrations=[{"type": "wandb", "wandb": {"project": "p", "entity": "team"}}], alias="old"
    )
    assert (job["integrations"], job["alias"]) == ([wandb], "old")
    listed = (await client.get("/v1/models/old")).json()
    assert listed["alias"] == {"fine_tune": job["id"], "status": "pending", "model": None}
    assert (await client.get("/v1/engines/old")).json()["ready"] is False
    refused = await client.post("/v1/completions", json={"model": "old", "prompt": "x"})
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "model_not_found"
    assert job["id"] in refused.json()["error"]["message"]


JOBS = "/v1/fine_tuning/jobs"


async def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post(JOBS, json={"training_file": await upload(client), "model": "ada", **fields})


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


async def test_a_job_is_asked_for_as_the_clients_of_today_do(client: httpx.AsyncClient) -> None:
    answer = await ask(
        client,
        suffix="x" * 64,
        seed=7,
        metadata={"team": "blue"},
        method=supervised(n_epochs=2, batch_size="auto", learning_rate_multiplier=0.5),
    )
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert job["id"].startswith("ftjob-")
    assert (job["status"], job["seed"], job["metadata"]) == ("queued", 7, {"team": "blue"})
    assert job["user_provided_suffix"] == "x" * 64
    assert (
        job["hyperparameters"].items()
        >= {
            "n_epochs": 2,
            "batch_size": "auto",
            "learning_rate_multiplier": 0.5,
        }.items()
    )
    legacy = (await client.get(f"/v1/fine-tunes/{job['id']}")).json()
    assert (legacy["object"], legacy["hyperparams"]["n_epochs"]) == ("fine-tune", 2)


async def test_hyperparameters_are_also_read_where_they_were_in_2023(client: httpx.AsyncClient) -> None:
    old = {"n_epochs": 3, "batch_size": 4}
    job = (await ask(client, hyperparameters=old)).json()
    assert job["hyperparameters"].items() >= old.items()
    both = (await ask(client, hyperparameters=old, method=supervised(n_epochs=1))).json()
    assert both["hyperparameters"].items() >= {"n_epochs": 1, "batch_size": 4}.items()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"training_file": "file-none"}, "training_file"),
        ({"method": {"type": "dpo", "dpo": {}}}, "method.type"),
        ({"method": supervised(n_epochs="many")}, "method.supervised.hyperparameters.n_epochs"),
        ({"method": supervised(n_epochs=0)}, "n_epochs"),
        ({"method": supervised(beta=1)}, "method.supervised.hyperparameters.beta"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"n_epochs": 1}, "n_epochs"),
    ],
    ids=str,
)
async def test_what_is_wrong_is_named(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    answer = await ask(client, **fields)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param
    assert (await client.get(JOBS)).json()["data"] == []


async def test_lists_by_metadata(client: httpx.AsyncClient) -> None:
    blue, red = [(await ask(client, metadata={"team": team, "x": "1"})).json()["id"] for team in ("blue", "red")]
    await ask(client)

    async def found(**query: str) -> list[str]:
        return [job["id"] for job in (await client.get(JOBS, params=query)).json()["data"]]

    assert await found(**{"metadata[team]": "blue"}) == [blue]
    assert await found(**{"metadata[x]": "1"}) == [red, blue]
    assert await found(**{"metadata[team]": "blue", "metadata[x]": "2"}) == []
    assert len(await found()) == 3


async def test_rest_and_end(client: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    job_id = (await ask(client)).json()["id"]
    for verb in ("cancel", "pause", "resume"):
        assert (await stranger.post(f"{JOBS}/{job_id}/{verb}")).status_code == 404
    assert (await client.post(f"{JOBS}/{job_id}/pause")).json()["status"] == "queued"
    assert (await client.get(f"/v1/fine-tunes/{job_id}")).json()["paused"] is True
    assert (await client.post(f"{JOBS}/{job_id}/resume")).json()["status"] == "queued"
    cancelled = (await client.post(f"{JOBS}/{job_id}/cancel")).json()
    assert (cancelled["status"], cancelled["finished_at"] is not None) == ("cancelled", True)
    assert (await client.post(f"{JOBS}/{job_id}/cancel")).status_code == 400
    told = [event["message"] for event in (await client.get(f"{JOBS}/{job_id}/events")).json()["data"]]
    assert told[:3] == ["The job has been cancelled", "The job has been resumed", "The job has been paused"]
    assert told[-1] == f"Created fine-tuning job: {job_id}"


def start(parts: Parts) -> Claim:
    jobs = parts.services.jobs
    jobs.enqueue()
    claimed = jobs.claim("test", 60)
    assert claimed is not None
    jobs.started(claimed, "handle", jobs.hyperparameters(claimed.job, 8))
    return claimed


async def test_events_are_newest_first_and_have_numbers(
    client: httpx.AsyncClient, parts: Parts, tmp_path: Path
) -> None:
    job_id = (await ask(client)).json()["id"]
    claim = start(parts)
    data = {"step": 1, "training_loss": 0.5}
    parts.services.jobs.record(claim, [ProgressLine(1, "info", "Step 1/2: training loss=0.50", data, "metrics")])
    finish(parts, claim, tmp_path)
    job = (await client.get(f"{JOBS}/{job_id}")).json()
    assert (job["status"], job["trained_tokens"], len(job["result_files"])) == ("succeeded", 1, 1)

    pages, query = [], {"limit": "3"}
    while True:
        page = (await client.get(f"{JOBS}/{job_id}/events", params=query)).json()
        pages.append(page["data"])
        if not page["has_more"]:
            break
        query["after"] = page["data"][-1]["id"]
    events = [event for page in pages for event in page]
    assert [len(page) for page in pages[:-1]] == [3] * (len(pages) - 1)
    assert len({event["id"] for event in events}) == len(events)
    assert all(event["id"].startswith("ftevent-") for event in events)
    messages = [event["message"] for event in reversed(events)]
    assert messages == [
        f"Created fine-tuning job: {job_id}",
        "The job costs $0.00",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 1/2: training loss=0.50",
        f"New fine-tuned model created: {job['fine_tuned_model']}",
        f"Uploaded result file: {job['result_files'][0]}",
        "The job has successfully completed",
    ]
    (step,) = [event for event in events if event["type"] == "metrics"]
    assert step["data"] == data
    assert {event["object"] for event in events} == {"fine_tuning.job.event"}


async def test_checkpoints(client: httpx.AsyncClient, parts: Parts, tmp_path: Path) -> None:
    job_id = (await ask(client)).json()["id"]
    claim = start(parts)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "results.csv").write_text("step\n1\n")
    snapshots = [(Snapshot(step, {"training_loss": 1 / step, "full_validation_loss": 2.0}), folder) for step in (2, 4)]
    ended = parts.services.jobs.succeed(
        claim, adapter_dir=folder, results_csv=tmp_path / "results.csv", trained_tokens=9, snapshots=snapshots
    )
    listed = (await client.get(f"{JOBS}/{job_id}/checkpoints")).json()
    assert [one["step_number"] for one in listed["data"]] == [4, 2]
    assert listed["has_more"] is False
    assert listed["data"][0] == {
        "id": listed["first_id"],
        "object": "fine_tuning.job.checkpoint",
        "created_at": ended.finished_unix,
        "fine_tuned_model_checkpoint": f"{ended.fine_tuned_model}:ckpt-step-4",
        "fine_tuning_job_id": job_id,
        "step_number": 4,
        "metrics": {"step": 4, "train_loss": 0.25, "full_valid_loss": 2.0},
    }


@needs_spec
async def test_answers_keep_the_published_schema(client: httpx.AsyncClient, parts: Parts, tmp_path: Path) -> None:
    job = (await ask(client, metadata={"a": "b"}, suffix="x")).json()
    check("FineTuningJob", job)
    claim = start(parts)
    parts.services.jobs.record(claim, [ProgressLine(1, "info", "Step 1/1: training loss=0.50", {"step": 1}, "metrics")])
    check("FineTuningJob", (await client.get(f"{JOBS}/{job['id']}")).json())
    finish(parts, claim, tmp_path)
    check("FineTuningJob", (await client.get(f"{JOBS}/{job['id']}")).json())
    await ask(client)
    parts.services.jobs.fail(start(parts), "It could not be.")
    check("ListPaginatedFineTuningJobsResponse", (await client.get(JOBS)).json())
    check("ListFineTuningJobEventsResponse", (await client.get(f"{JOBS}/{job['id']}/events")).json())
    check("ListFineTuningJobCheckpointsResponse", (await client.get(f"{JOBS}/{job['id']}/checkpoints")).json())
