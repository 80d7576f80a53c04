"""What our fine-tunes have beyond the API of 2021-2023: pauses, the outlook of the queue, settings, checkpoints."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.wire.harness import create_job, error_of, upload
from tunesmith.core.jobs import Claim
from tunesmith.rundir import ProgressLine, Snapshot
from tunesmith.server import Parts

pytestmark = pytest.mark.anyio


def start(parts: Parts) -> Claim:
    jobs = parts.services.jobs
    claimed = jobs.claim("test", 60)
    assert claimed is not None
    jobs.started(claimed, "handle", jobs.hyperparameters(claimed.job, 8))
    return claimed


async def test_pause_and_resume(client: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    job_id = await create_job(client)
    assert (await stranger.post(f"/v1/fine-tunes/{job_id}/pause")).status_code == 404

    paused = (await client.post(f"/v1/fine-tunes/{job_id}/pause")).json()
    assert (paused["status"], paused["paused"]) == ("pending", True)
    assert paused["events"][-1]["message"] == "Fine-tune paused"

    resumed = (await client.post(f"/v1/fine-tunes/{job_id}/resume")).json()
    assert "paused" not in resumed
    assert resumed["events"][-1]["message"] == "Fine-tune resumed"

    await client.post(f"/v1/fine-tunes/{job_id}/cancel")
    refused = await client.post(f"/v1/fine-tunes/{job_id}/pause")
    assert refused.status_code == 400
    assert "cancelled" in error_of(refused)["message"]


async def test_place_in_the_queue(client: httpx.AsyncClient, parts: Parts) -> None:
    ids = [await create_job(client) for _ in range(2)]
    parts.services.jobs.enqueue()
    places = [(await client.get(f"/v1/fine-tunes/{job_id}")).json()["queue_number"] for job_id in ids]
    assert places == [0, 1]


async def test_own_hyperparameters_are_shown_as_asked_and_as_resolved(client: httpx.AsyncClient, parts: Parts) -> None:
    file_id = await upload(client)
    asked = {
        "seed": 0,
        "lora_rank": 8,
        "lora_targets": ["q_proj", "v_proj"],
        "best_epoch": True,
        "early_stopping_patience": 2,
        "epoch_checkpoints": 3,
    }
    body = {"training_file": file_id, "validation_file": file_id, "model": "ada", **asked}
    job = (await client.post("/v1/fine-tunes", json=body)).json()
    assert asked.items() <= job["hyperparams"].items()
    assert job["hyperparams"]["lora_alpha"] is None
    start(parts)
    job = (await client.get(f"/v1/fine-tunes/{job['id']}")).json()
    assert job["hyperparams"]["lora_alpha"] == 128.0


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("seed", -1, "seed"),
        ("seed", 0.5, "seed"),
        ("lora_rank", 1_000, "lora_rank"),
        ("lora_alpha", 0, "lora_alpha"),
        ("lora_targets", "q_proj", "lora_targets"),
        ("lora_targets", ["q_proj", 1], "lora_targets"),
        ("lora_targets", ["qkv_proj"], "lora_targets"),
        ("method", "both", "method"),
        ("method", {"type": "supervised"}, "method"),
        ("best_epoch", True, "validation_file"),
        ("best_epoch", "yes", "best_epoch"),
        ("early_stopping_patience", 1, "validation_file"),
        ("epoch_checkpoints", 51, "epoch_checkpoints"),
    ],
)
async def test_refused(client: httpx.AsyncClient, field: str, value: object, param: str) -> None:
    body = {"training_file": await upload(client), "model": "ada", field: value}
    response = await client.post("/v1/fine-tunes", json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


async def test_checkpoints_are_listed_and_answer(client: httpx.AsyncClient, parts: Parts, tmp_path: Path) -> None:
    job_id = await create_job(client)
    claimed = start(parts)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "results.csv").write_text("step\n1\n")
    parts.services.jobs.succeed(
        claimed,
        adapter_dir=adapter,
        results_csv=tmp_path / "results.csv",
        trained_tokens=1,
        snapshots=[(Snapshot(step, {"step": step, "training_loss": 0.5}), adapter) for step in (4, 8)],
    )
    name = (await client.get(f"/v1/fine-tunes/{job_id}")).json()["fine_tuned_model"]

    listed = (await client.get(f"/v1/fine-tunes/{job_id}/checkpoints")).json()["data"]

    assert [one["model"] for one in listed] == [f"{name}:ckpt-step-8", f"{name}:ckpt-step-4"]
    assert (listed[0]["step_number"], listed[0]["metrics"]) == (8, {"step": 8, "training_loss": 0.5})
    model = (await client.get(f"/v1/models/{listed[1]['model']}")).json()
    assert (model["root"], model["parent"]) == ("ada", "ada")
    answer = await client.post("/v1/completions", json={"model": listed[1]["model"], "prompt": "x", "max_tokens": 1})
    assert answer.json()["model"] == listed[1]["model"]


async def test_the_clients_of_2021_are_shown_messages_alone(client: httpx.AsyncClient, parts: Parts) -> None:
    job_id = await create_job(client)
    lines = [
        ProgressLine(1, "info", "Step 1/1: training loss=0.50", {"step": 1}, "metrics"),
        ProgressLine(2, "info", "Completed epoch 1/1"),
    ]
    parts.services.jobs.record(start(parts), lines)
    parts.services.jobs.cancel(parts.services.accounts.authenticate(client.headers["Authorization"][7:]), job_id)
    expected = ["Fine-tune started", "Completed epoch 1/1", "Fine-tune cancelled"]
    job = (await client.get(f"/v1/fine-tunes/{job_id}")).json()
    assert [event["message"] for event in job["events"]][-3:] == expected
    stream = (await client.get(f"/v1/fine-tunes/{job_id}/events?stream=true")).text
    assert "training loss" not in stream
    assert stream.count("data: {") == len(job["events"])
