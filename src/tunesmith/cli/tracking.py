"""`tunesmith wandb sync` and `tunesmith export`: jobs that have succeeded, brought to a tracker."""

from __future__ import annotations

import argparse
import csv
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.cli.connection import connect
from tunesmith.cli.output import Output, UsageError
from tunesmith.client import ApiError, Client
from tunesmith.errors import InvalidRequest
from tunesmith.tracking.base import KINDS, AlreadyTracked, Attachment, Subject, TrackerUnusable, open_run

DETAILS = "fine_tune_details.json"
MODEL = "model_metadata.json"
WEIGHTS = "model.zip"
DATA = (("training_files", "training_file"), ("validation_files", "validation_file"), ("result_files", "result_file"))
"""What the job object calls its files, each a list of at most one, and what config calls that one."""


def sync(args: argparse.Namespace, output: Output) -> int:
    """One run for each job; those that are there already are passed over."""
    if args.n_fine_tunes is not None and args.n_fine_tunes < 1:
        raise UsageError(f"-n/--n_fine_tunes must be at least 1; you gave {args.n_fine_tunes}.")
    told: list[dict[str, str]] = []
    with connect(args) as client:
        if args.id is not None:
            jobs = [client.get("fine-tunes", args.id)]
        else:
            jobs = client.get("fine-tunes")["data"][-(args.n_fine_tunes or 0) :]
        for job in jobs:
            try:
                where = bring(client, job, "wandb", _subject(job, args), output, force=args.force, weights=args.weights)
                told.append({"job": job["id"], "where": where})
                output.say(f"Synced {job['id']}: {where}")
            except (AlreadyTracked, InvalidRequest) as error:
                if args.id is not None and isinstance(error, InvalidRequest):
                    raise
                told.append({"job": job["id"], "skipped": error.message})
                if args.id is not None or args.n_fine_tunes is not None:
                    output.say(error.message)
    if output.machine:
        output.show(told)
    elif any("where" in one for one in told):
        output.say("🎉 wandb sync completed successfully")
    else:
        output.say("No new successful fine-tunes were found")
    return 0


def export(args: argparse.Namespace, output: Output) -> int:
    """One job to one tracker."""
    with connect(args) as client:
        job = client.get("fine-tunes", args.job)
        subject = _subject(job, args, name=args.name, tags=tuple(args.tag))
        folder = None if args.folder is None else Path(args.folder).expanduser()
        where = bring(client, job, args.to, subject, output, folder=folder, force=args.force, weights=args.weights)
    if output.machine:
        output.show({"job": job["id"], "where": where})
    output.say(f"Exported {job['id']}: {where}")
    return 0


def bring(
    client: Client,
    job: Mapping[str, Any],
    kind: str,
    subject: Subject,
    output: Output,
    *,
    folder: Path | None = None,
    force: bool = False,
    weights: bool = False,
) -> str:
    """A job, whole, to a tracker; where it is then.

    Raises InvalidRequest for a job without results, AlreadyTracked, TrackerUnusable and TrackerUnreachable.
    """
    if job["status"] != "succeeded" or not job["result_files"]:
        raise InvalidRequest(
            f"Fine-tune {job['id']} is {job['status']} and has no results: only one that has succeeded can be brought "
            "anywhere.",
            param="id",
        )
    rows = list(_rows(client.content(job["result_files"][0]["id"])))
    try:
        run = open_run(kind, subject, folder=folder, force=force)
    except TrackerUnusable as error:
        raise TrackerUnusable(f"{KINDS[kind].title} cannot be used: {error.message}.") from error
    for step, values in rows:
        run.log(step, values)
    with tempfile.TemporaryDirectory() as beside:  # until `end`, which may read the files only then
        for attachment in _attachments(client, job, Path(beside), output, weights=weights):
            run.attach(attachment)
        run.end({"status": job["status"], "fine_tuned_model": job["fine_tuned_model"]})
    return run.where


def _subject(
    job: Mapping[str, Any], args: argparse.Namespace, name: str | None = None, tags: tuple[str, ...] = ()
) -> Subject:
    """The config is the whole job, as the published command has it: of each list of files the first."""
    config = {key: value for key, value in job.items() if key != "events"}
    for listed, single in DATA:
        files = config.pop(listed)
        config[single] = files[0] if files else None
    return Subject(job["id"], args.project, config, name=name, entity=args.entity, tags=tags)


def _rows(content: bytes) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, what was measured at it), of results.csv."""
    for row in csv.DictReader(io.StringIO(content.decode())):
        step = int(row.pop("step"))
        yield step, {name: float(cell) for name, cell in row.items() if cell}


def _attachments(
    client: Client, job: Mapping[str, Any], folder: Path, output: Output, *, weights: bool
) -> Iterator[Attachment]:
    """The job's files, the job itself, its model. What is no longer on the server is said, and left out."""
    for kind, _ in DATA:
        for file in job[kind]:
            name, path = Path(file["filename"]).name.lstrip(".") or file["id"], folder / file["id"]
            if _downloaded(client, ("files", file["id"], "content"), path, output, f"File {file['id']} ({name})"):
                yield Attachment(path, name, kind, file["id"])  # type: ignore[arg-type]
    details = folder / DETAILS
    details.write_text(json.dumps(dict(job), indent=2))
    yield Attachment(details, DETAILS, "fine_tune_details", job["id"])
    model, metadata = job["fine_tuned_model"], folder / MODEL
    if _downloaded(client, ("models", model), metadata, output, f"Model {model}"):
        yield Attachment(metadata, MODEL, "model", job["id"])
        if weights and _downloaded(client, ("models", model, "weights"), folder / WEIGHTS, output, "Its weights"):
            yield Attachment(folder / WEIGHTS, WEIGHTS, "model", job["id"])


def _downloaded(client: Client, segments: tuple[str, ...], path: Path, output: Output, what: str) -> bool:
    try:
        with path.open("wb") as file:
            client.download(*segments, to=file)
    except ApiError as error:
        if error.status != 404:
            raise
        output.say(f"{what} is no longer on the server and is left out.")
        return False
    return True
