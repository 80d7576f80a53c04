"""Is a tuned model better than what a user would do without it?

    python -m benchmarks.quality run --datasets DIR [--only SET] [--method METHOD] [--base ada] [--base curie=FOLDER]
    python -m benchmarks.quality table

`run` measures each method on each set and adds a line to the file of results; what stands there already is skipped, so
it can be run in pieces, in any order, by several processes. `table` writes README.md from the file.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.quality import methods, results
from benchmarks.quality.methods import Limits, Measured, Task
from benchmarks.quality.results import BASES, Key
from benchmarks.quality.sets import SETS, Classification
from benchmarks.quality.tuning import BaseModel, serving
from tunesmith import __version__

HERE = Path(__file__).parent
WITHOUT_MODEL = ("majority", "tfidf")
WITH_BASE = ("few-shot", "tuned")


def main() -> int:
    """Exit code 0: all that was asked for stands in the file."""
    args = _parser().parse_args()
    if args.command == "table":
        lines = results.read_lines(args.results)
        (HERE / "README.md").write_text(results.page(lines, (HERE / "about.md").read_text()))
    else:
        _run(args)
    return 0


def _run(args: argparse.Namespace) -> None:
    tasks = [Task(SETS[name], args.datasets) for name in args.only or SETS]
    asked = args.method or (*WITHOUT_MODEL, *WITH_BASE)
    limits = Limits(args.base_rows, args.prompts)
    there = {results.key_of(line) for line in results.read_lines(args.results)}

    for task in tasks:
        for method in WITHOUT_MODEL:
            new = Key(task.data.name, method, None) not in there
            if method in asked and isinstance(task.data, Classification) and new:
                _measure(args.results, task, method, None, partial(methods.without_model, task, method))
    for base in args.base or [BaseModel(name, None) for name in BASES]:
        left = [
            (task, method)
            for task in tasks
            for method in WITH_BASE
            if method in asked and Key(task.data.name, method, base.digest) not in there
        ]
        if not left:
            continue
        with serving(base, args.threads) as client:
            for task, method in left:
                work = {
                    "few-shot": partial(methods.few_shot, client, task, base.name, base.tokenizer, limits),
                    "tuned": partial(methods.tuned, client, task, base.name, limits),
                }[method]
                _measure(args.results, task, method, base, work)


def _measure(file: Path, task: Task, method: str, base: BaseModel | None, work: Callable[[], Measured]) -> None:
    who = method if base is None else f"{method} {base.name}"
    print(f"{task.data.name}: {who} ...", flush=True)
    measured = work()
    line = {
        "set": task.data.name,
        "method": method,
        "base": None if base is None else base.name,
        "base_digest": None if base is None else base.digest,
        "version": __version__,
        "scores": {name: round(value, 4) for name, value in measured.scores.items()},
        **measured.facts,
        "samples": measured.samples,
    }
    results.append(file, line)
    print(f"{task.data.name}: {who} {line['scores']}", flush=True)


def _base(text: str) -> BaseModel:
    name, _, folder = text.partition("=")
    if name not in BASES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(BASES)}")
    return BaseModel(name, Path(folder) if folder else None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure what is not in the file of results yet")
    run.add_argument("--datasets", type=Path, required=True, help="folder with banking77/, clinc150/, ...")
    run.add_argument("--only", action="append", choices=list(SETS), help="a set; may be given several times")
    run.add_argument("--method", action="append", choices=(*WITHOUT_MODEL, *WITH_BASE), help="likewise")
    run.add_argument(
        "--base", action="append", type=_base, help="NAME of the box, or NAME=FOLDER of a checkpoint; likewise"
    )
    run.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of trainer and of engine")
    run.add_argument("--base-rows", type=int, default=500, help="rows that the untuned base classifies (500)")
    run.add_argument("--prompts", type=int, default=200, help="prompts of a generation set (200)")
    table = commands.add_parser("table", help="write README.md")
    for command in (run, table):
        command.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="results.jsonl beside this")
    return parser


if __name__ == "__main__":
    sys.exit(main())
