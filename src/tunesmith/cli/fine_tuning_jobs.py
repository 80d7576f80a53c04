"""`tunesmith api fine_tuning.job.list` and `get`: jobs in the shape that the clients of late 2023 read."""

from __future__ import annotations

import argparse

from tunesmith.cli.connection import connect
from tunesmith.cli.output import Output
from tunesmith.cli.tables import Column, show_list, time_column
from tunesmith.client import Client

COLUMNS = (
    Column("id", lambda job: job["id"]),
    Column("model", lambda job: job["model"]),
    Column("status", lambda job: job["status"]),
    Column("fine tuned model", lambda job: job["fine_tuned_model"]),
    time_column("created", lambda job: job["created_at"]),
    time_column("finished", lambda job: job["finished_at"]),
)


def list_jobs(args: argparse.Namespace, output: Output) -> int:
    """Every job, one JSON object after the other as published; with --json as one list, with -o as a table or CSV."""
    with connect(args) as client:
        jobs = _pages(client)
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
        output.show(client.get("fine_tuning", "jobs", args.id))
    return 0


def _pages(client: Client) -> list[dict[str, object]]:
    jobs: list[dict[str, object]] = []
    more = True
    while more:
        after = {"after": str(jobs[-1]["id"])} if jobs else {}
        page = client.get("fine_tuning", "jobs", **after)
        jobs += page["data"]
        more = page["has_more"] and bool(page["data"])
    return jobs
