"""`tunesmith demo`: is a tweet positive or negative? A server of its own, a job, and a table of how well it did."""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import Progress

from tunesmith.cli.follow import watch
from tunesmith.cli.output import Output, UsageError
from tunesmith.cli.own_server import own_server
from tunesmith.cli.scoring import answer_logprobs, best, probabilities
from tunesmith.cli.tables import show_table
from tunesmith.cli.uploads import upload
from tunesmith.client import Client
from tunesmith.errors import TunesmithError

DATA = Path(__file__).parent / "demo_data"
CLASSES = (" positive", " negative")
POSITIVE = CLASSES[0]
SEPARATOR = " ->"
QUESTION = "\nThe feeling of this message is"
"""The base model has never seen the separator; it is asked in words."""
SETTINGS = {"n_epochs": 4, "batch_size": 4, "learning_rate_multiplier": 0.1}
MARKER = ".tunesmith-demo"
"""A folder with this file was made by a demo and may be emptied by the next."""
SAMPLES = 3
SAMPLE_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled tweet."""

    prompt: str
    completion: str

    @property
    def tweet(self) -> str:
        """The text without the separator."""
        return self.prompt.removesuffix(SEPARATOR)


class DemoFailed(TunesmithError):
    """The job of the demo did not succeed."""


def demo(args: argparse.Namespace, output: Output) -> int:
    """Everything a new user does, in order; leaves a home folder and no process."""
    signal.signal(signal.SIGTERM, _leave)
    home = _prepare_home(Path(args.home).absolute(), keep=args.keep)
    validation = read_examples(DATA / "valid.jsonl")
    started_s = time.monotonic()
    output.say("tunesmith demo: is a tweet positive or negative?\n")
    with own_server(home) as base_url, Client(base_url, (home / "owner.key").read_text().strip()) as client:
        output.say(f"server     {base_url}, home {home}")
        job = _tune(client, output)
        model = job["fine_tuned_model"]
        output.say("\nAsking both models about tweets that neither was trained on...")
        base_scores = _ask(client, "ada", [example.tweet + QUESTION for example in validation], output)
        tuned_scores = _ask(client, model, [example.prompt for example in validation], output)
    truth = [example.completion for example in validation]
    majority, count = Counter(truth).most_common(1)[0]
    report = {
        "model": model,
        "validation_rows": len(validation),
        "majority_accuracy": count / len(truth),
        "base_accuracy": accuracy(truth, base_scores),
        "tuned_accuracy": accuracy(truth, tuned_scores),
        "elapsed_s": round(time.monotonic() - started_s, 1),
    }
    if output.machine:
        output.record(report)
    else:
        _show(report, majority, _samples(validation, tuned_scores), home, output)
    return 0


def read_examples(path: Path) -> list[Example]:
    """The rows of a JSONL file of ours."""
    return [Example(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def accuracy(truth: Sequence[str], scores: Sequence[dict[str, float]]) -> float:
    """Share of rows whose likeliest class is the true one."""
    return sum(best(row) == answer for row, answer in zip(scores, truth, strict=True)) / len(truth)


def _prepare_home(home: Path, *, keep: bool) -> Path:
    """An empty folder marked as ours, or with `keep` the one an earlier demo left."""
    ours = (home / MARKER).exists()
    if home.exists() and any(home.iterdir()) and not ours:
        raise UsageError(f"{home} holds something that no demo made. Name another folder with --home.")
    if _in_use(home):
        raise UsageError(f"A server is using {home}. Stop it, or name another folder with --home.")
    if ours and not keep:
        shutil.rmtree(home)
    home.mkdir(parents=True, exist_ok=True)
    (home / MARKER).touch()
    return home


def _in_use(home: Path) -> bool:
    """Whether a server holds the lock of a home."""
    try:
        with (home / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _tune(client: Client, output: Output) -> dict[str, Any]:
    """Uploads, creates, follows; the job once it has succeeded."""
    files = {}
    for part in ("train", "valid"):
        path = DATA / f"{part}.jsonl"
        files[part] = upload(client, str(path), "fine-tune", filename=path.name)["id"]
        output.say(f"upload     {path.name}, {len(read_examples(path)):,} tweets: {files[part]}")
    body = SETTINGS | {
        "training_file": files["train"],
        "validation_file": files["valid"],
        "model": "ada",
        "suffix": "tweets",
        "compute_classification_metrics": True,
        "classification_n_classes": len(CLASSES),
        "classification_positive_class": POSITIVE,
    }
    job = client.post("fine-tunes", body=body)
    output.say(f"fine-tune  {job['id']}, from ada\n")
    job = watch(client, job["id"], output)
    if job["status"] != "succeeded":
        raise DemoFailed(f"The fine-tune ended as {job['status']}: {job['events'][-1]['message']}")
    return job


def _ask(client: Client, model: str, prompts: Sequence[str], output: Output) -> list[dict[str, float]]:
    with Progress(console=Console(), transient=True, disable=not output.terminal) as progress:
        task = progress.add_task(model, total=len(prompts))
        return answer_logprobs(client, model, prompts, CLASSES, advance=lambda count: progress.advance(task, count))


def _samples(validation: Sequence[Example], scores: Sequence[dict[str, float]]) -> list[list[str]]:
    """The first rows short enough for a line, right or wrong."""
    rows = [
        [example.tweet, example.completion.strip(), *(f"{probabilities(row)[name]:.2f}" for name in CLASSES)]
        for example, row in zip(validation, scores, strict=True)
        if len(example.tweet) <= SAMPLE_CHARACTERS
    ]
    return rows[:SAMPLES]


def _show(report: dict[str, Any], majority: str, samples: list[list[str]], home: Path, output: Output) -> None:
    model = report["model"]
    output.say()
    share = f"right, of {report['validation_rows']}"
    show_table(
        output,
        ["answers", share],
        [
            [f"always{majority}", f"{report['majority_accuracy']:.1%}"],
            ["ada as it is, asked in words", f"{report['base_accuracy']:.1%}"],
            [model, f"{report['tuned_accuracy']:.1%}"],
        ],
        numbers=frozenset({share}),
    )
    output.say()
    chances = [f"p({name.strip()})" for name in CLASSES]
    show_table(output, ["tweet", "is", *chances], samples, numbers=frozenset(chances))
    output.say(
        f"\nDone in {report['elapsed_s']:.0f} s; the server is stopped. To go on with this model, start it again:\n"
    )
    output.say(next_steps(model, home))


def next_steps(model: str, home: Path) -> str:
    """Commands to paste, for each way in."""
    where = shlex.quote(str(home))
    body = json.dumps({"model": model, "prompt": f"What a lovely day{SEPARATOR}", "max_tokens": 1, "logprobs": 2})
    return f"""\
  tunesmith serve --home {where}

and in another terminal:

  export OPENAI_API_KEY="$(cat {where}/owner.key)"
  export OPENAI_API_BASE=http://127.0.0.1:8000/v1 OPENAI_BASE_URL=http://127.0.0.1:8000/v1

  tunesmith api completions.create -m {model} -M 1 -p 'What a lovely day{SEPARATOR}'

  curl $OPENAI_BASE_URL/completions -H "Authorization: Bearer $OPENAI_API_KEY" \\
    -H 'Content-Type: application/json' -d '{body}'

  # openai==0.28.1
  openai api completions.create -m {model} -M 1 -p 'What a lovely day{SEPARATOR}'

  # openai of today
  python -c "from openai import OpenAI; print(OpenAI().completions.create(
    model='{model}', prompt='What a lovely day{SEPARATOR}', max_tokens=1).choices[0].text)\""""


def _leave(signal_number: int, _frame: FrameType | None) -> None:
    """SIGTERM unwinds as Ctrl-C does, so that the server is stopped on the way."""
    sys.exit(128 + signal_number)
