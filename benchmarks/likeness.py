"""Claim: `prepare` writes what the original writes, asks what it asks and recommends what it recommends.

    python -m benchmarks.likeness --original PYTHON [--first 0] [--inputs 500]

PYTHON is the interpreter of an environment with openai==0.28.1, pandas and openpyxl. Inputs are made by chance:
formats, encodings, columns, defects, answers to questions. What differs for a reason that is listed in
docs/design/decisions/prepare.md is counted by reason; anything else is shown, and fails.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.common import conclude, parser, table
from tunesmith.cli.main import main as tunesmith
from tunesmith.tokenizer import Tokenizer

OTHER_WORDS = {"Your": "Convert", "Rename": "Lower", "Lowercase": "Lower"}
"""First words of questions that the original and we begin otherwise -> one of both."""

Answer = dict[str, Any]


class Terminal(io.StringIO):
    """Somebody who answers."""

    def isatty(self) -> bool:
        """They do."""
        return True


def main() -> int:
    """Exit code 0 if the claim holds."""
    options = parser(__doc__)
    options.add_argument("--original", required=True)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--inputs", type=int, default=500)
    given = options.parse_args()
    script = Path(__file__).with_name("likeness_original.py")
    command = [given.original, "-W", "ignore", str(script)]
    read, known = Tokenizer.from_folder, dict[str, Tokenizer]()
    counted: Counter[str] = Counter()

    def read_once(folder: Path) -> Tokenizer:
        return known.setdefault(folder.name, known.get(folder.name) or read(folder))

    with (
        tempfile.TemporaryDirectory() as home,
        patch.dict(os.environ, TUNESMITH_HOME=home),
        patch.object(Tokenizer, "from_folder", staticmethod(read_once)),
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as original,
    ):
        for seed in range(given.first, given.first + given.inputs):
            counted[compared(seed, original)] += 1
        assert original.stdin is not None
        original.stdin.close()
    print(table(["inputs", "outcome"], [[count, outcome] for outcome, count in counted.most_common()]))
    return conclude("likeness", not counted["different"], {"inputs": given.inputs, **counted})


def compared(seed: int, original: subprocess.Popen[str]) -> str:
    """`the same`, the reason why not, or `different`."""
    with tempfile.TemporaryDirectory() as theirs, tempfile.TemporaryDirectory() as ours:
        case = _ask(original, seed, theirs)
        before = {path.name for path in Path(theirs).iterdir()}
        for name in before:
            (Path(ours) / name).write_bytes((Path(theirs) / name).read_bytes())
        them, us = _ask(original, case, theirs), _prepare(case, Path(ours))
        reason = _reason(case, them, us)
        if reason is not None:
            return reason
        differences = list(_differences(them, us, _written(theirs, before), _written(ours, before)))
    if differences:
        print(f"input {seed}: {case}", *differences, sep="\n  ")
    return "different" if differences else "the same"


def _reason(case: Answer, them: Answer, us: Answer) -> str | None:
    if them["exit"] and not us["exit"]:
        if case["encoding"] != "utf-8":
            return "better: an encoding that the original cannot read"
        return "better: the original fails on the way" if "Traceback" in them["err"] else "better: JSON under .jsonl"
    if "Traceback" in them["err"]:
        return "neither: the original fails, ours says why not"
    if us["exit"] and "There is no row with a completion" in us["out"]:
        return "better: nothing is left, and no empty file is written"
    if f'fine_tunes.create -t "{case["file"]}"' in them["out"] and "Proceed" in us["out"]:
        return "better: a file that would not be taken is written anew"
    return None


def _differences(them: Answer, us: Answer, theirs: dict[str, bytes], ours: dict[str, bytes]) -> Iterator[str]:
    if bool(them["exit"]) != bool(us["exit"]):
        yield f"exit codes: {them['exit']} and {us['exit']}: {them['err'][-200:]!r} and {us['out'][-200:]!r}"
    if theirs != ours:
        yield f"files: {theirs} and {ours}"
    asked, we_ask = _questions(them["out"]), _questions(us["out"])
    if not them["exit"] and asked != we_ask and ["Convert", *asked] != we_ask:  # of a .json file
        yield f"questions: {asked} and {we_ask}"
    told, we_tell = _command(them["out"]), _command(us["out"])
    if "Classification is not measured" in us["out"] or told[-2:] == ["--classification_n_classes", "1"]:
        told = told[: len(we_tell)]  # metrics that would fail are not recommended
    if told != we_tell:
        yield f"commands: {told} and {we_tell}"


def _ask(original: subprocess.Popen[str], asked: int | Answer, folder: str) -> Answer:
    assert original.stdin is not None and original.stdout is not None
    original.stdin.write(json.dumps([asked, folder]) + "\n")
    original.stdin.flush()
    answered: Answer = json.loads(original.stdout.readline())
    return answered


def _prepare(case: Answer, folder: Path) -> Answer:
    said, back = io.StringIO(), Path.cwd()
    answers = None if case["answers"] is None else Terminal("".join(f"{word}\n" for word in case["answers"]))
    words = ["tools", "fine_tunes.prepare_data", "-f", case["file"], "--split", "random", *(["-q"] * (answers is None))]
    os.chdir(folder)
    try:
        with redirect_stdout(said), redirect_stderr(said), patch.object(sys, "stdin", answers or sys.stdin):
            return {"exit": tunesmith(words), "out": said.getvalue()}
    finally:
        os.chdir(back)


def _written(folder: str, before: set[str]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.name not in before}


def _questions(said: str) -> list[str]:
    found = re.findall(r"- \[(?:Recommended|Necessary)\] (\w+)|(Proceed) \[Y", said)
    return [OTHER_WORDS.get(word, word) for pair in found for word in pair if word]


def _command(said: str) -> list[str]:
    """The words of the recommended command, less the flag that ours has more."""
    found = re.search(r"api fine_tunes\.create (.*?)\n\n", said, re.DOTALL)
    words = shlex.split(found[1].replace("\\$", "$")) if found else []
    if "--classification_positive_class" in words and "--classification_n_classes" in words:
        at = words.index("--classification_n_classes")
        del words[at : at + 2]
    return words


if __name__ == "__main__":
    sys.exit(main())
