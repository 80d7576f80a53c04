"""`/v1/fine_tuning/jobs`: the same jobs in the shape of late 2023."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.wire.harness import ROWS

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
        "training_file": legacy["training_files"][0]["id"],
        "validation_file": None,
        "result_files": [],
        "trained_tokens": None,
        "seed": 0,
        "error": None,
        "integrations": [],
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
