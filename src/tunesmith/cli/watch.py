"""`tunesmith jobs watch`, and what waits for a job: events until it has ended."""

from __future__ import annotations

from tunesmith.cli.follow import watch
from tunesmith.cli.output import Output
from tunesmith.client import Client


def watch_job(client: Client, job_id: str, output: Output) -> int:
    """Shows a job until it has ended; 0 if it succeeded, 1 if not."""
    job = watch(client, job_id, output)
    if output.machine:
        output.record(job)
    return 0 if job["status"] == "succeeded" else 1
