from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core import s3
from tunesmith.core.blobs import READ_CHUNK_BYTES, Blobs, write_durably

LARGE = bytes(range(256)) * 4096 * 24  # 25 MB: object stores take it in parts


@pytest.fixture(params=["file", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Blobs]:
    if request.param == "file":
        yield Blobs((tmp_path / "with space" / "files").as_uri())
        return
    with s3.serve() as (bucket, address):
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        yield Blobs("s3://bucket/some/prefix")
        assert bucket.uploads == {}  # none is left half-done, which would cost its owner money
        assert all(key.startswith("some/prefix/") for key in bucket.objects)


def ids(blobs: Blobs) -> list[str]:
    return sorted(blob.id for blob in blobs.list())


def test_what_is_put_is_read(blobs: Blobs) -> None:
    assert blobs.put("file-a", [b"one", b"", b"two"]) == 6
    assert b"".join(blobs.read("file-a")) == b"onetwo"
    assert ids(blobs) == ["file-a"]


def test_large_content_goes_and_comes_in_chunks(blobs: Blobs) -> None:
    chunks = [LARGE[start : start + 65_536] for start in range(0, len(LARGE), 65_536)]
    assert blobs.put("file-a", chunks) == len(LARGE)
    read = list(blobs.read("file-a"))
    assert b"".join(read) == LARGE
    assert all(type(chunk) is bytes for chunk in read)


def test_no_bytes_are_bytes_too(blobs: Blobs) -> None:
    assert blobs.put("file-a", []) == 0
    assert b"".join(blobs.read("file-a")) == b""


@pytest.mark.parametrize("size", [10, len(LARGE)], ids=["at once", "in parts"])
def test_a_source_that_raises_leaves_nothing(blobs: Blobs, size: int) -> None:
    def broken() -> Iterator[bytes]:
        yield LARGE[:size]
        raise KeyError("connection lost")

    with pytest.raises(KeyError, match="connection lost"):
        blobs.put("file-a", broken())
    assert ids(blobs) == []


def test_unknown_blobs_are_missed_at_once(blobs: Blobs) -> None:
    with pytest.raises(FileNotFoundError):
        blobs.read("file-none")


def test_deleting_twice_is_fine(blobs: Blobs) -> None:
    blobs.put("file-a", [b"x"])
    blobs.delete("file-a")
    blobs.delete("file-a")
    assert ids(blobs) == []


def test_fetch_copies_whole_or_not_at_all(blobs: Blobs, tmp_path: Path) -> None:
    blobs.put("file-a", [LARGE])
    target = tmp_path / "train.jsonl"
    target.write_bytes(b"old")
    blobs.fetch("file-a", target)
    assert target.read_bytes() == LARGE
    with pytest.raises(FileNotFoundError):
        blobs.fetch("file-none", tmp_path / "none")
    assert not list(tmp_path.glob("none*"))


def test_listing_tells_the_age(blobs: Blobs) -> None:
    blobs.put("file-a", [b"x"])
    (blob,) = blobs.list()
    assert blob.modified_unix > 1_700_000_000


def test_a_local_blob_is_read_in_flat_memory(tmp_path: Path) -> None:
    local = Blobs(tmp_path.as_uri())
    local.put("file-a", [LARGE])
    assert max(map(len, local.read("file-a"))) <= 2 * READ_CHUNK_BYTES


def test_a_local_blob_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def watched() -> Iterator[bytes]:
        yield b"x" * READ_CHUNK_BYTES
        seen.append([path.name for path in tmp_path.iterdir()])

    write_durably(tmp_path / "file-a", watched())
    assert seen == [["file-a.part"]]
    assert [path.name for path in tmp_path.iterdir()] == ["file-a"]


def test_another_error_of_the_disk_is_not_called_full(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_durably(tmp_path / "no folder" / "file-a", [b"x"])
