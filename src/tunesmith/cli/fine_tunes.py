"""`tunesmith api fine_tunes.*`: create and follow jobs, and read what they left."""

from __future__ import annotations

import argparse
import csv
import io
import sys

from tunesmith.cli.api import show_listed
from tunesmith.cli.connection import connect
from tunesmith.cli.follow import watch
from tunesmith.cli.jobs import COLUMNS, make
from tunesmith.cli.output import Output, UsageError
from tunesmith.cli.tables import Column, time_column
from tunesmith.client import Client, ServerUnreachable
from tunesmith.errors import InvalidRequest

CHECKPOINT_COLUMNS = (
    Column("model", lambda checkpoint: checkpoint["model"]),
    Column("step", lambda checkpoint: checkpoint["step_number"], number=True),
    time_column("created", lambda checkpoint: checkpoint["created_at"]),
)
EVENT_COLUMNS = (
    time_column("created", lambda event: event["created_at"]),
    Column("level", lambda event: event["level"]),
    Column("message", lambda event: event["message"]),
)


def create(args: argparse.Namespace, output: Output) -> int:
    """Uploads what is not yet there, creates the job and, unless told not to, follows it."""
    with connect(args) as client:
        job = make(client, args, output, check_if_files_exist=args.check_if_files_exist)
        if args.no_follow:
            output.show(job)
            return 0
        if output.machine:
            output.record(job)
        output.say(
            f"Created fine-tune: {job['id']}\nStreaming events until fine-tuning is complete...\n\n"
            "(Ctrl-C will interrupt the stream, but not cancel the fine-tune)"
        )
        return _follow(client, job["id"], output)


def follow(args: argparse.Namespace, output: Output) -> int:
    """Past events and those to come, until the job ends: 0 if it succeeded, 1 if not."""
    with connect(args) as client:
        client.get("fine-tunes", args.id)  # a server that is not there is waited for only once it was there
        return _follow(client, args.id, output)


def list_jobs(args: argparse.Namespace, output: Output) -> int:
    """All jobs, oldest first."""
    return show_listed(args, output, COLUMNS, "fine-tunes")


def get(args: argparse.Namespace, output: Output) -> int:
    """One job, with its events."""
    with connect(args) as client:
        output.show(client.get("fine-tunes", args.id))
    return 0


def cancel(args: argparse.Namespace, output: Output) -> int:
    """Ends a job that has not ended."""
    with connect(args) as client:
        output.show(client.post("fine-tunes", args.id, "cancel"))
    return 0


def pause(args: argparse.Namespace, output: Output) -> int:
    """Lets a job rest; its trainer saves what it has."""
    with connect(args) as client:
        output.show(client.post("fine-tunes", args.id, "pause"))
    return 0


def resume(args: argparse.Namespace, output: Output) -> int:
    """Lets a paused job go on."""
    with connect(args) as client:
        output.show(client.post("fine-tunes", args.id, "resume"))
    return 0


def checkpoints(args: argparse.Namespace, output: Output) -> int:
    """The epochs of a job that became models of their own."""
    return show_listed(args, output, CHECKPOINT_COLUMNS, "fine-tunes", args.id, "checkpoints")


def delete(args: argparse.Namespace, output: Output) -> int:
    """Deletes a job, where the server allows it."""
    with connect(args) as client:
        output.show(client.delete("fine-tunes", args.id))
    return 0


def events(args: argparse.Namespace, output: Output) -> int:
    """The events so far."""
    if args.stream:
        raise UsageError(f"--stream is gone. Use `tunesmith api fine_tunes.follow -i {args.id}`.")
    return show_listed(args, output, EVENT_COLUMNS, "fine-tunes", args.id, "events")


def results(args: argparse.Namespace, output: Output) -> int:
    """results.csv as it is; with --json a list of rows, empty cells null."""
    with connect(args) as client:
        files = client.get("fine-tunes", args.id)["result_files"]
        if not files:
            raise InvalidRequest(
                f"No results file available for fine-tune {args.id}: it is written when the job succeeds. "
                f"Wait for it with `tunesmith api fine_tunes.follow -i {args.id}`.",
                param="id",
            )
        text = client.content(files[0]["id"]).decode()
    if output.machine:
        rows = csv.DictReader(io.StringIO(text))
        output.show([{name: float(cell) if cell else None for name, cell in row.items()} for row in rows])
    else:
        sys.stdout.write(text)
    return 0


def _status(client: Client, job_id: str) -> str:
    try:
        status: str = client.get("fine-tunes", job_id)["status"]
    except ServerUnreachable:
        return "there, but its server does not answer"
    return status


def _follow(client: Client, job_id: str, output: Output) -> int:
    try:
        job = watch(client, job_id, output)
    except KeyboardInterrupt:
        output.say(
            f"\nStream interrupted. Job is still {_status(client, job_id)}.\nTo resume the stream, run:\n\n"
            f"  tunesmith api fine_tunes.follow -i {job_id}\n\nTo cancel your job, run:\n\n"
            f"  tunesmith api fine_tunes.cancel -i {job_id}\n"
        )
        return 0
    if output.machine:
        output.record(job)
    elif job["status"] == "succeeded":
        output.say(
            "\nJob complete! Status: succeeded 🎉\nTry out your fine-tuned model:\n\n"
            f"  tunesmith api completions.create -m {job['fine_tuned_model']} -p <YOUR_PROMPT>"
        )
    else:
        output.say(f"\nJob ended. Status: {job['status']}")
    return 0 if job["status"] == "succeeded" else 1
