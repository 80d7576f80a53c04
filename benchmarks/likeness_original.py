"""The other side of `likeness`, run by the original's interpreter: makes inputs by chance, and answers them.

Reads a JSON value a line from standard input and answers each with one: a number with the input that it seeds, which is
written to the folder beside it; an input with what `openai tools fine_tunes.prepare_data` makes of it.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import random
import sys
import tempfile
import traceback
from argparse import Namespace
from pathlib import Path

import openpyxl
from openai.cli import FineTune

TEXT = (
    "plot movie was great dull never again The Actors shine in every scene a b of to with ünïcode naïve 東京 привет "
    "emoji😀 C++ 50% $5 a/b 'quoted' \"dq\" comma, semi; #hash 1 2.5 007 None1 true http://x.y/z <b> & \\n back\\s"
)
WORDS = TEXT.split(" ")
SEPARATORS = (
    "",
    "",
    "",
    " ->",
    "\n\n###\n\n",
    "\n\n===\n\n",
    "\n\n---\n\n",
    " =>",
    "?",
    "\n",
    "  ",
    "\n\n### answer ->\n\n",
)
ENDINGS = ("", "", "", "\n", ".", " END", "***", "###", "$$$", "!", " and that is all")
PROMPT_PREFIXES = ("", "", "", "", "Q: ", "Classify this: ", "Twelve chars", "Thirteen char")
COMPLETION_PREFIXES = ("", "", "", "", " ", "A: ", "Answer: ", " Answer: ", " the")
SIZES = (2, 3, 4, 5, 7, 9, 12, 20, 40, 99, 100, 101, 150)
ODD_CHARACTERS = ("\u2028", "\u00a0", "\x0b", "\x1c", "\x85", "\u200b", "\x7f", "İ", "ß", "ﬀ")
ODD_VALUES = (None, 1, 2.5, True, [1, 2])
ODD_CELLS = (1, 2.0, 2.5, True, False, datetime.datetime(2020, 1, 2, 3, 4, 5), datetime.date(2021, 5, 6), 0.1, -3)
ENCODINGS = (*("utf-8",) * 12, "utf-8-sig", "utf-8-sig", "utf-16", "latin-1", "cp1252")
UNWRITABLE = dict.fromkeys((*range(9), 11, 12, *range(14, 32)))
"""Control characters that no workbook holds."""


class Maker:
    """Makes one input. What docs/design/decisions/prepare.md lists with a recorded input is left out."""

    def __init__(self, seed: int) -> None:
        self.by_chance = random.Random(seed)

    def often(self, share: float) -> bool:
        """True in this share of all cases."""
        return self.by_chance.random() < share

    def text(self, least: int = 1, most: int = 12, upper: float = 0.0) -> str:
        """Some words."""
        words = self.by_chance.choices(WORDS, k=self.by_chance.randint(least, most))
        return " ".join(word.upper() if self.often(upper) else word for word in words)

    def rows(self) -> list[list[str]]:
        """Prompts and completions, with defects."""
        choose = self.by_chance.choice
        task = choose(["generation", "generation", "classification", "classification", "open-ended"])
        separator, ending = choose(SEPARATORS), choose(ENDINGS)
        before_prompt, before_completion = choose(PROMPT_PREFIXES), choose(COMPLETION_PREFIXES)
        upper_prompts, upper_completions = choose([0, 0, 0, 0.2, 0.5, 1]), choose([0, 0, 0, 0.3, 1])
        several_lines = self.often(0.15)
        classes = [self.text(1, 2, upper_completions) for _ in range(self.by_chance.randint(1, 5))]
        classes = choose([classes, classes, classes, ["yes", "no"], ["1", "0"], [" Yes", " yes", "NO"]])
        rows = []
        for _ in range(choose(SIZES)):
            more = "\n" + self.text() if several_lines else ""
            prompt = before_prompt + self.text(upper=upper_prompts) + more + separator
            completion = choose(classes) if task == "classification" else self.text(upper=upper_completions) + more
            rows.append(["" if task == "open-ended" else prompt, before_completion + completion + ending])
        if self.often(0.3):
            rows += [list(choose(rows)) for _ in range(self.by_chance.randint(1, 3))]
        if self.often(0.2):
            choose(rows)[1] = choose(["", " ", "\n", "\t"])
        if self.often(0.15):
            choose(rows)[0] = choose(["", " ", "\n"])
        if self.often(0.1):
            choose(rows)[choose([0, 1])] += choose(ODD_CHARACTERS)
        if self.often(0.3):
            self.by_chance.shuffle(rows)
        return rows

    def table(self) -> tuple[list[str], list[list[str]]]:
        """A heading, and rows with columns that are no prompts and no completions among them."""
        choose = self.by_chance.choice
        heads, table = ["prompt", "completion"], self.rows()
        if self.often(0.1):
            heads = [choose(["Prompt", "PROMPT"]), choose(["Completion", "cOMPLETION"])]
        elif self.often(0.03):
            heads[choose([0, 1])] = choose(["promt", "Completion ", " prompt", "text", ""])
        for _ in range(choose([0, 0, 0, 0, 1, 2])):
            at = self.by_chance.randint(0, len(heads))
            heads.insert(at, choose(["id", "note", "prompt_id", "Prompt", "completion2", "", "label", "id"]))
            for row in table:
                row.insert(at, choose(["7", "", "x,y", "é"]))
        if self.often(0.15):
            order = list(range(len(heads)))
            self.by_chance.shuffle(order)
            heads, table = [heads[at] for at in order], [[row[at] for at in order] for row in table]
        return heads, table

    def write(self, folder: Path) -> dict[str, object]:
        """A file of some format, files that are there already, and answers to questions; None for -q."""
        choose = self.by_chance.choice
        kind = choose(["csv", "csv", "csv", "tsv", "xlsx", "xlsx", "json", "jsonl", "jsonl", "jsonl", "txt"])
        encoding = "utf-8" if kind == "xlsx" else choose(ENCODINGS)
        if kind == "txt" and encoding == "utf-8-sig":
            encoding = "utf-8"
        name = choose(["data", "data", "my data", "a.b", "d-é", "x (1)", "DATA"])
        file = f"{name}.{kind.upper() if self.often(0.1) else kind}"
        if kind == "xlsx":
            self.workbook().save(folder / file)
        else:
            text = {"csv": self.csv, "tsv": self.csv, "txt": self.lines}.get(kind, self.json)(kind)
            (folder / file).write_bytes(text.encode(encoding, "replace"))
        if self.often(0.1):
            (folder / f"{name}{choose(['_prepared', '_prepared_valid'])}.jsonl").write_text("there already\n")
        answers = None
        if self.often(0.45):
            no = choose([0.2, 0.5, 0.5, 1])
            answers = [choose(["n", "N"]) if self.often(no) else choose(["", "y", "Y", "no", "yes"]) for _ in range(14)]
        return {"file": file, "encoding": encoding, "answers": answers}

    def csv(self, kind: str) -> str:
        """Quoted and ended in one way or another."""
        choose, text, (heads, table) = self.by_chance.choice, io.StringIO(), self.table()
        writer = csv.writer(
            text,
            delimiter="," if kind == "csv" else "\t",
            quoting=choose([csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
            lineterminator=choose(["\n", "\n", "\n", "\r\n", "\r"]),
        )
        writer.writerows([heads, *(row[:-1] if self.often(0.01) else row for row in table)])
        return text.getvalue().rstrip("\r\n") if self.often(0.1) else text.getvalue()

    def lines(self, _: str) -> str:
        """Completions alone."""
        choose = self.by_chance.choice
        return choose(["\n", "\n", "\r\n"]).join(row[1].replace("\n", " ") for row in self.rows()) + choose(["", "\n"])

    def json(self, kind: str) -> str:
        """Objects: on lines, or as a list, or by columns, under their own ending or under each other's."""
        choose, (heads, table), ascii_only = self.by_chance.choice, self.table(), self.often(0.5)
        odd = 0.01 if self.often(0.15) else 0.0
        rows = [
            {head: choose(ODD_VALUES) if self.often(odd) else value for head, value in zip(heads, row, strict=True)}
            for row in table
        ]
        if (kind == "json") == self.often(0.2):
            end = choose(["\n", "\n", "\n", "\r\n"])
            text = "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows)
            return text.rstrip("\r\n") if self.often(0.2) else text
        columns = {head: [row.get(head) for row in rows] for head in heads}
        by_row = {head: {str(at): value for at, value in enumerate(values)} for head, values in columns.items()}
        form = choose([rows, rows, rows, columns, by_row])
        return json.dumps(form, ensure_ascii=ascii_only, indent=choose([None, None, 1]))

    def workbook(self) -> openpyxl.Workbook:
        """One sheet or several; cells of several types."""
        book, (heads, table) = openpyxl.Workbook(), self.table()
        odd = 0.1 if self.often(0.3) else 0.0
        book.active.append([head or None for head in heads])
        for row in table:
            cells = [cell.translate(UNWRITABLE) for cell in row]
            book.active.append(
                [
                    self.by_chance.choice(ODD_CELLS) if self.often(odd) else cell if cell.strip() else None
                    for cell in cells
                ]
            )
        for number in range(self.by_chance.choice([0, 0, 0, 1, 2])):
            other = book.create_sheet(f"More {number}")
            other.append(["prompt", "completion"])
            other.append(["another", "sheet"])
        return book


def answer(case: dict[str, object], folder: Path) -> dict[str, object]:
    """Exit code, standard output and standard error of the original, in a process of its own."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            os._exit(_prepare(case, folder, out, err))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return {"exit": code, "out": out.read(), "err": err.read()}


def _prepare(case: dict[str, object], folder: Path, out: io.TextIOBase, err: io.TextIOBase) -> int:
    code = 0
    try:
        os.chdir(folder)
        sys.stdout, sys.stderr = out, err
        sys.stdin = io.StringIO("".join(f"{word}\n" for word in case["answers"] or ()))
        FineTune.prepare_data(Namespace(file=case["file"], quiet=case["answers"] is None))
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc(file=err)
        code = 1
    out.flush()
    err.flush()
    return code


if __name__ == "__main__":
    for line in sys.stdin:
        asked, folder = json.loads(line)
        answered = Maker(asked).write(Path(folder)) if isinstance(asked, int) else answer(asked, Path(folder))
        print(json.dumps(answered), flush=True)
