"""The guide's whole flow on a command line with the verbs of `openai` 0.28: theirs or ours."""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.cli.parser import build_parser

NAME = re.compile(r"ada:ft-personal:custom-model-name-\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d")
JOB_ID = re.compile(r"ft-[A-Za-z0-9]{24}")
COMMAND_WITHIN_S = 180.0


@dataclass(frozen=True)
class CommandLine:
    """A program and the environment it runs in."""

    program: Sequence[str]
    environment: Mapping[str, str]
    folder: Path

    def run(self, *words: str, code: int = 0) -> str:
        """Standard output of `PROGRAM api WORDS`, which has to end with this exit code."""
        done = self.finished(*words)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def finished(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.program, "api", *words],
            env=dict(self.environment),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_WITHIN_S,
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Begin a command that is to be interrupted; its output unbuffered."""
        return subprocess.Popen(
            [*self.program, "api", *words],
            env=dict(self.environment) | {"PYTHONUNBUFFERED": "1"},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def create(self, *more: str) -> str:
        """The id of a job on the long file, not followed."""
        output = self.run(
            "fine_tunes.create", "-t", "long.jsonl", "-m", "ada", "--no_follow", "--n_epochs", "50", *more
        )
        return str(json.loads(output[output.index("{") :])["id"])

    def get(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = json.loads(self.run("fine_tunes.get", "-i", job_id))
        return job


def check_whole_flow(cli: CommandLine, *, steps: int, training_rows: int) -> None:
    """Create and follow, results, completion with log-probabilities, files: as the fine-tuning guide of 2023 tells."""
    output = cli.run(
        *("fine_tunes.create", "-t", "train.jsonl", "-v", "valid.jsonl", "-m", "ada", "--suffix", "custom model name"),
        *("--n_epochs", "2", "--batch_size", "8", "--learning_rate_multiplier", "0.1", "--prompt_loss_weight", "0.02"),
        *("--compute_classification_metrics", "--classification_n_classes", "2"),
        *("--classification_positive_class", " positive", "--classification_betas", "0.5", "1", "2"),
    )
    found = NAME.search(output)
    assert found is not None, output
    model, job_id = found[0], JOB_ID.findall(output)[0]
    for expected in (
        "Created fine-tune: ",
        "Fine-tune started",
        "Completed epoch 2/2",
        "Fine-tune succeeded",
        "Status: succeeded",
    ):
        assert expected in output

    job = cli.get(job_id)
    assert job["fine_tuned_model"] == model
    assert job["hyperparams"]["classification_betas"] == [0.5, 1, 2]
    assert [file["filename"] for file in job["result_files"]] == ["compiled_results.csv"]
    assert job_id in [listed["id"] for listed in json.loads(cli.run("fine_tunes.list"))["data"]]
    events = json.loads(cli.run("fine_tunes.events", "-i", job_id))["data"]
    assert [event["message"] for event in events] == [event["message"] for event in job["events"]]
    assert cli.run("fine_tunes.follow", "-i", job_id).count("Fine-tune succeeded") == 1

    rows = cli.run("fine_tunes.results", "-i", job_id).strip().splitlines()
    header = rows[0].split(",")
    assert header[:3] == ["step", "elapsed_tokens", "elapsed_examples"]
    assert [name for name in header if name.startswith("classification/f")] == [
        "classification/f0.5",
        "classification/f1.0",
        "classification/f2.0",
    ]
    assert [row.split(",")[0] for row in rows[1:]] == [str(step) for step in range(1, steps + 1)]
    assert rows[-1].split(",")[2] == str(2 * training_rows)

    prompt = "The plot was dull.\n\n###\n\n"
    completed = cli.run("completions.create", "-m", model, "-p", prompt, "-M", "1", "-t", "0", "--logprobs", "2")
    assert completed.startswith(prompt)
    assert len(completed) > len(prompt)
    streamed = cli.run("completions.create", "-m", model, "-p", prompt, "-M", "1", "-t", "0", "--stream")
    assert streamed == completed
    by_old_name = cli.run("completions.create", "-e", model, "-p", prompt, "-M", "1", "-t", "0")
    assert by_old_name == completed
    assert cli.run("completions.create", "-m", model, "-p", prompt, "-M", "1", "-n", "2").count("===== Completion") == 2


def check_interrupted_follow(cli: CommandLine) -> None:
    """Ctrl-C leaves the job alone; following it again tells everything from the start."""
    job_id = cli.create()
    with cli.start("fine_tunes.follow", "-i", job_id) as following:
        seen = read_until(following, "Fine-tune started")
        following.send_signal(signal.SIGINT)
        rest, errors = following.communicate(timeout=COMMAND_WITHIN_S)
    assert following.returncode == 0, errors
    assert "Stream interrupted" in rest, (seen, rest, errors)
    assert "still running" in rest
    assert cli.get(job_id)["status"] == "running"
    with cli.start("fine_tunes.follow", "-i", job_id) as following:
        assert read_until(following, "Fine-tune started") == seen
        cli.run("fine_tunes.cancel", "-i", job_id)
        rest, errors = following.communicate(timeout=COMMAND_WITHIN_S)
    assert "Fine-tune cancelled" in rest
    assert cli.get(job_id)["status"] == "cancelled"


def check_cancel(cli: CommandLine) -> None:
    """A cancelled job says so, ends its followers and cannot be cancelled again."""
    job_id = cli.create()
    cancelled = json.loads(cli.run("fine_tunes.cancel", "-i", job_id))
    assert cancelled["status"] == "cancelled"
    assert cancelled["events"][-1]["message"] == "Fine-tune cancelled"
    again = cli.finished("fine_tunes.cancel", "-i", job_id)
    assert again.returncode == 1
    assert "HTTP status code: 400" in again.stderr
    no_results = cli.finished("fine_tunes.results", "-i", job_id)
    assert no_results.returncode == 1
    assert "No results file available" in no_results.stderr


def check_files(cli: CommandLine) -> None:
    """Upload, get, list, delete."""
    output = cli.run("files.create", "-f", "valid.jsonl", "-p", "fine-tune")
    file = json.loads(output[output.index("{") :])
    assert json.loads(cli.run("files.get", "-i", file["id"]))["bytes"] == (cli.folder / "valid.jsonl").stat().st_size
    assert file["id"] in [listed["id"] for listed in json.loads(cli.run("files.list"))["data"]]
    assert json.loads(cli.run("files.delete", "-i", file["id"]))["deleted"] is True
    missing = cli.finished("files.get", "-i", file["id"])
    assert missing.returncode == 1
    assert "HTTP status code: 404" in missing.stderr


def check_deletion(owner: CommandLine, member: CommandLine, model: str) -> None:
    """Members may call a model and not delete it; owners may."""
    refused = member.finished("models.delete", "-i", model)
    assert refused.returncode == 1
    assert "HTTP status code: 403" in refused.stderr
    assert model in [listed["id"] for listed in json.loads(member.run("models.list"))["data"]]
    assert json.loads(owner.run("models.get", "-i", model))["root"] == "ada"
    assert json.loads(owner.run("engines.get", "-i", model))["ready"] is True
    assert json.loads(owner.run("models.delete", "-i", model))["deleted"] is True
    gone = owner.finished("completions.create", "-m", model, "-p", "x", "-M", "1")
    assert gone.returncode == 1
    assert "does not exist" in gone.stderr


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Output up to and with the line that holds `text`. Raises AssertionError if it does not come."""
    assert process.stdout is not None
    lines: list[str] = []
    out_of_patience = threading.Timer(COMMAND_WITHIN_S, process.kill)
    out_of_patience.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if text in line:
                return "".join(lines)
    finally:
        out_of_patience.cancel()
    raise AssertionError(f"{text!r} did not come:\n{''.join(lines)}")


def flags_of_our_api() -> dict[str, list[str]]:
    """{verb: flags} of `tunesmith api`."""
    verbs: dict[str, argparse.ArgumentParser] = {}
    parsers = [build_parser()]
    while parsers:
        for action in parsers.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                verbs |= {child.prog.removeprefix("tunesmith api "): child for child in action.choices.values()}
                parsers.extend(action.choices.values())
    return {
        verb: [flag for action in child._actions for flag in action.option_strings]
        for verb, child in verbs.items()
        if "." in verb
    }
