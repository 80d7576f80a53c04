"""What a person saved from an OpenAI account, read from a folder. Knows the objects of that API; asks no server.

Nobody's folder looks like another's, so names decide little: JSON that holds objects of the API (`file`, `fine-tune`,
`fine_tuning.job`, their events, lists of them, one or one a line) says what there was; every other file is the content
of what its path names by id (`files/file-abc123.jsonl`, `results/ft-abc123.csv`), or by its filename and size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_OBJECTS_BYTES = 64 * 1024 * 1024
"""A larger file is content and no list of objects."""
JOB_KINDS = ("fine-tune", "fine_tuning.job")
EVENT_KINDS = ("fine-tune-event", "fine_tuning.job.event")
OBJECT_KINDS = ("file", *JOB_KINDS, *EVENT_KINDS)
FINE_TUNE, RESULTS = "fine-tune", "fine-tune-results"
HYPERPARAMETERS = (
    "n_epochs",
    "batch_size",
    "learning_rate_multiplier",
    "prompt_loss_weight",
    "compute_classification_metrics",
    "classification_n_classes",
    "classification_positive_class",
    "classification_betas",
)
ID = re.compile(r"(?:file|ftjob|ft)-[A-Za-z0-9_-]+")
LEGACY_NAME = re.compile(r"[^:]+:ft-[^:]+:(.+)-\d{4}(?:-\d\d){5}")
MODERN_NAME = re.compile(r"ft:[^:]+:[^:]*:([^:]+):[^:]+")


@dataclass(frozen=True, slots=True)
class OldFile:
    """A file of the account."""

    id: str
    filename: str
    purpose: str
    path: Path | None
    """Its content; None where only the object was saved."""


@dataclass(frozen=True, slots=True)
class OldJob:
    """A fine-tune of the account, of either API."""

    id: str
    model: str
    """What it was trained from."""
    status: str
    fine_tuned_model: str | None
    created_unix: int
    training_file: str | None
    """Id of a file, as the next ones."""
    validation_file: str | None
    result_file: str | None
    hyperparameters: Mapping[str, Any]
    """Those that a job here takes too, as they were in the end; `auto` left out."""
    suffix: str | None
    seed: int | None
    record: Mapping[str, Any]
    """The object as it was saved, with the events that were saved apart."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something in the folder that says nothing, and why."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class Export:
    """All that was found."""

    files: Mapping[str, OldFile]
    """By id."""
    jobs: Sequence[OldJob]
    """Oldest first."""
    skipped: Sequence[Skipped]


def read_export(folder: Path) -> Export:
    """Everything under `folder`. Links are not followed. Raises OSError where it cannot be read."""
    found = _Found()
    for path in sorted(_files_under(folder)):
        name = str(path.relative_to(folder))
        try:
            if path.is_symlink():
                found.skipped.append(Skipped(name, "it is a link"))
            elif not _take_objects(path, found):
                found.contents.append(path)
        except (ValueError, RecursionError) as error:
            found.skipped.append(Skipped(name, f"it is not what its name says: {error}"))
    return found.export(folder)


