"""Clients beside the legacy Python one call a tuned model: today's openai from PyPI, and npm openai 3.3.0."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.sdk.environments import HERE
from tests.sdk.flow import COMMAND_WITHIN_S

pytestmark = pytest.mark.sdk


def report(command: list[str | Path], environment: Mapping[str, str], folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        command, env=dict(environment), cwd=folder, capture_output=True, text=True, timeout=COMMAND_WITHIN_S
    )
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def test_newest_python(python_newest: Path, environment: dict[str, str], data: Path, tuned: str) -> None:
    seen = report([python_newest, HERE / "programs" / "newest.py", tuned], environment, data)
    assert seen["streamed"] == seen["plain"]
    assert seen["completion_tokens"] == seen["logprobs"] == 2
    assert seen["listed"] is True
    assert seen["file"][1:] == ["valid.jsonl", "fine-tune"]
    assert seen["file"][0] in seen["files"]
    assert seen["content"] is True
    assert seen["deleted"] is True
    assert seen["wrong_model"] == ["model_not_found", "model", True]


def test_newest_python_chats(python_newest: Path, environment: dict[str, str], data: Path, tuned: str) -> None:
    seen = report([python_newest, HERE / "programs" / "chat.py", tuned], environment, data)
    assert seen["streamed"] == seen["plain"]
    assert seen["at_once"] == [seen["plain"][0]] * 9
    assert seen["helped"] == seen["plain"][0]
    assert seen["stream_finished"] == seen["finished"]
    assert seen["stream_usage"] is True
    assert seen["roles"] == ["assistant"] * 2
    assert set(seen["logprobs"]) == {3}
    assert seen["bytes"].removeprefix(" ") == seen["plain"][0]
    assert seen["head"] == ["chat.completion", "chatcmpl-", tuned, "fp_", seen["head"][-1]]
    assert seen["turn"] == ["assistant", True]
    assert seen["tools"] == [400, "tools", None]
    assert seen["schema"] == [400, "response_format", None]
    assert seen["wrong_model"] == [404, "model", "model_not_found"]
    assert seen["too_long"] == [400, "messages", "context_length_exceeded"]


def test_newest_python_fine_tunes(python_newest: Path, environment: dict[str, str], data: Path) -> None:
    seen = report([python_newest, HERE / "programs" / "jobs.py"], environment, data)
    assert seen["created"] == ["fine_tuning.job", "ftjob-", "ada", {"team": "blue"}, None]
    assert seen["n_epochs"] == [2, 2]
    assert seen["statuses"][-1] == "succeeded"
    assert set(seen["statuses"]) <= {"queued", "running", "succeeded"}
    assert seen["found"] == 1
    assert seen["events"][0] == "The job has successfully completed"
    assert seen["events"][-1].startswith("Created fine-tuning job: ftjob-")
    assert seen["losses"] == seen["steps"] > 0
    assert seen["checkpoints"] == [[80, True], [40, True]]
    assert seen["trained_tokens"] > 0
    assert seen["results"] is True
    assert len(seen["answer"]) > 0
    assert seen["cancelled"] == "cancelled"
    assert seen["wrong_method"] == [400, "method.type"]


def test_npm_330(node_folder: Path, environment: dict[str, str], data: Path, tuned: str) -> None:
    program = node_folder / "programs" / "npm_330.js"
    seen = report(["node", program, tuned, "long.jsonl"], environment, data)
    assert seen["streamed"] == seen["plain"]
    assert seen["done"] is True
    assert seen["chat"] == ["chat.completion", "assistant", "string"]
    assert seen["file"] == ["long.jsonl", "fine-tune"]
    assert (seen["cancelled"], seen["lastEvent"]) == ("cancelled", "Fine-tune cancelled")
    assert seen["listed"] is True
    assert seen["retrieved"] == tuned
    assert seen["wrongModel"] == [404, "model_not_found"]
