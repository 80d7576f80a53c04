"""What a plan tells is what the server does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cli.conftest import Live

FLAGS = ["-t", "train.jsonl", "-v", "valid.jsonl", "-m", "ada", "--n_epochs", "2", "--batch_size", "8"]
NOBODY = {"OPENAI_API_BASE": "http://127.0.0.1:9/v1", "OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}


def plan(live: Live, *flags: str) -> dict[str, Any]:
    """What a plan says when no server can be asked."""
    done = live.quick("plan", *flags, "--json", **NOBODY)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_job_does_what_was_planned(live: Live, tuned: dict[str, Any]) -> None:
    planned = plan(live, *FLAGS)
    events = live.quick("jobs", "watch", tuned["id"], "--json").stdout.splitlines()[:-1]
    last = [event for line in events if (event := json.loads(line))["type"] == "metrics"][-1]["data"]
    assert (planned["steps"], planned["trained_tokens"]) == (last["step"], last["elapsed_tokens"])
    assert planned["hyperparameters"].items() >= tuned["hyperparams"].items()
    assert planned["examples"] == 40
    assert planned["tokens_per_s_measured"]  # that job has succeeded here
    assert planned["tokens_per_s"] > 0
    assert planned["training_s"] == pytest.approx(planned["trained_tokens"] / planned["tokens_per_s"])
    assert planned["cost_usd"] == 0
    assert planned["memory_bytes"] > 1 << 20


def test_every_default_has_its_rule_and_what_was_asked_has_none(live: Live) -> None:
    planned = plan(live, "-t", "long.jsonl", "-m", "ada", "--n_epochs", "3")
    assert planned["hyperparameters"]["n_epochs"] == 3
    assert "n_epochs" not in planned["defaults"]
    assert planned["hyperparameters"]["batch_size"] == 1
    assert planned["defaults"]["batch_size"] == "about 0.2% of the examples, as a power of two, at most 256"
    assert planned["hyperparameters"].keys() == planned["defaults"].keys() | {"n_epochs"}


def test_what_people_read(live: Live) -> None:
    text = live.quick(
        "plan", *FLAGS, "--compute_classification_metrics", "--classification_positive_class", " positive"
    )
    assert text.returncode == 0, text.stderr
    assert "train.jsonl: 40 examples, " in text.stdout
    assert "in 10 steps." in text.stdout
    assert 'classification_positive_class   " positive"' in text.stdout
    assert (
        "tunesmith jobs create --training_file train.jsonl --validation_file valid.jsonl --model ada --n_epochs 2 "
        "--batch_size 8 --compute_classification_metrics --classification_positive_class ' positive'\n"
    ) in text.stdout


def test_a_tuned_model_is_gone_on_with(live: Live, tuned: dict[str, Any]) -> None:
    model = tuned["fine_tuned_model"]
    planned = live.json("plan", "-t", "train.jsonl", "-m", model)
    assert (planned["base"], planned["hyperparameters"]["method"]) == ("ada", "lora")
    assert "lora_rank" not in planned["hyperparameters"]
    refused = live.quick("plan", "-t", "train.jsonl", "-m", model, "--lora_rank", "4")
    assert refused.returncode == 1
    assert f"{model} has an adapter" in refused.stderr


def test_an_uploaded_file_is_planned_with(live: Live, tuned: dict[str, Any]) -> None:
    file_id = tuned["training_files"][0]["id"]
    assert live.json("plan", "-t", file_id, "-m", "ada")["tokens"] == plan(live, *FLAGS)["tokens"]


@pytest.mark.parametrize(
    ("flags", "told", "code"),
    [
        (["--batch_size", "1000"], "batch_size must be from 1 to 256", 1),
        (["--best_epoch"], "best_epoch goes by the loss on a validation_file", 1),
        (["--suffix=..."], "suffix '...' has no letter", 1),
        (["-v", "nope.jsonl"], "nope.jsonl is no file here", 2),
        (["-v", "table.csv"], "validation_file table.csv cannot be trained on as it is: Line 1", 1),
        (["-m", "nope"], "nope is no base model here, and no server can be asked for it", 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_server_would_refuse_is_refused(live: Live, flags: list[str], told: str, code: int) -> None:
    (live.folder / "table.csv").write_text("prompt,completion\na,b\n")
    done = live.quick("plan", "-t", "train.jsonl", "-m", "ada", *flags, **NOBODY)
    assert (done.returncode, done.stdout) == (code, "")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
