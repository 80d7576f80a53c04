"""A disk without room, for real: a small file system where the tests may mount one, a file size limit everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core.conftest import World, open_world, rows, trained
from tunesmith.errors import StorageFull

SIZE_BYTES = 2_000_000
LIMITED = """
import errno, resource, sys
from pathlib import Path
from tunesmith.core.blobs import Blobs
from tunesmith.errors import StorageFull

folder = Path(sys.argv[1])
blobs = Blobs(folder.as_uri())
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    blobs.put("file-a", iter([b"x" * 60_000, b"x" * 60_000]))
except StorageFull as error:
    assert "no room" in error.message
    assert list(folder.iterdir()) == []
    assert blobs.put("file-b", [b"x" * 90_000]) == 90_000
    print("refused")
"""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[World]:
    """A platform whose home is a file system of two megabytes."""
    home = tmp_path / "small"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tmpfs", str(home)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system is not allowed here")
    try:
        world = open_world(home, f"sqlite:///{home / 'tunesmith.db'}")
        yield world
        world.store.close()
    finally:
        subprocess.run(["umount", str(home)], check=True)


def free(world: World) -> int:
    return os.statvfs(world.home).f_bavail * os.statvfs(world.home).f_bsize


def fill(world: World, *, but: int) -> Path:
    """Leave `but` bytes."""
    ballast = world.home / "ballast"
    ballast.write_bytes(b"\0" * (free(world) - but))
    return ballast


def test_a_file_size_limit_is_no_room(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    ran = subprocess.run([sys.executable, "-c", LIMITED, folder], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "refused\n", ran.stderr


def test_an_upload_that_does_not_fit_leaves_nothing(small: World) -> None:
    before = free(small)
    line = rows(("prompt" * 1000, " completion"))
    with pytest.raises(StorageFull, match="no room"):
        small.upload(line for _ in range(1000))
    assert small.leftovers() == set()
    assert small.files.list(small.owner) == []
    assert free(small) == before
    assert small.upload(line).size_bytes == len(line)


def test_a_row_that_does_not_fit_takes_its_bytes_along(small: World) -> None:
    """The bytes still fit, the database does not."""
    content = rows(("a", " b"))
    ballast = fill(small, but=8_192)
    with pytest.raises(StorageFull):
        for _ in range(1_000):
            small.upload(content)
    kept = {f"files/{file.id}" for file in small.files.list(small.owner)}
    assert small.leftovers() == kept
    ballast.unlink()
    small.upload(content)


def test_a_model_that_does_not_fit_leaves_its_job_to_be_ended_again(small: World, tmp_path: Path) -> None:
    job = small.job()
    claim = small.jobs.claim("d", 60)
    assert claim is not None
    adapter, results = trained(tmp_path / "run")
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * SIZE_BYTES)
    before = small.leftovers()
    with pytest.raises(StorageFull):
        small.jobs.succeed(claim, adapter_dir=adapter, results_csv=results, trained_tokens=1)
    assert small.leftovers() == before
    assert small.jobs.get(small.owner, job.id).status == "running"
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    small.jobs.succeed(claim, adapter_dir=adapter, results_csv=results, trained_tokens=1)
