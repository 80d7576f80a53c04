"""Folders of saved objects, as differently laid out as people lay things out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.openai_export import Export, read_export, suffix_of

OLD_NAME = "curie:ft-acme:sentiment-2023-01-31-10-20-30"
TRAIN = b'{"prompt": "a ->", "completion": " b"}\n'
RESULTS = b"step,training_loss\n1,0.5\n"


def file_object(**fields: Any) -> dict[str, Any]:
    given = {
        "id": "file-train",
        "object": "file",
        "filename": "train.jsonl",
        "purpose": "fine-tune",
        "bytes": len(TRAIN),
    }
    return given | fields


RESULT_FILE = file_object(id="file-results", filename="compiled_results.csv", purpose="fine-tune-results", bytes=25)
LEGACY = {
    "id": "ft-one",
    "object": "fine-tune",
    "model": "curie",
    "created_at": 1675160000,
    "status": "succeeded",
    "fine_tuned_model": OLD_NAME,
    "hyperparams": {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 0.1, "prompt_loss_weight": 0.02},
    "training_files": [file_object(purpose="fine-tune-train")],
    "validation_files": [],
    "result_files": [RESULT_FILE],
    "events": [{"object": "fine-tune-event", "created_at": 1, "level": "info", "message": "Created"}],
}
MODERN = {
    "id": "ftjob-two",
    "object": "fine_tuning.job",
    "model": "gpt-3.5-turbo-0613",
    "created_at": 1699000000,
    "status": "succeeded",
    "fine_tuned_model": "ft:gpt-3.5-turbo-0613:acme:support:8aBcDeF",
    "hyperparameters": {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 2},
    "training_file": "file-chat",
    "validation_file": None,
    "result_files": ["file-chatresults"],
    "seed": 42,
}


def saved(folder: Path, **contents: Any) -> Export:
    """A folder of these files (`__` is a slash, a last `_` a dot before the ending), read."""
    for name, content in contents.items():
        stem, _, ending = name.replace("__", "/").rpartition("_")
        path = folder / f"{stem.replace('9', '-')}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_export(folder)


def test_lists_of_objects_and_contents_by_id(tmp_path: Path) -> None:
    export = saved(
        tmp_path,
        files_json={"object": "list", "data": [file_object(), RESULT_FILE], "has_more": False},
        finetunes_json={"object": "list", "data": [LEGACY]},
        files__file9train_jsonl=TRAIN,
        files__file9results_csv=RESULTS,
    )
    assert export.skipped == []
    train, results = export.files["file-train"], export.files["file-results"]
    assert (train.filename, train.purpose) == ("train.jsonl", "fine-tune")
    assert train.path is not None
    assert train.path.read_bytes() == TRAIN
    assert (results.filename, results.purpose) == ("compiled_results.csv", "fine-tune-results")
    (job,) = export.jobs
    assert (job.id, job.model, job.fine_tuned_model, job.suffix) == ("ft-one", "curie", OLD_NAME, "sentiment")
    assert (job.training_file, job.validation_file, job.result_file) == ("file-train", None, "file-results")
    assert job.hyperparameters == LEGACY["hyperparams"]
    assert job.record["events"] == LEGACY["events"]


def test_jobs_of_both_apis_one_object_a_line_oldest_first(tmp_path: Path) -> None:
    lines = b"".join(json.dumps(job).encode() + b"\n" for job in (MODERN, LEGACY))
    export = saved(tmp_path, jobs_jsonl=lines)
    assert [job.id for job in export.jobs] == ["ft-one", "ftjob-two"]
    modern = export.jobs[1]
    assert modern.hyperparameters == {"n_epochs": 3, "learning_rate_multiplier": 2}  # auto is left to the server
    assert (modern.training_file, modern.result_file) == ("file-chat", "file-chatresults")
    assert (modern.suffix, modern.seed) == ("support", 42)


def test_the_newest_shape_keeps_hyperparameters_within_the_method(tmp_path: Path) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 5, "batch_size": 2}}}
    job = MODERN | {"method": method, "hyperparameters": None}
    assert saved(tmp_path, job_json=job).jobs[0].hyperparameters == {"n_epochs": 5, "batch_size": 2}


def test_contents_by_filename_and_size(tmp_path: Path) -> None:
    export = saved(tmp_path, account_json={"files": [file_object()]}, train_jsonl=TRAIN)
    assert export.files["file-train"].path == tmp_path / "train.jsonl"
    other = saved(tmp_path / "other", account_json={"files": [file_object(bytes=9)]}, train_jsonl=TRAIN)
    assert other.files["file-train"].path is None
    assert [(one.what, "name and size" in one.reason) for one in other.skipped] == [("train.jsonl", True)]


def test_results_and_events_by_the_id_of_their_job(tmp_path: Path) -> None:
    events = {"object": "list", "data": [{"object": "fine-tune-event", "message": "Fine-tune succeeded"}]}
    job = {name: value for name, value in LEGACY.items() if name not in ("events", "result_files")}
    export = saved(tmp_path, a_json=job, events__ft9one_json=events, results__ft9one_csv=RESULTS)
    (read,) = export.jobs
    assert read.record["events"] == events["data"]
    assert read.result_file is not None
    assert export.files[read.result_file].path == tmp_path / "results" / "ft-one.csv"


def test_words_beside_an_id(tmp_path: Path) -> None:
    export = saved(tmp_path, all_json=[file_object(), LEGACY], ft9one_results_csv=RESULTS, file9train_final_jsonl=TRAIN)
    assert export.files["file-results"].path == tmp_path / "ft-one_results.csv"
    assert export.files["file-train"].path == tmp_path / "file-train_final.jsonl"


def test_a_content_whose_object_was_not_saved(tmp_path: Path) -> None:
    export = saved(tmp_path, file9abc_jsonl=TRAIN)
    assert export.files["file-abc"].purpose == "fine-tune"
    assert export.files["file-abc"].path == tmp_path / "file-abc.jsonl"


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret")
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "link.jsonl").symlink_to(outside)
    (folder / ".hidden").write_text("x")
    export = saved(
        folder,
        notes_txt=b"remember the milk",
        broken_jsonl=b'{"object": "file", "id": "file-x"}\n{"object": \n',
        files__file9train_jsonl=TRAIN,
        again__file9train_jsonl=TRAIN,
    )
    assert {one.what for one in export.skipped} == {
        "link.jsonl",
        "notes.txt",
        "broken.jsonl",
        "files/file-train.jsonl",
    }
    assert export.files["file-train"].path == folder / "again" / "file-train.jsonl"


@pytest.mark.parametrize("file_id", ["../../file-x", "file-../x", "", None, 7])
def test_ids_that_are_none(tmp_path: Path, file_id: Any) -> None:
    export = saved(tmp_path, files_json=[file_object(id=file_id)])
    assert export.files == {}
    assert [(one.what, "is no id of one" in one.reason) for one in export.skipped] == [("an object `file`", True)]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        read_export(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        (OLD_NAME, "sentiment"),
        ("curie:ft-acme:a-b-2-2023-01-31-10-20-30", "a-b-2"),
        ("curie:ft-acme-2023-01-31-10-20-30", None),
        ("ft:gpt-3.5-turbo-0613:acme:support:8aBcDeF", "support"),
        ("ft:gpt-3.5-turbo-0613:acme::8aBcDeF", None),
        (None, None),
    ],
)
def test_suffix(name: str | None, suffix: str | None) -> None:
    assert suffix_of(name) == suffix
