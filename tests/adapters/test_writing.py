from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import torch as safetensors_torch

from tunesmith.adapters.writing import write_tensors

TENSORS = {
    "b.weight": torch.arange(6.0).view(2, 3),
    "a.größe": torch.tensor(3.5),
    "none": torch.empty(0, 4),
    "c": torch.arange(5.0),
}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    write_tensors(tmp_path / "file", TENSORS, metadata)

    assert (tmp_path / "file").read_bytes() == safetensors_torch.save(TENSORS, metadata)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_views_and_other_types_are_written_as_their_values(tmp_path: Path) -> None:
    square = torch.arange(9.0).view(3, 3)
    tensors = {"turned": square.T, "slice": square[1], "half": square.bfloat16(), "trained": square.requires_grad_()}

    write_tensors(tmp_path / "file", tensors)

    found = safetensors_torch.load_file(tmp_path / "file")
    assert all(torch.equal(found[name], value.detach().float()) for name, value in tensors.items())


def test_a_full_disk_says_so_and_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")
    script = (
        "import signal, sys, torch; from pathlib import Path; from tunesmith.adapters.writing import write_tensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: write_tensors(Path(sys.argv[1]), {'a': torch.zeros(100_000)})\n"
        "except OSError as error: print(error.errno)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000)),
    )

    assert answer.stdout == "27\n"  # EFBIG
    assert (tmp_path / "file").read_bytes() == b"before"


def test_writing_takes_no_second_copy(tmp_path: Path) -> None:
    script = (
        "import resource, sys, torch; from pathlib import Path; from tunesmith.adapters.writing import write_tensors\n"
        "tensors = {name: torch.ones(8 << 20) for name in 'ab'}\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "write_tensors(Path(sys.argv[1]), tensors)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "file")], capture_output=True, text=True, check=True
    )

    assert int(answer.stdout) < 16 << 10  # KiB, of 64 MiB
