"""`tunesmith api fine_tuning.job.*`: jobs asked for and shown in the shape that the clients of late 2023 read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from typing import Any

from tunesmith.cli.connection import connect
from tunesmith.cli.job_files import file_id
from tunesmith.cli.output import Output
from tunesmith.cli.tables import Column, show_list, time_column
from tunesmith.client import Client
from tunesmith.core.requests import DEFAULT_MODEL

JOB = ("fine_tuning", "jobs")
COLUMNS = (
    Column("id", lambda job: job["id"]),
    Column("model", lambda job: job["model"]),
    Column("status", lambda job: job["status"]),
    Column("fine tuned model", lambda job: job["fine_tuned_model"]),
    time_column("created", lambda job: job["created_at"]),
    time_column("finished", lambda job: job["finished_at"]),
)
EVENT_COLUMNS = (
    time_column("created", lambda event: event["created_at"]),
    Column("level", lambda event: event["level"]),
    Column("type", lambda event: event["type"]),
    Column("message", lambda event: event["message"]),
)


def create(args: argparse.Namespace, output: Output) -> int:
    """Uploads what is not yet there and creates the job."""
    with connect(args) as client:
        body: dict[str, Any] = {"model": args.model or DEFAULT_MODEL}
        for name in ("training_file", "validation_file"):
            if (file := getattr(args, name)) is not None:
                body[name] = file_id(client, file, args.check_if_files_exist, output)
        if args.suffix is not None:
            body["suffix"] = args.suffix
        if args.n_epochs is not None:
            body["hyperparameters"] = {"n_epochs": args.n_epochs}
        output.show(client.post(*JOB, body=body))
    return 0


def list_jobs(args: argparse.Namespace, output: Output) -> int:
    """Every job, one JSON object after the other as published; with --json as one list, with -o as a table or CSV."""
    with connect(args) as client:
        jobs = list(_pages(client, *JOB))
    if output.format is not None:
        show_list(output, jobs, COLUMNS)
        return 0
    for job in jobs:
        output.show(job)
    if not jobs:
        output.say("No fine-tuning jobs found.")
    return 0


def get(args: argparse.Namespace, output: Output) -> int:
    """One job."""
    with connect(args) as client:
        output.show(client.get(*JOB, args.id))
    return 0


def cancel(args: argparse.Namespace, output: Output) -> int:
    """Ends a job."""
    with connect(args) as client:
        output.show(client.post(*JOB, args.id, "cancel"))
    return 0


def events(args: argparse.Namespace, output: Output) -> int:
    """The events of a job, newest first; printed as `list_jobs` prints jobs."""
    with connect(args) as client:
        found = list(islice(_pages(client, *JOB, args.id, "events"), args.limit))
    if output.format is not None:
        show_list(output, found, EVENT_COLUMNS)
        return 0
    for event in found:
        output.show(event)
    return 0


def _pages(client: Client, *segments: str) -> Iterator[dict[str, Any]]:
    """The objects of a list that comes in pages."""
    after: dict[str, str] = {}
    more = True
    while more:
        page = client.get(*segments, **after)
        yield from page["data"]
        more = page["has_more"] and bool(page["data"])
        after = {"after": str(page["last_id"])}
