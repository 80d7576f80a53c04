"""What the benchmark scripts share: a server on a temporary home, and how results are shown."""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e.harness import Server, put_base
from tunesmith import __version__


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options every script takes."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", type=Path, help="checkpoint folder to use as `ada`; by default the one in the box")
    options.add_argument("--data", type=Path, help="JSONL file of prompts and completions; by default made-up reviews")
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of trainer and of engine")
    return options


@contextmanager
def serving(options: argparse.Namespace, **settings: str) -> Iterator[Server]:
    """A server as `options` ask for, on a home that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-benchmark-") as folder:
        home = Path(folder)
        if options.base is not None:
            put_base(home, "ada", options.base.absolute())
        threads = {
            "TUNESMITH_TRAINER_THREADS": str(options.threads),
            "TUNESMITH_ENGINE_THREADS": str(options.threads),
        }
        with Server(home, threads | settings) as server:
            yield server


def read_rows(path: Path, most: int) -> list[dict[str, str]]:
    """The first rows of a JSONL file."""
    with path.open() as file:
        return [json.loads(line) for line, _ in zip(file, range(most), strict=False)]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Plain text, columns aligned."""
    cells = [list(header), *([f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def conclude(name: str, holds: bool, facts: Mapping[str, Any]) -> int:
    """Prints the JSON line for machines; the exit code."""
    hardware = {"cpus": len(os.sched_getaffinity(0)), "machine": platform.machine(), "system": platform.system()}
    print(json.dumps({"benchmark": name, "holds": holds, "version": __version__, **hardware, **facts}))
    return 0 if holds else 1
