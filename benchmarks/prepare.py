"""Claim: `prepare` does all the checks of the original command ten times as fast, in memory that does not grow.

    python -m benchmarks.prepare --original PYTHON [--rows 1000000] [--words 60] [--format csv] [--rounds 3]

PYTHON is the interpreter of an environment with openai==0.28.1 and pandas; without it only ours is measured. Both
run on the same made-up file in turn, each in a process of its own, with `-q`. Given are medians of wall and CPU
seconds; the ratio is of the CPU seconds, which other work on the machine disturbs less. With --gigabytes in place of
--rows the file is of that size: memory has to stay below 500 MB.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import conclude, parser, table

LEAST_RATIO = 10.0
MOST_RSS_BYTES = 500_000_000
WORDS = (  # noqa: SIM905  a text is easier to read
    "order late parcel refund please account card money never again quickly friendly broken screen battery charger "
    "return label weeks answer phone support customer again thanks Monday London invoice number wrong size colour"
).split()
TEXTS, STEP = 20_011, 7_919
"""Primes: each text comes as often, and in no plain order."""
CLASSES = ("complaint", "question", "praise", "other")
ORIGINAL = "import sys; from openai._openai_scripts import main; sys.exit(main())"


@dataclass(frozen=True, slots=True)
class Run:
    """What one process took."""

    wall_s: float
    cpu_s: float
    rss_bytes: int


def main() -> int:
    """Exit code 0 if the claim holds."""
    options = parser(__doc__)
    options.add_argument(
        "--original", type=Path, metavar="PYTHON", help="interpreter that has openai==0.28.1 and pandas"
    )
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--gigabytes", type=float, help="size of the file, in place of --rows")
    options.add_argument("--words", type=int, default=60, help="of a prompt, at most")
    options.add_argument("--format", choices=["jsonl", "csv"], default="jsonl")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--folder", type=Path, help="where there is room for the file and its output")
    args = options.parse_args()
    ours = [sys.executable, "-m", "tunesmith", "prepare"]
    theirs = [str(args.original), "-c", ORIGINAL, "tools", "fine_tunes.prepare_data", "-f"]
    commands = {"tunesmith": ours} | ({} if args.original is None else {"openai 0.28.1": theirs})
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory(prefix="tunesmith-prepare-", dir=args.folder) as name:
        path = Path(name) / f"data.{args.format}"
        most_bytes = None if args.gigabytes is None else int(args.gigabytes * 1e9)
        rows = write(path, args.rows if most_bytes is None else None, most_bytes, args.words)
        size_bytes = path.stat().st_size
        for _ in range(args.rounds):
            for who, command in commands.items():
                runs[who].append(measure([*command, path.name, "-q"], path.parent))
                for output in path.parent.glob("*_prepared*"):
                    output.unlink()

    median = {who: Run(*map(statistics.median, zip(*map(astuple, of), strict=True))) for who, of in runs.items()}
    lines = [
        (who, run.wall_s, run.cpu_s, size_bytes / 1e6 / run.cpu_s, run.rss_bytes / 1e6) for who, run in median.items()
    ]
    print(f"{rows:,} rows, {size_bytes / 1e6:,.1f} MB of {args.format}, medians of {args.rounds}")
    print(table(("command", "wall s", "CPU s", "MB per CPU s", "peak RSS MB"), lines))
    mine = median["tunesmith"]
    facts = {"rows": rows, "bytes": size_bytes, "cpu_s": mine.cpu_s, "wall_s": mine.wall_s, "rss_bytes": mine.rss_bytes}
    holds = mine.rss_bytes <= MOST_RSS_BYTES
    if args.original is not None:
        facts["ratio"] = median["openai 0.28.1"].cpu_s / mine.cpu_s
        holds = holds and facts["ratio"] >= LEAST_RATIO
    return conclude("prepare", holds, facts)


def astuple(run: Run) -> tuple[float, float, float]:
    """The numbers of a run."""
    return run.wall_s, run.cpu_s, run.rss_bytes


def write(path: Path, rows: int | None, most_bytes: int | None, words: int) -> int:
    """Makes the file; how many rows it has."""
    # The texts hold nothing that would have to be escaped: plain strings are written much faster.
    begin, line = {
        ".csv": ("prompt,completion\r\n", '"%s",%s\r\n'),
        ".jsonl": ("", '{"prompt": "%s", "completion": "%s"}\n'),
    }[path.suffix]
    source = made_up(words)
    count = 0
    with path.open("w", newline="") as file:
        file.write(begin)
        while count != rows and (most_bytes is None or file.tell() < most_bytes):
            some = list(itertools.islice(source, 4_096 if rows is None else min(4_096, rows - count)))
            file.write("".join([line % row for row in some]))
            count += len(some)
    return count


def made_up(words: int) -> Iterator[tuple[str, str]]:
    """Messages of a shop's customers, as if: one of TEXTS texts and a number; one in a thousand comes twice."""
    chance = random.Random(1)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(words // 3, words))).capitalize() for _ in range(TEXTS)]
    for number in itertools.count():
        row = f"{texts[number * STEP % TEXTS]}, {number}!", CLASSES[number * STEP % 11 % 4]
        yield row
        if not number % 1_000:
            yield row


def measure(command: list[str], folder: Path) -> Run:
    """Runs a command to its end."""
    began_s = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - began_s
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{command} failed with {process.returncode}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


if __name__ == "__main__":
    sys.exit(main())
