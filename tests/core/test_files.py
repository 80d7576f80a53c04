from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from tests.core.conftest import World, rows, trained
from tunesmith.core.files import PURPOSES, SWEEP_AFTER_S, Files
from tunesmith.core.schema import files
from tunesmith.data.chat import Chat
from tunesmith.data.formats import Example
from tunesmith.errors import InvalidRequest, NotFound

GOOD = rows(("a ->", " b"), ("c ->", " d"))


def nothing_is_left(world: World) -> bool:
    with world.store.reading() as connection:
        return connection.execute(select(files)).first() is None and not world.leftovers()


def test_an_upload_is_kept_as_it_came(world: World) -> None:
    file = world.files.create(
        world.member, filename="dir/train.jsonl", purpose="fine-tune", chunks=[GOOD[:5], GOOD[5:]]
    )
    assert file.id.startswith("file-")
    assert len(file.id) == 29
    assert (file.filename, file.purpose, file.size_bytes) == ("dir/train.jsonl", "fine-tune", len(GOOD))
    assert (file.status, file.status_details, file.created_unix) == ("processed", None, world.clock.now)
    assert world.files.get(world.owner, file.id) == file
    assert b"".join(world.files.content(world.owner, file.id)) == GOOD
    assert list(world.files.examples(file, Chat.plain())) == [Example("a ->", " b"), Example("c ->", " d")]


def test_lists_are_oldest_first_and_filter_by_purpose(world: World) -> None:
    made = [world.upload(GOOD), world.upload(b"\x89PNG", purpose="vision"), world.upload(GOOD, world.member)]
    assert world.files.list(world.owner) == made
    assert world.files.list(world.owner, "vision") == made[1:2]
    assert world.files.list(world.owner, "unheard-of") == []
    assert world.files.list(world.stranger) == []


def test_other_organizations_files_do_not_exist(world: World) -> None:
    file = world.upload(GOOD)
    for call in (world.files.get, world.files.content, world.files.delete):
        with pytest.raises(NotFound, match=f"No such File object: {file.id}") as caught:
            call(world.stranger, file.id)
        assert caught.value.param == "id"
    assert world.files.get(world.owner, file.id) == file


def test_a_deleted_file_is_gone_with_its_bytes(world: World) -> None:
    file = world.upload(GOOD)
    world.files.delete(world.member, file.id)
    assert world.leftovers() == set()
    assert world.files.list(world.owner) == []
    for call in (world.files.get, world.files.content, world.files.delete):
        with pytest.raises(NotFound):
            call(world.owner, file.id)


@pytest.mark.parametrize("status", ["pending", "running"])
def test_a_file_that_a_job_needs_stays(world: World, status: str) -> None:
    training, validation = world.upload(GOOD), world.upload(GOOD)
    job = world.job(training_file=training.id, validation_file=validation.id)
    if status == "running":
        assert world.jobs.claim("d", 60) is not None
    for file in (training, validation):
        with pytest.raises(InvalidRequest, match=f"{job.id}, which is {status}"):
            world.files.delete(world.owner, file.id)
    world.jobs.cancel(world.owner, job.id)
    world.files.delete(world.owner, training.id)
    assert world.jobs.get(world.owner, job.id).training_file.status == "deleted"


@pytest.mark.parametrize("purpose", PURPOSES)
def test_known_purposes_are_taken(world: World, purpose: str) -> None:
    assert world.upload(GOOD, purpose=purpose).purpose == purpose


@pytest.mark.parametrize("purpose", ["", "fine_tune", "x" * 10_000])
def test_unknown_purposes_are_refused_before_a_byte_is_read(world: World, purpose: str) -> None:
    def unread() -> Iterator[bytes]:
        raise AssertionError
        yield

    with pytest.raises(InvalidRequest, match="`fine-tune`") as caught:
        world.upload(unread(), purpose=purpose)
    assert caught.value.param == "purpose"
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("filename", ["", "a\nb", "a\0b", "a\u2028b", "\x1b[2J", "\ud800", "x" * 1025])
def test_odd_filenames_are_refused(world: World, filename: str) -> None:
    with pytest.raises(InvalidRequest, match="filename"):
        world.files.create(world.owner, filename=filename, purpose="fine-tune", chunks=[GOOD])
    assert nothing_is_left(world)


