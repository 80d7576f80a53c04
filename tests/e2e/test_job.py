"""The main job over HTTP, every part real but for the size of the base model."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest

from tests.e2e.drill import run_dir_of
from tests.e2e.harness import CANCELLED_WITHIN_S, ENGINE, TRAINER, Server, messages, reviews, upload, wait_for
from tests.waiting import until
from tunesmith.client import ApiError, Client

TOLERANCE_NATS = 1e-4


def test_a_job_from_upload_to_an_answer(server: Server, client: Client) -> None:
    training, validation = upload(client, reviews(40, seed=1)), upload(client, reviews(12, seed=2))
    job = client.post(
        "fine-tunes",
        body={
            "training_file": training,
            "validation_file": validation,
            "model": "ada",
            "suffix": "Custom model name",
            "n_epochs": 2,
            "batch_size": 8,
            "compute_classification_metrics": True,
            "classification_n_classes": 2,
            "classification_positive_class": " positive",
        },
    )
    assert job["status"] == "pending"

    followed = [event["message"] for event in client.follow(job["id"])]
    job = client.get("fine-tunes", job["id"])
    assert job["status"] == "succeeded", followed
    assert followed == messages(job)
    name = job["fine_tuned_model"]
    assert re.fullmatch(r"ada:ft-personal:custom-model-name(-\d\d){0}-\d{4}(-\d\d){5}", name)
    for expected in ("Fine-tune started", "Completed epoch 1/2", "Completed epoch 2/2", f"Uploaded model: {name}"):
        assert expected in followed
    assert followed[0] == f"Created fine-tune: {job['id']}"
    assert followed[-1] == "Fine-tune succeeded"

    rows = list(csv.DictReader(io.StringIO(client.content(job["result_files"][0]["id"]).decode())))
    assert [int(row["step"]) for row in rows] == list(range(1, 11))  # 40 rows, batches of 8, twice
    assert rows[-1]["elapsed_examples"] == "80"
    assert 0 <= float(rows[-1]["classification/accuracy"]) <= 1
    assert 0 <= float(rows[-1]["classification/f1.0"]) <= 1

    (choice,) = client.post(
        "completions",
        body={"model": name, "prompt": "The plot was dull.\n\n###\n\n", "max_tokens": 1, "logprobs": 2},
    )["choices"]
    assert choice["logprobs"]["tokens"] == [choice["text"]]
    assert choice["logprobs"]["top_logprobs"][0][choice["text"]] == choice["logprobs"]["token_logprobs"][0]
    assert name in {model["id"] for model in client.get("models")["data"]}

    run_dir = run_dir_of(server, job["id"])
    parity = json.loads(run_dir.parity.read_text())["rows"]
    assert parity
    for row in parity:
        (scored,) = client.post(
            "completions",
            body={"model": name, "prompt": row["token_ids"], "max_tokens": 0, "echo": True, "logprobs": 0},
        )["choices"]
        served = scored["logprobs"]["token_logprobs"][row["completion_start"] :]
        assert served == pytest.approx(row["logprobs"], abs=TOLERANCE_NATS)

    # What is left of the attempt is its record; the data of the user and the checkpoints are not kept twice.
    until(lambda: not run_dir.training_file.exists())
    assert not run_dir.validation_file.exists()
    assert not run_dir.checkpoints.exists()
    assert not server.processes(TRAINER)


def test_a_tuned_model_can_be_tuned_on(server: Server, client: Client) -> None:
    first = client.post("fine-tunes", body={"training_file": upload(client, reviews(8, 1)), "model": "ada"})
    first = wait_for(client, first["id"])
    again = client.post(
        "fine-tunes",
        body={"training_file": upload(client, reviews(8, 2)), "model": first["fine_tuned_model"], "suffix": "on"},
    )
    again = wait_for(client, again["id"])
    assert again["status"] == "succeeded", messages(again)
    model = client.get("models", again["fine_tuned_model"])
    assert (model["root"], model["parent"]) == ("ada", first["fine_tuned_model"])
    assert run_dir_of(server, again["id"]).read_spec().parent_adapter_dir is not None


def test_all_weights_are_trained_served_and_gone_on_from(server: Server, client: Client, tmp_path: Path) -> None:
    training = upload(client, reviews(24, seed=5))
    asked = {"training_file": training, "model": "ada", "n_epochs": 2, "batch_size": 8, "method": "full"}
    job = wait_for(client, client.post("fine-tunes", body=asked)["id"])
    assert job["status"] == "succeeded", messages(job)
    assert job["hyperparams"]["method"] == "full"
    whole = job["fine_tuned_model"]
    question = {"prompt": "The plot was dull.\n\n###\n\n", "max_tokens": 3, "logprobs": 1, "temperature": 0}
    (said,) = client.post("completions", body=question | {"model": whole})["choices"]
    (base_said,) = client.post("completions", body=question | {"model": "ada"})["choices"]
    assert said["logprobs"]["token_logprobs"] != base_said["logprobs"]["token_logprobs"]

    adapter = wait_for(
        client, client.post("fine-tunes", body=asked | {"method": "lora", "lora_targets": ["q_proj", "v_proj"]})["id"]
    )
    assert adapter["status"] == "succeeded", messages(adapter)
    config = json.loads((run_dir_of(server, adapter["id"]).spec).read_text())["hyperparameters"]
    assert config["lora_targets"] == ["q_proj", "v_proj"]
    for parent, method in ((whole, None), (adapter["fine_tuned_model"], "full")):
        body = asked | {"model": parent, "method": method, "n_epochs": 1}
        child = wait_for(client, client.post("fine-tunes", body=body)["id"])
        assert child["status"] == "succeeded", messages(child)
        assert child["hyperparams"]["method"] == "full"
        assert client.get("models", child["fine_tuned_model"])["parent"] == parent
    client.delete("models", whole)  # what was trained from it has its own weights
    client.post("completions", body=question | {"model": child["fine_tuned_model"]})

    with (tmp_path / "model.zip").open("wb") as file:
        client.download("models", child["fine_tuned_model"], "weights", to=file)
    shutil.unpack_archive(tmp_path / "model.zip", tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_cancel_takes_effect_at_once(server: Server, client: Client) -> None:
    job = client.post(
        "fine-tunes", body={"training_file": upload(client, reviews(400, 3)), "model": "ada", "n_epochs": 50}
    )
    run_dir = run_dir_of(server, job["id"])
    until(run_dir.heartbeat.exists, within_s=60.0)
    assert server.processes(TRAINER)
    cancelled = client.post("fine-tunes", job["id"], "cancel")
    assert cancelled["status"] == "cancelled"
    assert messages(cancelled)[-1] == "Fine-tune cancelled"
    until(lambda: not server.processes(TRAINER), within_s=CANCELLED_WITHIN_S)
    until(lambda: not run_dir.training_file.exists())
    job = client.get("fine-tunes", job["id"])
    assert job["status"] == "cancelled"
    assert job["fine_tuned_model"] is None
    with pytest.raises(ApiError) as refused:
        client.post("fine-tunes", job["id"], "cancel")
    assert refused.value.status == 400


def test_a_job_cancelled_while_it_waits_never_starts(server: Server, client: Client) -> None:
    training = upload(client, reviews(400, 4))
    first = client.post("fine-tunes", body={"training_file": training, "model": "ada", "n_epochs": 50})
    # It shares its trainer with nobody, so it waits.
    second = client.post("fine-tunes", body={"training_file": training, "model": "ada", "method": "full"})
    run_dir_of(server, first["id"])
    client.post("fine-tunes", second["id"], "cancel")
    client.post("fine-tunes", first["id"], "cancel")
    until(lambda: not server.processes(TRAINER))
    assert "Fine-tune started" not in messages(client.get("fine-tunes", second["id"]))


def test_a_killed_engine_costs_the_requests_in_flight_and_no_more(server: Server, client: Client) -> None:
    question = {"model": "ada", "prompt": "The plot was", "max_tokens": 4, "temperature": 0}
    before = client.post("completions", body=question)["choices"]
    victim = server.one(ENGINE)
    victim.kill()
    until(lambda: victim not in server.processes(ENGINE))
    after = client.post("completions", body=question)["choices"]
    assert after == before
    assert len(server.processes(ENGINE)) == 1
