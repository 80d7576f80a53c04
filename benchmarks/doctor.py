"""Claim: the doctor finds 98 of 100 planted defects of each kind, and is wrong about 2 clean rows in 100 at most.

    python -m benchmarks.doctor [--datasets DIR] [--rounds 5] [--seed 0]

Three sets of rows are made up: for classification, for generation, and talks; their texts are full of numbers and signs
that only look like something. DIR may hold more: folders with `train.jsonl` and `valid.jsonl`. Each round plants all
defects, each into rows of its own (one in a hundred, at random), and those of whole files one at a time. Found is a
planted row that the finding of that defect names. A false alarm is any other row that a finding above a note names.

Real sets have defects of their own. A row that is named before anything is planted is no false alarm if a plain second
look confirms it: a check of the same thing in a line or two, slow or coarse.
"""

from __future__ import annotations

import re
import sys
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.common import conclude, parser, read_rows, table
from benchmarks.planted import Row, Set, made_up, plant, whole_file_defects
from tunesmith.cli.datafile import base_and_folder, lengths_of
from tunesmith.data import doctor_overlap, facts, rows
from tunesmith.data.doctor import Codec, Examination, Examined, first_marks
from tunesmith.data.doctor_findings import about_validation, diagnose
from tunesmith.data.doctor_overlap import ValidationRows
from tunesmith.data.facts import Lengths, Task
from tunesmith.data.findings import Finding, Severity
from tunesmith.data.rows import BATCH_ROWS, Batch
from tunesmith.tokenizer import Tokenizer

LEAST_RECALL = 0.98
MOST_FALSE = 0.02
MOST_ROWS = 3_000
"""Of a file of a real set, so that a round takes seconds."""

Named = dict[str, set[int]]
"""Rows by the id of the finding that names them."""


@dataclass(frozen=True, slots=True)
class Base:
    """What the doctor judges by."""

    lengths: Lengths
    codec: Codec


@dataclass(slots=True)
class Tally:
    """Of one defect, or of one set."""

    planted: int = 0
    found: int = 0
    clean: int = 0
    false: int = 0

    def count(self, planted: set[int], named: set[int]) -> None:
        """Adds planted rows, and those among them that were found."""
        self.planted += len(planted)
        self.found += len(planted & named)


def main() -> int:
    """Exit code 0 if the claim holds."""
    options = parser(__doc__)
    options.add_argument("--datasets", type=Path, metavar="DIR", help="folder of folders with train and valid.jsonl")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seed", type=int, default=0, help="of the first round; each round adds one")
    args = options.parse_args()
    for module in (rows, facts, doctor_overlap):
        module.SHOWN_ROWS = sys.maxsize  # type: ignore[attr-defined]  # all rows are to be named, not the first few
    base = box_base()
    defects: dict[str, Tally] = defaultdict(Tally)
    lines = []
    for one in [*made_up(), *(real(args.datasets, base) if args.datasets else ())]:
        of_set, own = measure(one, range(args.seed, args.seed + args.rounds), base, defects)
        lines.append((one.name, len(one.training), len(one.validation), own, of_set.clean, of_set.false))
    print(table(("defect", "planted", "found", "missed", "false alarms"), [
        (id_, tally.planted, tally.found, tally.planted - tally.found, tally.false)
        for id_, tally in sorted(defects.items())
        if tally.planted or tally.false
    ]))  # fmt: skip
    print("\n" + table(("set", "rows", "validation", "own defects", "clean rows seen", "false alarms"), lines))
    recall = min(tally.found / tally.planted for tally in defects.values() if tally.planted)
    false = max(line[-1] / line[-2] for line in lines)
    planted = sum(tally.planted for tally in defects.values())
    holds = recall >= LEAST_RECALL and false <= MOST_FALSE
    return conclude("doctor", holds, {"least_recall": recall, "most_false_share": false, "planted": planted})


def measure(one: Set, seeds: Sequence[int], base: Base, defects: dict[str, Tally]) -> tuple[Tally, int]:
    """Counts of a set, and how many rows of it have defects of their own. Adds to `defects`."""
    before, ids = look(one, base)
    own = [confirmed(one, which, before[which]) for which in (0, 1)]
    of_set = Tally()
    for seed in seeds:
        planted = plant(one, Random(seed), base.lengths.limit_tokens)
        after, _ = look(planted.rows, base)
        for which, places in enumerate((planted.training, planted.validation)):
            for id_, some in places.items():
                defects[id_].count(some, after[which].get(id_, set()))
            spoilt = own[which].union(*places.values(), planted.touched if which == 0 else ())
            of_set.clean += len((one.training, one.validation)[which]) - len(spoilt)
            for id_, some in after[which].items():
                defects[id_].false += len(some - spoilt)
            of_set.false += len(set().union(*after[which].values()) - spoilt)
    for id_, spoilt_set in whole_file_defects(one):
        _, after_ids = look(spoilt_set, base)
        defects[f"{id_} (whole file)"].count({1}, {1} if id_ in after_ids else set())
        defects[f"{id_} (whole file)"].false += id_ in ids and not one.name.startswith("real")
    return of_set, sum(map(len, own))


