"""`tunesmith jobs`: fine-tunes for people, a request or two each. `api fine_tunes.*` has the same for old scripts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tunesmith.cli.connection import connect
from tunesmith.cli.job_files import file_id
from tunesmith.cli.output import EXIT_INTERRUPTED, Output, UsageError
from tunesmith.cli.tables import Column, show_list, show_record, time_column
from tunesmith.cli.watch import watch_job
from tunesmith.client import Client

FIELDS = (
    "model",
    "suffix",
    "n_epochs",
    "batch_size",
    "learning_rate_multiplier",
    "prompt_loss_weight",
    "compute_classification_metrics",
    "classification_n_classes",
    "classification_positive_class",
    "classification_betas",
    "seed",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "method",
    "best_epoch",
    "early_stopping_patience",
    "epoch_checkpoints",
    "alias",
)
"""The fields of a job that flags are named after: `flags/fine_tunes.py`."""

COLUMNS = (
    Column("id", lambda job: job["id"]),
    Column("status", lambda job: job["status"]),
    Column("model", lambda job: job["model"]),
    Column("fine tuned model", lambda job: job["fine_tuned_model"]),
    time_column("created", lambda job: job["created_at"]),
)


def fields_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a job that flags were given for."""
    fields = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    if args.wandb is not None:
        fields["integrations"] = [{"type": "wandb", "wandb": {"project": args.wandb}}]
    return fields


def make(client: Client, args: argparse.Namespace, output: Output, *, check_if_files_exist: bool) -> dict[str, Any]:
    """The job that the flags ask for; files that are not on the server yet are uploaded."""
    body = {"training_file": file_id(client, args.training_file, check_if_files_exist, output)}
    if args.validation_file is not None:
        body["validation_file"] = file_id(client, args.validation_file, check_if_files_exist, output)
    job: dict[str, Any] = client.post("fine-tunes", body=body | fields_of(args))
    return job


def create(args: argparse.Namespace, output: Output) -> int:
    """Makes a job; with --wait the exit code says how it ended."""
    for name in (args.training_file, args.validation_file):
        if name is not None and not (Path(name).is_file() or name.lower().startswith(("file-", "http"))):
            raise UsageError(f"{name} is no file here, and no id of an uploaded file (file-...).")
    with connect(args) as client:
        if args.model is not None:
            client.get("models", args.model)  # an unknown one is told before files are sent
        job = make(client, args, output, check_if_files_exist=False)
        if args.wait:
            if output.machine:
                output.record(job)
            else:
                output.say(f"Created fine-tune: {job['id']}")
            return _watch(client, job["id"], output, interrupted=EXIT_INTERRUPTED)
    if output.machine:
        output.show(job)
        return 0
    output.say(f"Created fine-tune: {job['id']}\n\nTo watch it:\n\n  tunesmith jobs watch {job['id']}")
    return 0


def list_jobs(args: argparse.Namespace, output: Output) -> int:
    """Every job of the organisation."""
    with connect(args) as client:
        show_list(output, client.get("fine-tunes")["data"], COLUMNS)
    return 0


def show(args: argparse.Namespace, output: Output) -> int:
    """One job, with its last events."""
    with connect(args) as client:
        job = client.get("fine-tunes", args.id)
    show_record(output, job, about(job))
    return 0


def watch(args: argparse.Namespace, output: Output) -> int:
    """A job as it goes on; Ctrl-C ends the watching alone."""
    with connect(args) as client:
        return _watch(client, args.id or _job_of_interest(client), output, interrupted=0)


def cancel(args: argparse.Namespace, output: Output) -> int:
    """Ends a job."""
    return _tell(args, output, "cancel", "is cancelled")


def pause(args: argparse.Namespace, output: Output) -> int:
    """Lets a job rest."""
    return _tell(args, output, "pause", f"rests. To let it go on:\n  tunesmith jobs resume {args.id}")


def resume(args: argparse.Namespace, output: Output) -> int:
    """Lets a paused job go on."""
    return _tell(args, output, "resume", f"goes on. To watch it:\n  tunesmith jobs watch {args.id}")


def _watch(client: Client, job_id: str, output: Output, *, interrupted: int) -> int:
    """Exit code 0 if the job succeeded, 1 if not, `interrupted` after Ctrl-C."""
    try:
        return watch_job(client, job_id, output)
    except KeyboardInterrupt:
        output.aside(f"\nThe job goes on. To watch it again:\n  tunesmith jobs watch {job_id}")
        return interrupted


def _tell(args: argparse.Namespace, output: Output, verb: str, outcome: str) -> int:
    with connect(args) as client:
        job = client.post("fine-tunes", args.id, verb)
    if output.machine:
        output.show(job)
    else:
        output.say(f"{args.id} {outcome}")
    return 0


def _job_of_interest(client: Client) -> str:
    """The first that is running, else the next to run, else the newest. Raises UsageError where there is none."""
    jobs = client.get("fine-tunes")["data"]
    if not jobs:
        raise UsageError("There is no job to watch yet. `tunesmith jobs create` makes one.")
    of_status = {job["status"]: job["id"] for job in reversed(jobs)}
    job_id: str = of_status.get("running") or of_status.get("pending") or jobs[-1]["id"]
    return job_id


def about(job: dict[str, Any]) -> dict[str, str | None]:
    """What people want to know of a job, in order."""
    given = {name: value for name, value in job["hyperparams"].items() if value is not None}
    events = [f"{event['message']}" for event in job["events"]]
    files = {name: [file["filename"] for file in job[name]] for name in ("training_files", "validation_files")}
    return {
        "id": job["id"],
        "status": "paused" if job.get("paused") else job["status"],
        "model": job["model"],
        "fine-tuned model": job["fine_tuned_model"],
        "training file": ", ".join(files["training_files"]),
        "validation file": ", ".join(files["validation_files"]) or None,
        "hyperparameters": ", ".join(f"{name} {value}" for name, value in given.items()),
        "last event": events[-1] if events else None,
    }
