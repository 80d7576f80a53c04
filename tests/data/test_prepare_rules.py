"""Facts, fixes, splits and files: for any rows, what is written trains and is complete."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data import keys
from tunesmith.data.advice import duration, quoted
from tunesmith.data.facts import ColumnFold, FileFold, Task, count_case
from tunesmith.data.formats import Example, read_examples, split_lines
from tunesmith.data.keys import KeyLog
from tunesmith.data.outputs import Staged, output_names, prepared_lines, publish
from tunesmith.data.plan import Plan
from tunesmith.data.rows import Batch
from tunesmith.data.split import Strata, sampled_order, training_rows

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["", " a", "a", "ab\0", "\0", "xa\n"]
)
pairs = st.lists(st.tuples(texts, texts), max_size=30)
plans = st.builds(
    Plan,
    drop_duplicates=st.booleans(),
    lower_prompts=st.booleans(),
    lower_completions=st.booleans(),
    prompt_suffix=st.sampled_from(["", " ->"]),
    completion_suffix=st.sampled_from(["", "\n"]),
    completion_space=st.booleans(),
)


def batches(rows: list[tuple[str, str]], size: int) -> list[Batch]:
    return [
        Batch(start + 1, [p for p, _ in rows[start : start + size]], [c for _, c in rows[start : start + size]], start)
        for start in range(0, len(rows), size)
    ]


@given(pairs, st.integers(1, 7), plans)
def test_what_is_written_is_a_training_file_of_these_rows(rows: list[tuple[str, str]], size: int, plan: Plan) -> None:
    with FileFold(None) as fold:
        for batch in batches(rows, size):
            fold.add(batch)
        facts = fold.result()
    kept = [(p, c) for p, c in rows if c]
    if plan.drop_duplicates:
        kept = list(dict.fromkeys(kept))
    expected = []
    for prompt, completion in kept:
        prompt = (prompt.lower() if plan.lower_prompts else prompt) + plan.prompt_suffix
        completion = (completion.lower() if plan.lower_completions else completion) + plan.completion_suffix
        expected.append(
            Example(prompt, " " + completion if plan.completion_space and completion[0] != " " else completion)
        )
    written = b"".join(prepared_lines(batch) for batch in plan.apply(batches(rows, size), facts))
    assert (list(read_examples(split_lines([written]))) if written else []) == expected
    assert (facts.rows, facts.empty.count, facts.kept) == (
        len(rows),
        sum(not c for _, c in rows),
        sum(bool(c) for _, c in rows),
    )
    assert facts.duplicates.count == facts.kept - len({pair for pair in rows if pair[1]})
    seen: set[tuple[str, str]] = set()
    again = [number for number, pair in enumerate(rows, 1) if pair[1] and (pair in seen or seen.add(pair))]
    assert facts.duplicates.shown == tuple(again[:20])


@given(st.lists(texts, min_size=1, max_size=30), st.integers(1, 7))
def test_facts_of_a_column_are_those_of_all_its_texts(column: list[str], size: int) -> None:
    fold = ColumnFold(("a", "b\n"))
    parts = [column[start : start + size] for start in range(0, len(column), size)]
    for part in parts:
        fold.add(part)
    if fold.unsure:
        for part in parts:
            fold.look_inside(part)
    facts = fold.result()
    prefix, suffix = facts.common_prefix, facts.common_suffix
    assert all(text.startswith(prefix) and text.endswith(suffix) for text in column)
    longer = len(prefix) + 1, len(suffix) + 1  # no longer one is common
    assert len({text[: longer[0]] for text in column}) > 1 or prefix in column
    assert len({text[-longer[1] :] for text in column}) > 1 or suffix in column
    assert facts.identical == (len(set(column)) == 1)
    assert facts.starts_with_space == all(text.startswith(" ") for text in column)
    assert facts.empty == (not any(column))
    assert facts.holds == {mark for mark in ("a", "b\n") if any(mark in text for text in column)}
    cut = len(facts.common_suffix)
    if cut and not any("\0" in text for text in column):
        assert facts.suffix_inside == any(facts.common_suffix in text[:-cut] for text in column)


@given(st.text())
def test_case_is_counted_in_every_script(text: str) -> None:
    letters = [letter for letter in text if letter.isalpha()]
    assert count_case(text) == (sum(map(str.isupper, letters)), sum(map(str.islower, letters)))


def test_more_keys_than_fit_are_compared_in_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "AT_ONCE", 100)
    monkeypatch.setattr(keys, "IN_MEMORY_BYTES", 1_000)
    numbers = np.random.default_rng(5).integers(-500, 500, size=(2_000, 2))
    with KeyLog(2) as log:
        for part in np.array_split(numbers, 7):
            log.add(part[:, 0].tolist(), part[:, 1].tolist())
        seen: set[tuple[int, ...]] = set()
        expected = []
        for row in map(tuple, numbers.tolist()):
            expected.append(row in seen)
            seen.add(row)
        assert log.repeats().tolist() == expected
        assert log.distinct(1) == len(set(numbers[:, 1].tolist()))


def test_the_task_is_told_by_rows_per_completion() -> None:
    def task(rows: list[tuple[str, str]]) -> Task:
        with FileFold(None) as fold:
            for batch in batches(rows, 5):
                fold.add(batch)
            return fold.result().task

    assert task([(str(n), str(n % 4)) for n in range(12)]) is Task.CONDITIONAL
    assert task([(str(n), str(n % 4)) for n in range(13)]) is Task.CLASSIFICATION
    assert task([("", "a")] * 9) is Task.OPEN_ENDED


@given(
    st.lists(st.tuples(st.integers(0, 40).map(str), st.sampled_from(["a", "b", "c"])), min_size=1, max_size=200),
    st.integers(1, 50),
)
def test_parts_are_disjoint_complete_and_never_share_a_prompt(rows: list[tuple[str, str]], size: int) -> None:
    mask = validation(rows, size)
    assert len(mask) == len(rows)
    train, valid = ([row for row, chosen in zip(rows, mask, strict=True) if chosen is side] for side in (False, True))
    assert Counter(train) + Counter(valid) == Counter(rows)
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in valid}
    assert len(valid) <= len(rows) - training_rows(len(rows))
    assert {completion for _, completion in valid} <= {completion for _, completion in train}
    assert validation(rows, size + 1) == mask


def test_classes_have_their_share_of_validation() -> None:
    rows = [(f"text {n}", "rare" if n % 20 == 0 else "often") for n in range(10_000)]
    chosen = Counter(completion for (_, completion), yes in zip(rows, validation(rows, 999), strict=True) if yes)
    assert chosen == {"often": 950, "rare": 50}


def validation(rows: list[tuple[str, str]], size: int) -> list[bool]:
    with Strata() as strata:
        for batch in batches(rows, size):
            strata.add(batch)
        return list(itertools.chain.from_iterable(mask.tolist() for mask in strata.validation()))


def test_a_random_split_takes_each_row_at_most_once() -> None:
    order = sampled_order(6_000)
    assert len(set(order.tolist())) == 5_000
    assert (order.min(), order.max()) == (0, 5_999)


def test_names_are_free_and_go_together(tmp_path: Path) -> None:
    path = tmp_path / "my.data.csv"
    assert [name.name for name in output_names(path, ["_prepared"])] == ["my.data_prepared.jsonl"]
    (tmp_path / "my.data_prepared_train.jsonl").symlink_to(
        "nowhere"
    )  # a name is taken also by a link that leads nowhere
    assert [name.name for name in output_names(path, ["_prepared_train", "_prepared_valid"])] == [
        "my.data_prepared_train (1).jsonl",
        "my.data_prepared_valid (1).jsonl",
    ]


@pytest.mark.parametrize("nameless", [True, False])
def test_nothing_is_left_unless_it_is_published(
    tmp_path: Path, nameless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not nameless:  # as on systems without O_TMPFILE
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    with pytest.raises(RuntimeError), Staged(tmp_path) as staged:
        staged.write(Batch(1, ["a/b"], ["c"], 0))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with Staged(tmp_path) as staged:
        staged.write(Batch(1, ["a/b"], ["é\n"], 0))
        (name,) = publish(tmp_path / "x.csv", [("_prepared", staged)])
    assert [path.name for path in tmp_path.iterdir()] == ["x_prepared.jsonl"] == [name.name]
    assert name.read_text() == '{"prompt":"a\\/b","completion":"é\\n"}\n'
    assert json.loads(name.read_text())["prompt"] == "a/b"
    assert name.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("a-b.jsonl", "a-b.jsonl"),
        (" no", '" no"'),
        (" no\n", '" no\n"'),
        ('$x"`\\', '"\\$x\\"\\`\\\\"'),
        ("", '""'),
        ("\x1b[1m'é\\", r"$'\x1b[1m\x27\xc3\xa9\x5c'"),
        ("\udcff.csv", r"$'\xff.csv'"),
    ],
)
def test_words_are_quoted_for_a_shell(word: str, written: str) -> None:
    assert quoted([word]) == written
    shell = subprocess.run(["bash", "-c", f"printf %s {written}"], capture_output=True, check=True)
    assert shell.stdout == os.fsencode(word)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(3.14, "3.1 seconds"), (59, "59 seconds"), (150, "2.5 minutes"), (8_000, "2.2 hours"), (1e6, "11.6 days")],
)
def test_durations_are_for_people(seconds: float, said: str) -> None:
    assert duration(seconds) == said