def look(one: Set, base: Base) -> tuple[tuple[Named, Named], set[str]]:
    """Rows of training and of validation that are named above a note; and the ids of all such findings."""
    marks = first_marks(batches(one.training))
    leaks = ValidationRows(marks.separator)
    with Examination(marks, base.lengths, base.codec) as looking:
        for batch in batches(one.validation):
            looking.add(batch)
            leaks.add(batch)
        validation = looking.result()
    with Examination(marks, base.lengths, base.codec) as looking:
        for batch in batches(one.training):
            looking.add(batch)
            leaks.meet(batch)
        training = looking.result()
    found = diagnose(training, base.codec).findings, about_validation(training, validation, leaks.result())
    named = named_rows(found[0]), named_rows(found[1])
    return named, {finding.id for findings in found for finding in findings if finding.severity is not Severity.NOTE}


def named_rows(findings: Sequence[Finding]) -> Named:
    """All rows of findings above a note."""
    return {found.id: set(found.rows.shown) for found in findings if found.severity is not Severity.NOTE}


def batches(some: Sequence[Row]) -> Iterator[Batch]:
    """Rows as readers give them."""
    for start in range(0, len(some), BATCH_ROWS):
        prompts, completions = zip(*some[start : start + BATCH_ROWS], strict=True)
        yield Batch(start + 1, list(prompts), list(completions), 0)


def box_base() -> Base:
    """The `ada` in the box."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-doctor-") as home:
        base, folder = base_and_folder(Path(home), "ada")
        tokenizer = Tokenizer.from_folder(folder)
    special = tuple(map(tokenizer.token_text, tokenizer.ending_ids))
    return Base(lengths_of(base, tokenizer), Codec(tokenizer.encode_many, tokenizer.decode, special))


def real(folder: Path, base: Base) -> Iterator[Set]:
    """The sets of a folder, as far as their prompts end with a mark."""
    for path in sorted(folder.iterdir()):
        if not (path / "train.jsonl").is_file() or not (path / "valid.jsonl").is_file():
            continue
        training, validation = (
            [(row["prompt"], row["completion"]) for row in read_rows(path / f"{name}.jsonl", MOST_ROWS)]
            for name in ("train", "valid")
        )
        marks = first_marks(batches(training))
        if marks.separator is None:
            print(f"{path.name} is left out: its prompts have no separator.")
            continue
        classes = tuple(name for name, _ in Counter(completion for _, completion in training).most_common())
        if examined(training, base).facts.task is not Task.CLASSIFICATION:
            classes = ()
        yield Set(f"real: {path.name}", training, validation, marks.separator, marks.stop, marks.dialogue, classes)


def examined(some: Sequence[Row], base: Base) -> Examined:
    """What some rows are like."""
    with Examination(first_marks(batches(some)), base.lengths, base.codec) as looking:
        for batch in batches(some):
            looking.add(batch)
        return looking.result()


def confirmed(one: Set, which: int, named: Named) -> set[int]:
    """Those of the named rows that a plain second look finds odd too."""
    some = (one.training, one.validation)[which]
    completions = defaultdict(set)
    for prompt, completion in some:
        completions[prompt].add(completion)
    known, plain = {prompt for prompt, _ in one.training}, {letters(prompt) for prompt, _ in one.training}
    repeats = Counter(some)
    second: dict[str, Callable[[Row], bool]] = {
        "separator_missing": lambda row: not row[0].endswith(one.separator),
        "separator_space": lambda row: not row[0].endswith(one.separator),
        "separator_inside": lambda row: row[0].count(one.separator) > 1,
        "stop_missing": lambda row: not row[1].endswith(str(one.stop)),
        "stop_inside": lambda row: row[1].count(str(one.stop)) > 1,
        "completion_space": lambda row: row[1] == row[1].lstrip(),
        "duplicated_rows": lambda row: repeats[row] > 1,
        "contradicting_rows": lambda row: len(completions[row[0]]) > 1,
        "control_characters": lambda row: any(
            (unicodedata.category(x) == "Cc" and x not in "\t\r\n") or x == "\ufeff" for x in row[0]
        ),
        "phone_numbers": lambda row: bool(re.search(r"\d{3}\D{1,2}\d{3}\D\d{4}|\+\d[\d ()-]{8,}", " ".join(row))),
        "email_addresses": lambda row: bool(re.search(r"\w@\w+\.\w", " ".join(row))),
        "overlap_exact": lambda row: row[0] in known,
        "overlap_spelling": lambda row: letters(row[0]) in plain,
        "overlap_near": lambda row: any(alike(row, other) for other in one.training),
    }
    return {
        number
        for id_, numbers in named.items()
        for number in numbers
        if id_ in second and second[id_](some[number - 1])
    }


def letters(text: str) -> str:
    """Letters and digits alone."""
    return re.sub(r"[\W_]", "", text.casefold())


def alike(one: Row, other: Row) -> bool:
    """Four fifths of the words of two rows together are in both."""
    mine, theirs = (set(re.findall(r"\w+", " ".join(row).casefold())) for row in (one, other))
    return len(mine & theirs) >= 0.8 * len(mine | theirs)


if __name__ == "__main__":
    sys.exit(main())
