"""What was saved from an account comes here, is trained again, and answers to its old names."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import OWNER_KEY, Server, messages, reviews, wait_for
from tests.sdk.environments import client_environment
from tunesmith.client import ApiError, Client

LEGACY = "ada:ft-acme:reviews-2023-01-31-10-20-30"
CONTINUED = "ada:ft-acme:more-2023-02-28-10-20-30"
MODERN = "ft:gpt-3.5-turbo-0613:acme:support:8aBcDeF"
RESULTS = "step,training_loss\n1,0.5\n"
TALK = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """As somebody saved it: lists of objects, and contents by id."""
    folder = tmp_path / "openai export"
    train = jsonl(reviews(24, seed=1))
    contents = {
        "file-train.jsonl": train,
        "file-valid.jsonl": jsonl(reviews(8, seed=2)),
        "file-chat.jsonl": jsonl([{"messages": TALK}] * 8),
        "file-broken.jsonl": '{"prompt": "a"}\n',
        "file-results.csv": RESULTS,
        "file-chatresults": base64.b64encode(RESULTS.encode()).decode(),  # as the API of late 2023 gave them
    }
    write(folder / "files.json", {"object": "list", "data": [file_object(name, len(train)) for name in contents]})
    for name, content in contents.items():
        write(folder / "files" / name, content)
    first = legacy_job("ft-first", "ada", LEGACY, created=1_675_160_000)
    write(
        folder / "fine_tunes.json",
        {
            "object": "list",
            "data": [
                first,
                legacy_job("ft-second", LEGACY, CONTINUED, created=1_677_580_000, validation_files=[]),
                legacy_job("ft-failed", "ada", None, created=1, status="failed"),
                legacy_job("ft-lost", "ada", "ada:ft-acme-2021-01-01-00-00-00", training_files=["file-lost"]),
            ],
        },
    )
    modern = {
        "id": "ftjob-chat",
        "object": "fine_tuning.job",
        "model": "gpt-3.5-turbo-0613",
        "created_at": 1_699_000_000,
        "status": "succeeded",
        "fine_tuned_model": MODERN,
        "hyperparameters": {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": "auto"},
        "training_file": "file-chat",
        "validation_file": None,
        "result_files": ["file-chatresults"],
    }
    write(folder / "fine_tuning_jobs.json", [modern])
    write(folder / "README.txt", "what is this")
    return folder


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def file_object(name: str, size_bytes: int) -> dict[str, Any]:
    is_results = "results" in name
    return {
        "id": Path(name).stem,
        "object": "file",
        "filename": "compiled_results.csv" if is_results else f"{Path(name).stem.removeprefix('file-')}.jsonl",
        "purpose": "fine-tune-results" if is_results else "fine-tune",
        "bytes": size_bytes,
    }


def legacy_job(job_id: str, model: str, name: str | None, *, created: int = 2, **fields: Any) -> dict[str, Any]:
    return {
        "id": job_id,
        "object": "fine-tune",
        "model": model,
        "created_at": created,
        "status": "succeeded",
        "fine_tuned_model": name,
        "hyperparams": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.1, "prompt_loss_weight": 0.02},
        "training_files": [{"id": "file-train", "object": "file", "purpose": "fine-tune-train"}],
        "validation_files": [{"id": "file-valid", "object": "file"}],
        "result_files": [{"id": "file-results", "object": "file", "filename": "compiled_results.csv"}],
        **fields,
    }


def bring(server: Server, folder: Path, *flags: str) -> dict[str, dict[str, str]]:
    """What was told of each thing, by its first word."""
    told = json.loads(run(server, folder, *flags, "--json"))
    return {item["what"].split(" ")[0]: item for item in told["items"]}


def run(server: Server, folder: Path, *flags: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "tunesmith", "import", "openai-export", str(folder), *flags]
    environment = client_environment(server.base_url, OWNER_KEY)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def answer(client: Client, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": "The plot was dull.\n\n###\n\n", "max_tokens": 1, "temperature": 0}
    answered: dict[str, Any] = client.post("completions", body=body)
    return answered


def state(client: Client) -> tuple[list[str], list[str], list[str]]:
    return ids(client, "files"), ids(client, "fine-tunes"), ids(client, "models")


def ids(client: Client, kind: str) -> list[str]:
    return sorted(one["id"] for one in client.get(kind)["data"])


def test_coming_home(server: Server, client: Client, export: Path) -> None:
    before = state(client)
    told = bring(server, export, "--dry-run", "--base", "gpt-3.5-turbo-0613=ada")
    assert told["file-train"]["to_come"] == "upload"
    assert told["ft-first"]["to_come"] == f"retrain ada as {LEGACY}"
    assert told["ft-second"]["to_come"] == f"retrain {LEGACY} as {CONTINUED}"
    assert told["ftjob-chat"]["to_come"] == f"retrain ada as {MODERN}"
    assert "completion" in told["file-broken"]["skipped"]
    assert state(client) == before

    # Files and records come; jobs are only spoken of.
    text = run(server, export)
    assert f"tunesmith import openai-export '{export}' --retrain" in text
    assert f"--alias {LEGACY}" in text
    files = {file["filename"]: file for file in client.get("files")["data"]}
    assert client.content(files["ftjob-chat/compiled_results.csv"]["id"]).decode() == RESULTS
    assert files["ft-first.json"]["purpose"] == "user_data"
    assert json.loads(client.content(files["ft-first.json"]["id"]))["fine_tuned_model"] == LEGACY
    rows = client.content(files["chat.jsonl"]["id"]).decode().splitlines()
    assert json.loads(rows[0]) == {"messages": TALK}
    assert ids(client, "fine-tunes") == before[1]

    # A second time nothing changes; what is left out is named.
    between = state(client)
    told = bring(server, export)
    assert state(client) == between
    assert told["file-train"]["here"] == files["train.jsonl"]["id"]
    reasons = {what: item["skipped"] for what, item in told.items() if "skipped" in item}
    assert reasons.keys() == {"README.txt", "file-broken", "ft-failed", "ft-lost", "ftjob-chat"}
    assert "completion" in reasons["file-broken"]
    assert reasons["ft-failed"].startswith("it is failed there")
    assert "file-lost did not come" in reasons["ft-lost"]
    assert "--base gpt-3.5-turbo-0613=" in reasons["ftjob-chat"]

    # Trained again, under the old name, which answers as soon as there is something that can.
    told = bring(server, export, "--retrain", "--base", "gpt-3.5-turbo-0613=ada")
    job_id, chat_id = told["ft-first"]["came"], told["ftjob-chat"]["came"]
    assert "does not exist yet" in told["ft-second"]["skipped"]  # it goes on from what the first one trains
    job = client.get("fine-tunes", job_id)
    assert job["alias"] == LEGACY
    if job["status"] != "succeeded":
        with pytest.raises(ApiError) as refused:
            answer(client, LEGACY)
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")
        assert f"fine-tune {job_id}, which is" in refused.value.message
    assert LEGACY in state(client)[2]
    ended = wait_for(client, job_id)
    assert ended["status"] == "succeeded", messages(ended)
    assert ended["hyperparams"] | {"seed": None} == {
        **{"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.1, "prompt_loss_weight": 0.02},
        "seed": None,
    }
    assert ":reviews-" in ended["fine_tuned_model"]
    assert answer(client, LEGACY)["choices"] == answer(client, ended["fine_tuned_model"])["choices"]
    shown = client.get("models", LEGACY)
    assert shown["parent"] == ended["fine_tuned_model"]
    assert shown["alias"] == {"fine_tune": job_id, "status": "succeeded", "model": ended["fine_tuned_model"]}

    # Once more: what had to wait comes, all else stays.
    told = bring(server, export, "--retrain", "--base", "gpt-3.5-turbo-0613=ada")
    assert told["ft-first"]["here"] == LEGACY
    second = wait_for(client, told["ft-second"]["came"])
    assert second["status"] == "succeeded", messages(second)
    assert client.get("models", second["fine_tuned_model"])["parent"] == ended["fine_tuned_model"]
    assert wait_for(client, chat_id)["status"] == "succeeded"
    assert answer(client, MODERN)["model"] == MODERN
    settled = state(client)
    bring(server, export, "--retrain", "--base", "gpt-3.5-turbo-0613=ada")
    assert state(client) == settled

    # An alias is the organisation's; its owner may take it away, and the model stays.
    with pytest.raises(ApiError, match="is taken"):
        file_id = job["training_files"][0]["id"]
        client.post("fine-tunes", body={"training_file": file_id, "model": "ada", "alias": LEGACY})
    member_key = client.post("organization", "keys", body={"name": "m", "role": "member"})["secret"]
    with server.client(member_key) as member:
        assert answer(member, LEGACY)["choices"]
        with pytest.raises(ApiError) as refused:
            member.delete("models", LEGACY)
        assert refused.value.status == 403
    assert client.delete("models", LEGACY)["deleted"] is True
    with pytest.raises(ApiError, match="does not exist"):
        answer(client, LEGACY)
    assert answer(client, ended["fine_tuned_model"])["choices"]


def test_a_folder_with_nothing_in_it(server: Server, tmp_path: Path) -> None:
    assert "holds no saved files" in run(server, tmp_path, code=2)
    assert "cannot be read" in run(server, tmp_path / "nowhere", code=2)