def _files_under(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files_under(path)
        else:
            yield path


@dataclass(slots=True)
class _Found:
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: dict[str, list[Any]] = field(default_factory=dict)
    contents: list[Path] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def take(self, value: Any, job_id: str | None) -> int:
        """Objects anywhere in a JSON value; how many there were. `job_id` is whose the events are, by their file."""
        if isinstance(value, list):
            return sum(self.take(item, job_id) for item in value)
        if not isinstance(value, dict):
            return 0
        kind = value.get("object")
        if kind not in OBJECT_KINDS:
            return sum(self.take(item, job_id) for item in value.values())
        if kind in EVENT_KINDS:
            self.events.setdefault(job_id or "", []).append(value)
        elif ID.fullmatch(str(value.get("id"))):
            known = self.files if kind == "file" else self.jobs
            known[value["id"]] = known.get(value["id"], {}) | value
            for listed in ("training_files", "validation_files", "result_files"):
                self.take(value.get(listed), None)
        else:
            self.skipped.append(Skipped(f"an object `{kind}`", f"{str(value.get('id'))[:40]!r} is no id of one"))
        return 1

    def export(self, folder: Path) -> Export:
        """With each content at its file."""
        paths: dict[str, Path] = {}
        for path in self.contents:
            name = path.relative_to(folder)
            file_id = self._owner(name, path.stat().st_size)
            if file_id is None:
                reason = "its path holds no id of a file or a job, and its name and size are not those of one file"
                self.skipped.append(Skipped(str(name), reason))
            elif file_id in paths:
                reason = f"{paths[file_id].relative_to(folder)} is the content of {file_id} already"
                self.skipped.append(Skipped(str(name), reason))
            else:
                paths[file_id] = path
        files = {
            file_id: OldFile(
                id=file_id,
                filename=str(value.get("filename") or f"{file_id}.jsonl"),
                purpose=_purpose(str(value.get("purpose"))),
                path=paths.get(file_id),
            )
            for file_id, value in self.files.items()
        }
        jobs = sorted((self._job(value) for value in self.jobs.values()), key=lambda job: (job.created_unix, job.id))
        return Export(files, jobs, self.skipped)

    def _owner(self, path: Path, size_bytes: int) -> str | None:
        """The id of the file whose content this is; None where nothing says so, or several things do."""
        for text in ID.findall(str(path)):
            named = next((name for name in _shorter(text) if name in self.files or name in self.jobs), text)
            purpose = RESULTS if path.suffix.lower() == ".csv" else FINE_TUNE
            if named in self.jobs:
                purpose, job = RESULTS, self.jobs[named]
                named = (_ids(job.get("result_files")) or [f"file-of-{named}"])[0]
                job["result_files"] = [named]
            elif not named.startswith("file-"):
                continue
            self.files.setdefault(named, {"id": named, "purpose": purpose, "filename": path.name})
            return str(named)
        alike = [
            file_id
            for file_id, value in self.files.items()
            if Path(str(value.get("filename"))).name == path.name and value.get("bytes") == size_bytes
        ]
        return alike[0] if len(alike) == 1 else None

    def _job(self, value: Mapping[str, Any]) -> OldJob:
        hyperparameters = value.get("hyperparams") or value.get("hyperparameters") or {}
        method = (value.get("method") or {}).get("supervised") or {}
        hyperparameters = {**(method.get("hyperparameters") or {}), **hyperparameters}
        name = value.get("fine_tuned_model")
        results = _ids(value.get("result_files"))
        training = _ids(value.get("training_files")) or _ids(value.get("training_file"))
        validation = _ids(value.get("validation_files")) or _ids(value.get("validation_file"))
        events = self.events.get(value["id"])
        return OldJob(
            id=value["id"],
            model=str(value.get("model")),
            status=str(value.get("status")),
            fine_tuned_model=name,
            created_unix=int(value.get("created_at") or 0),
            training_file=training[0] if training else None,
            validation_file=validation[0] if validation else None,
            result_file=results[0] if results else None,
            hyperparameters={
                key: hyperparameters[key] for key in HYPERPARAMETERS if hyperparameters.get(key) not in (None, "auto")
            },
            suffix=value.get("user_provided_suffix") or value.get("suffix") or suffix_of(name),
            seed=value.get("seed"),
            record=dict(value) if events is None else {**value, "events": events},
        )


def suffix_of(name: str | None) -> str | None:
    """What the user added to the name of a model.

    >>> suffix_of("curie:ft-acme:sentiment-2023-01-31-10-20-30")
    'sentiment'
    >>> suffix_of("ft:gpt-3.5-turbo-0613:acme:support:8aBcDeF")
    'support'
    >>> suffix_of("curie:ft-acme-2023-01-31-10-20-30")
    """
    match = LEGACY_NAME.fullmatch(name or "") or MODERN_NAME.fullmatch(name or "")
    return None if match is None else match[1]


def _take_objects(path: Path, found: _Found) -> bool:
    """Whether a file is of objects, which are then taken. Raises ValueError for one that is so in part."""
    if path.suffix.lower() not in (".json", ".jsonl", ".ndjson", ".txt") or path.stat().st_size > MAX_OBJECTS_BYTES:
        return False
    content = path.read_bytes().lstrip(b"\xef\xbb\xbf \t\r\n")
    if not content.startswith((b"{", b"[")):
        return False
    named = ID.search(path.name)
    job_id = None if named is None or named[0].startswith("file-") else named[0]
    try:
        return found.take(json.loads(content), job_id) > 0
    except ValueError:
        lines = [line for line in content.splitlines() if line.strip()]
    if b'"object"' not in lines[0]:  # rows of training data, most likely: whoever takes them checks them
        return False
    return sum([found.take(json.loads(line), job_id) for line in lines]) > 0


def _purpose(purpose: str) -> str:
    """Early objects and those within jobs call training data by what it was used for."""
    return FINE_TUNE if purpose in ("None", "fine-tune-train", "fine-tune-valid") else purpose


def _shorter(text: str) -> Iterator[str]:
    """An id, and what is left of it without words that may have been added: ft-abc123_results, ft-abc123."""
    yield text
    for word in reversed(list(re.finditer(r"[_-]", text))):
        yield text[: word.start()]


def _ids(value: Any) -> list[str]:
    """Ids of files, given as one id, or a list of ids or of objects."""
    values = value if isinstance(value, list) else [value]
    return [item["id"] if isinstance(item, dict) else item for item in values if item]