@pytest.mark.parametrize(
    "filename", ["http://host/a b.jsonl?x=1", "/абв/训练.jsonl", "داده\u200cها\u00a0۱.jsonl", "x" * 1024]
)
def test_paths_and_addresses_are_filenames(world: World, filename: str) -> None:
    file = world.files.create(world.owner, filename=filename, purpose="fine-tune", chunks=[GOOD])
    assert world.files.get(world.owner, file.id).filename == filename


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b"prompt,completion\na,b\n", "Line 1 of the file is not JSON"),
        (GOOD + b'{"prompt":"x"}\n' + GOOD, "Line 3 of the file has no field `completion`"),
        (GOOD + b'{"prompt":"x","completion":"unfinished', "Line 3 of the file is not JSON"),
    ],
)
def test_training_data_is_checked_and_bad_data_leaves_nothing(world: World, content: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        world.upload(content)
    assert caught.value.param == "file"
    assert nothing_is_left(world)


def test_other_purposes_are_any_bytes_but_not_none(world: World) -> None:
    assert world.upload(b"\xff\0", purpose="assistants").size_bytes == 2
    with pytest.raises(InvalidRequest, match="empty"):
        world.upload(b"", purpose="assistants")


def test_a_connection_that_breaks_leaves_nothing(world: World) -> None:
    def broken() -> Iterator[bytes]:
        yield GOOD
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        world.upload(broken())
    assert nothing_is_left(world)


@pytest.mark.parametrize("purpose", ["fine-tune", "assistants"])
def test_too_large_a_file_ends_where_it_is_too_large(world: World, purpose: str) -> None:
    small = Files(world.store, world.blobs, max_upload_bytes=len(GOOD) * 2)
    assert small.create(world.owner, filename="f", purpose=purpose, chunks=[GOOD, GOOD]).size_bytes == 2 * len(GOOD)
    chunks = iter([GOOD, GOOD, GOOD, GOOD])
    with pytest.raises(InvalidRequest, match=f"larger than the {2 * len(GOOD)} bytes"):
        small.create(world.owner, filename="f", purpose=purpose, chunks=chunks)
    assert len(list(chunks)) == 1
    assert len(world.leftovers()) == 1


@pytest.mark.parametrize("line", [b"x" * 999 + b"\n", b"\0" * 1000], ids=["lines", "no lines"])
def test_a_hundred_megabytes_of_garbage_are_refused_at_once(world: World, line: bytes) -> None:
    big = Files(world.store, world.blobs, max_upload_bytes=1_000_000_000)
    taken = 0

    def garbage() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(1600):
            taken += 1
            yield line * 65

    tracemalloc.start()
    with pytest.raises(InvalidRequest, match="Line 1 of the file"):
        big.create(world.owner, filename="garbage", purpose="fine-tune", chunks=garbage())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 20  # a megabyte at most, of a hundred
    assert peak < 8_000_000
    assert nothing_is_left(world)


def test_good_data_is_checked_in_flat_memory(world: World) -> None:
    big = Files(world.store, world.blobs, max_upload_bytes=1_000_000_000)
    chunk = rows(("prompt" * 10_000, " completion"))
    tracemalloc.start()
    big.create(world.owner, filename="f", purpose="fine-tune", chunks=(chunk for _ in range(300)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 7_000_000  # of 18 MB; the doctor looks at the first


def test_the_sweep_takes_what_a_crash_left_and_nothing_else(world: World) -> None:
    """A process that dies between bytes and row, within the bytes, or between row and bytes of a delete."""
    kept = world.upload(GOOD)
    orphan, _ = world.files.keep([GOOD])  # dies before the row
    unfinished = world.home / "files" / "file-unfinished.part"
    unfinished.write_bytes(b"{")
    assert world.files.sweep() == 0  # they may be uploads in progress
    later = time.time() + SWEEP_AFTER_S + 60
    world.clock.now = later
    fresh, _ = world.files.keep([GOOD])
    os.utime(world.home / "files" / fresh, (later, later))
    assert world.files.sweep() == 2
    assert world.leftovers() == {f"files/{kept.id}", f"files/{fresh}"}
    assert orphan not in world.leftovers()
    assert b"".join(world.files.content(world.owner, kept.id)) == GOOD


def test_lost_bytes_are_told_in_words(world: World, tmp_path: Path) -> None:
    file = world.upload(GOOD)
    (world.home / "files" / file.id).unlink()
    for call in (
        lambda: world.files.content(world.owner, file.id),
        lambda: world.files.fetch(file, tmp_path / "train.jsonl"),
        lambda: world.files.examples(file, Chat.plain()),
    ):
        with pytest.raises(NotFound, match="no longer on the server"):
            call()


def test_results_are_files(world: World, tmp_path: Path) -> None:
    job = world.job()
    claim = world.jobs.claim("d", 60)
    assert claim is not None
    adapter, results = trained(tmp_path / "run")
    done = world.jobs.succeed(claim, adapter_dir=adapter, results_csv=results, trained_tokens=1)
    (file,) = world.files.list(world.owner, "fine-tune-results")
    assert done.result_files == (file,)
    assert file.filename == "compiled_results.csv"
    assert b"".join(world.files.content(world.owner, file.id)) == results.read_bytes()
    assert job.result_files == ()
