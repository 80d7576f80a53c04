"""`tunesmith import openai-export`: what was saved from an OpenAI account becomes files, jobs and names here."""

from __future__ import annotations

import argparse
import base64
import binascii
import filecmp
import json
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.cli.connection import connect
from tunesmith.cli.output import Output, UsageError
from tunesmith.cli.uploads import upload
from tunesmith.client import ApiError, Client
from tunesmith.core.requests import MAX_SUFFIX_CHARACTERS
from tunesmith.data.chat import Chat
from tunesmith.data.formats import read_examples
from tunesmith.errors import InvalidRequest
from tunesmith.openai_export import FINE_TUNE, RESULTS, Export, OldFile, OldJob, read_export

SUCCESSORS = {"babbage-002": "babbage", "davinci-002": "davinci"}
"""Bases of late 2023, and those of the same name here."""
RECORDS = "user_data"
"""Purpose of the files that keep the jobs' records."""


def import_openai_export(args: argparse.Namespace, output: Output) -> int:
    """First what the folder holds, then what becomes of it."""
    folder = Path(args.folder).expanduser()
    try:
        export = read_export(folder)
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}.") from error
    if not export.files and not export.jobs:
        raise UsageError(
            f"{folder} holds no saved files, fine-tunes or jobs of an OpenAI account. What it may hold: "
            "docs/coming-home.md."
        )
    with connect(args) as client, tempfile.TemporaryDirectory() as beside:
        homecoming = _Homecoming(
            client, export, output, Path(beside), bases=_bases(args.base), dry_run=args.dry_run, retrain=args.retrain
        )
        homecoming.bring_files()
        homecoming.bring_jobs()
    homecoming.report(args.folder)
    return 0


