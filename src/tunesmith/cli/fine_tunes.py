"""`tunesmith api fine_tunes.*`: create and follow jobs, and read what they left."""

from __future__ import annotations

import argparse
import csv
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from tunesmith.cli.connection import connect
from tunesmith.cli.follow import watch
from tunesmith.cli.output import Output, UsageError
from tunesmith.cli.uploads import upload
from tunesmith.client import ApiError, Client
from tunesmith.errors import InvalidRequest

HYPERPARAMETERS = (
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
)


def create(args: argparse.Namespace, output: Output) -> int:
    """Uploads what is not yet there, creates the job and, unless told not to, follows it."""
    with connect(args) as client:
        body = {"training_file": _file_id(client, args.training_file, args.check_if_files_exist, output)}
        if args.validation_file is not None:
            body["validation_file"] = _file_id(client, args.validation_file, args.check_if_files_exist, output)
        body |= {name: getattr(args, name) for name in HYPERPARAMETERS if getattr(args, name) is not None}
        job = client.post("fine-tunes", body=body)
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
        return _follow(client, args.id, output)


def list_jobs(args: argparse.Namespace, output: Output) -> int:
    """All jobs, oldest first."""
    with connect(args) as client:
        output.show(client.get("fine-tunes"))
    return 0


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
    with connect(args) as client:
        output.show(client.get("fine-tunes", args.id, "checkpoints"))
    return 0


def delete(args: argparse.Namespace, output: Output) -> int:
    """Deletes a job, where the server allows it."""
    with connect(args) as client:
        output.show(client.delete("fine-tunes", args.id))
    return 0


def events(args: argparse.Namespace, output: Output) -> int:
    """The events so far."""
    if args.stream:
        raise UsageError(f"--stream is gone. Use `tunesmith api fine_tunes.follow -i {args.id}`.")
    with connect(args) as client:
        output.show(client.get("fine-tunes", args.id, "events"))
    return 0


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


def _follow(client: Client, job_id: str, output: Output) -> int:
    try:
        job = watch(client, job_id, output)
    except KeyboardInterrupt:
        status = client.get("fine-tunes", job_id)["status"]
        output.say(
            f"\nStream interrupted. Job is still {status}.\nTo resume the stream, run:\n\n"
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


def _file_id(client: Client, name: str, check_if_exists: bool, output: Output) -> str:
    """The id behind what -t or -v was given: an id as it is, else a local file or a URL, uploaded."""
    try:
        client.get("files", name)
    except ApiError as error:
        if error.status >= 500 or error.status in (401, 403):
            raise
    else:
        return name
    if Path(name).is_file():
        known = _uploaded_before(client, name) if check_if_exists else []
        return _chosen(known, name, output) or _upload(client, name, name, output)
    if name.lower().startswith(("http://", "https://")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "download.jsonl"
            _download(name, path)
            return _upload(client, str(path), name, output)
    return name  # the server's own words for an unknown file say it best


def _uploaded_before(client: Client, path: str) -> list[str]:
    """Ids of uploaded training files of the same base name and size."""
    size_bytes = Path(path).stat().st_size
    return [
        file["id"]
        for file in client.get("files")["data"]
        if file["purpose"] == "fine-tune"
        and file["bytes"] == size_bytes
        and Path(file["filename"]).name == Path(path).name
    ]


def _chosen(known: list[str], path: str, output: Output) -> str | None:
    """The id to use again, if somebody is there to ask and wants it."""
    if not known or output.machine:
        return None
    output.say(f"Files of the same name ({Path(path).name}), purpose and size are on the server already:")
    output.say("\n".join(known))
    while True:
        try:
            answer = input("\nEnter a file id to use it again, or nothing to upload this file anyway: ").strip()
        except EOFError:
            answer = ""
        if answer == "":
            return None
        if answer in known:
            output.say(f"Reusing already uploaded file: {answer}")
            return answer
        output.say(f"File id '{answer}' is not one of these.")


def _upload(client: Client, path: str, shown_as: str, output: Output) -> str:
    file: dict[str, Any] = upload(client, path, "fine-tune", filename=shown_as)
    output.say(f"Uploaded file from {shown_as}: {file['id']}")
    file_id: str = file["id"]
    return file_id


def _download(url: str, path: Path) -> None:
    """Raises UsageError if the URL cannot be read."""
    try:
        with httpx.stream("GET", url, follow_redirects=True) as response, path.open("wb") as file:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                file.write(chunk)
    except httpx.HTTPError as error:
        raise UsageError(f"{url} cannot be downloaded: {error}.") from error