def _bases(given: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for old, sign, new in pairs:
        if not (old and sign and new):
            raise UsageError(f"--base is OLD=NEW, as in gpt-3.5-turbo-0613=curie; you gave {old + sign + new!r}.")
    return {old: new for old, _, new in pairs}


@dataclass(slots=True)
class _Homecoming:
    client: Client
    export: Export
    output: Output
    beside: Path
    """A folder for contents that are not taken as they are."""
    bases: Mapping[str, str]
    dry_run: bool
    retrain: bool
    here: dict[str, str] = field(default_factory=dict)
    """Ids of files here, by their ids there; in a dry run those that would come have an empty one."""
    refused: dict[str, str] = field(default_factory=dict)
    """Why files do not come, by their ids there."""
    told: list[dict[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    """What to run next, where --retrain was not given."""
    _listed: list[dict[str, Any]] = field(default_factory=list)

    def bring_files(self) -> None:
        """Training data and results, then the records of the jobs."""
        self._listed = self.client.get("files")["data"]
        for skipped in self.export.skipped:
            self._tell("path", skipped.what, skipped=skipped.reason)
        for file in self.export.files.values():
            name, job = Path(file.filename).name, self._job_of_results(file.id)
            if job is not None:  # they all have one name there
                name = f"{job.id}/{name}"
            if file.path is None:
                self._refuse(file.id, f"{file.id} ({name})", "its content is not in the folder")
                continue
            self._bring_file(file.id, _as_taken(file, self.beside), name, file.purpose)
        for job in self.export.jobs:
            record = self.beside / f"{job.id}.json"
            record.write_text(json.dumps(job.record, indent=2, sort_keys=True))
            self._bring_file(job.id, record, record.name, RECORDS)

    def bring_jobs(self) -> None:
        """Oldest first, so that a model comes before what was trained on from it."""
        models = {model["id"]: model for model in self.client.get("models")["data"]}
        for job in self.export.jobs:
            reason = self._obstacle(job, models)
            if reason is not None:
                self._tell("job", job.id, skipped=reason)
                continue
            alias = str(job.fine_tuned_model)
            body = self._body(job)
            if alias in models and not _is_stale(models[alias]):
                self._tell("job", job.id, here=alias, note=str(models[alias]["description"] or "a model here"))
            elif not self.retrain or self.dry_run:
                self._tell("job", job.id, to_come=f"retrain {body['model']} as {alias}")
                if not self.dry_run:
                    self.commands.append(_command(body))
            else:
                self._retrain(job, alias, body, models)

    def report(self, folder: str) -> None:
        """What came of it, for machines, or what is next, for people."""
        if self.output.machine:
            self.output.show({"dry_run": self.dry_run, "items": self.told, "next": self.commands})
            return
        if self.dry_run:
            self.output.say("\nNothing was changed. Without --dry-run all of this comes.")
        elif self.commands:
            self.output.say(
                "\nTo train these models again, so that their old names answer:\n\n"
                f"  tunesmith import openai-export {shlex.quote(folder)} --retrain\n\nor one at a time:\n"
            )
            for command in self.commands:
                self.output.say(f"  {command}")

    def _job_of_results(self, file_id: str) -> OldJob | None:
        return next((job for job in self.export.jobs if job.result_file == file_id), None)

    def _bring_file(self, old_id: str, content: Path, name: str, purpose: str) -> None:
        what = f"{old_id} ({name})"
        known = self._known(content, name, purpose)
        if known is not None:
            self.here[old_id] = known
            self._tell("file", what, here=known)
            return
        try:
            self.here[old_id] = self._send(content, name, purpose)
        except InvalidRequest as error:
            self._refuse(old_id, what, error.message)
        else:
            outcome = {"to_come": "upload"} if self.dry_run else {"came": self.here[old_id]}
            self._tell("file", what, **outcome)

    def _send(self, content: Path, name: str, purpose: str) -> str:
        """The new id of a file; "" in a dry run. Raises InvalidRequest for what the server does not take."""
        if self.dry_run:
            _check(content, purpose)
            return ""
        try:
            uploaded = upload(self.client, str(content), purpose, filename=name)
        except ApiError as error:
            if error.status != 400:
                raise
            raise InvalidRequest(error.message) from error
        self._listed.append(uploaded)
        return str(uploaded["id"])

    def _known(self, content: Path, name: str, purpose: str) -> str | None:
        """The id of a file here with this name, purpose and content."""
        alike = (name, purpose, content.stat().st_size)
        for file in self._listed:
            if (file["filename"], file["purpose"], file["bytes"]) == alike:
                there = self.beside / "there"
                with there.open("wb") as opened:
                    self.client.download("files", file["id"], "content", to=opened)
                if filecmp.cmp(content, there, shallow=False):
                    return str(file["id"])
        return None

    def _obstacle(self, job: OldJob, models: Mapping[str, Any]) -> str | None:
        """Why a job cannot be done again; None if it can."""
        if job.status != "succeeded" or job.fine_tuned_model is None:
            return f"it is {job.status} there, and has no model to train again"
        if job.training_file is None:
            return "its object names no training file"
        for file_id in (job.training_file, job.validation_file):
            if file_id is not None and file_id not in self.here:
                reason = self.refused.get(file_id, "it is not in the folder")
                return f"its file {file_id} did not come: {reason}"
        base = self._base(job)
        if base in models or (self._comes_before(job) and (self.dry_run or not self.retrain)):
            return None
        if ":" in base:
            return f"it goes on from {base}, which is no model here"
        return (
            f"there is no base {base} here; name another with --base {job.model}=..., such as --base {job.model}=curie"
        )

    def _comes_before(self, job: OldJob) -> bool:
        return any(other.fine_tuned_model == job.model for other in self.export.jobs)

    def _base(self, job: OldJob) -> str:
        return self.bases.get(job.model) or SUCCESSORS.get(job.model, job.model)

    def _body(self, job: OldJob) -> dict[str, Any]:
        body: dict[str, Any] = {"training_file": self.here[str(job.training_file)] or job.training_file}
        if job.validation_file is not None:
            body["validation_file"] = self.here[job.validation_file] or job.validation_file
        body |= {"model": self._base(job), **job.hyperparameters, "alias": job.fine_tuned_model}
        ours = {"suffix": job.suffix and job.suffix[:MAX_SUFFIX_CHARACTERS], "seed": job.seed}
        return body | {name: value for name, value in ours.items() if value is not None}

    def _retrain(self, job: OldJob, alias: str, body: dict[str, Any], models: dict[str, Any]) -> None:
        try:
            started = self.client.post("fine-tunes", body=body)
        except ApiError as error:
            if error.status not in (400, 404):
                raise
            self._tell("job", job.id, skipped=error.message)
            return
        models[alias] = self.client.get("models", alias)
        self._tell("job", job.id, came=started["id"], note=f"trains {body['model']}; will answer to {alias}")

    def _refuse(self, file_id: str, what: str, reason: str) -> None:
        self.refused[file_id] = reason
        self._tell("file", what, skipped=reason)

    def _tell(self, kind: str, what: str, **outcome: str) -> None:
        self.told.append({"kind": kind, "what": what, **outcome})
        words = {"here": "here already:", "came": "came as", "to_come": "to come:", "skipped": "left out:"}
        text = " ".join(f"{words.get(name, '-')} {value}" for name, value in outcome.items())
        self.output.say(f"{kind:5}{what}: {text}")


def _check(content: Path, purpose: str) -> None:
    """As the server does when training data arrives. Raises InvalidRequest."""
    if purpose == FINE_TUNE:
        with content.open("rb") as lines:
            for _ in read_examples(lines, Chat.plain()):
                pass


def _is_stale(model: Mapping[str, Any]) -> bool:
    """Whether a name waits for a job that has ended without a model."""
    return "alias" in model and model["alias"]["status"] in ("failed", "cancelled")


def _as_taken(file: OldFile, beside: Path) -> Path:
    """The content as this server takes it: results as they are, without base64."""
    assert file.path is not None
    with file.path.open("rb") as opened:
        head = opened.read(4096)
    plain = _decoded(head, file.path) if file.purpose == RESULTS else None
    if plain is not None:
        (beside / file.id).write_bytes(plain)
        return beside / file.id
    return file.path


def _decoded(head: bytes, path: Path) -> bytes | None:
    """Results that the API of late 2023 gave in base64; None for plain ones."""
    if head.startswith(b"step,"):
        return None
    try:
        plain = base64.b64decode(path.read_bytes().strip(), validate=True)
    except (binascii.Error, ValueError):
        return None
    return plain if plain.startswith(b"step,") else None


def _command(body: Mapping[str, Any]) -> str:
    """The same job on the published command line, and ours beyond it."""
    words = ["tunesmith", "api", "fine_tunes.create", "--no_follow", "-t", body["training_file"]]
    if "validation_file" in body:
        words += ["-v", body["validation_file"]]
    for name, value in body.items():
        if name in ("training_file", "validation_file") or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return shlex.join(words)
