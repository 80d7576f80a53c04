"""What the doctor finds in rows, and what it lets through."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import TOKENIZER
from tunesmith.data import doctor_overlap, keys
from tunesmith.data.doctor import Codec, Examination, Examined, first_marks
from tunesmith.data.doctor_classes import judge_classes
from tunesmith.data.doctor_findings import about_validation, diagnose
from tunesmith.data.doctor_marks import MarkFaults, Marks
from tunesmith.data.doctor_overlap import FEWEST_RUNS, NEAR, Overlap, ValidationRows, normal_words
from tunesmith.data.doctor_private import KINDS, half_characters, scan
from tunesmith.data.facts import Lengths
from tunesmith.data.findings import Finding, Severity
from tunesmith.data.keys import KeyLog
from tunesmith.data.rows import Batch, RowList
from tunesmith.tokenizer import Tokenizer

TOKENS = Tokenizer.from_folder(TOKENIZER.parent)
CODEC = Codec(TOKENS.encode_many, TOKENS.decode, tuple(map(TOKENS.token_text, TOKENS.ending_ids)))
Row = tuple[str, str]


def batches(rows: Sequence[Row], size: int = 50) -> list[Batch]:
    return [
        Batch(start + 1, [p for p, _ in rows[start : start + size]], [c for _, c in rows[start : start + size]], 0)
        for start in range(0, len(rows), size)
    ]


def examined(rows: Sequence[Row], marks: Marks | None = None, codec: Codec | None = CODEC) -> Examined:
    lengths = Lengths("ada", 60, lambda pairs: [len(f"{p} {c}".split()) for p, c in pairs])
    with Examination(marks or first_marks(batches(rows)), lengths, codec) as examination:
        for batch in batches(rows):
            examination.add(batch)
        return examination.result()


def found(rows: Sequence[Row]) -> dict[str, Finding]:
    findings = diagnose(examined(rows), CODEC).findings
    assert len({finding.id for finding in findings}) == len(findings)
    return {finding.id: finding for finding in findings}


def reviews(count: int = 240) -> list[Row]:
    return [(f"The parcel number {n} arrived ->", " positive" if n % 2 else " negative") for n in range(count)]


def stories(count: int = 600) -> list[Row]:
    return [(f"Tell of the ship {n}\n\n###\n\n", f" Ship {n} sailed. It came home. END") for n in range(count)]


def test_clean_rows_have_no_findings() -> None:
    assert list(found(reviews())) == []
    assert list(found(stories())) == []
    assert list(found([("", f" Once {n} ships sailed.") for n in range(600)])) == []


@pytest.mark.parametrize(
    ("id_", "row", "severity"),
    [
        ("separator_missing", ("The parcel came", " positive"), Severity.SUGGESTED),
        ("separator_space", ("The parcel came -> ", " positive"), Severity.SUGGESTED),
        ("separator_space", ("The parcel came->", " positive"), Severity.SUGGESTED),
        ("separator_inside", ("The parcel -> me ->", " positive"), Severity.SUGGESTED),
        ("completion_space", ("The parcel came ->", "positive"), Severity.SUGGESTED),
        ("empty_completion", ("The parcel came ->", ""), Severity.REQUIRED),
        ("half_characters", ("The parcel \ud83d ->", " positive"), Severity.REQUIRED),
        ("half_characters", ("The parcel came ->", " positive\udc00"), Severity.REQUIRED),
        ("control_characters", ("The par\x08cel came ->", " positive"), Severity.SUGGESTED),
        ("control_characters", ("The par\0cel came ->", " positive"), Severity.SUGGESTED),
        ("special_tokens", ("The parcel came <|endoftext|> ->", " positive"), Severity.SUGGESTED),
        ("long_examples", ("so " * 70 + "->", " positive"), Severity.REQUIRED),
        ("duplicated_rows", ("The parcel number 1 arrived ->", " positive"), Severity.SUGGESTED),
        ("secrets", ("My key is sk-proj-a8Fj3kLm29dKwq77ZpRt ->", " positive"), Severity.REQUIRED),
        ("email_addresses", ("Write to jo.doe@post.org ->", " positive"), Severity.SUGGESTED),
    ],
)
def test_each_odd_row_is_found_and_named(id_: str, row: Row, severity: Severity) -> None:
    rows = reviews()
    rows.insert(77, row)
    finding = found(rows)[id_]
    place = 79 if id_ == "duplicated_rows" else 78
    if id_ == "duplicated_rows":
        rows.insert(78, rows.pop(77))
        place = 78
    assert finding.rows == RowList(1, (place,))
    assert finding.severity is severity
    assert finding.fix is not None


def test_prompts_with_two_answers_contradict_each_other_where_there_are_classes() -> None:
    rows = reviews()
    rows[100] = (rows[7][0], " negative")
    finding = found(rows)["contradicting_rows"]
    assert (finding.severity, finding.rows) == (Severity.SUGGESTED, RowList(2, (8, 101)))
    tales = stories()
    tales[100] = (tales[7][0], tales[100][1])
    assert found(tales)["contradicting_rows"].severity is Severity.NOTE


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), max_size=40), st.integers(1, 9))
def test_disputes_are_those_of_a_plain_comparison(pairs: list[tuple[int, int]], at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch, KeyLog(2) as log:
        patch.setattr(keys, "AT_ONCE", at_once)
        log.add([one for one, _ in pairs], [other for _, other in pairs])
        expected = [one != 3 and any(one == a and other != b for a, b in pairs) for one, other in pairs]
        assert log.disputes(without=3).tolist() == expected


def test_a_file_without_marks_is_told_so_once_with_what_prepare_does() -> None:
    rows = [(f"Tell of the ship {n}", f" Ship {n} sailed") for n in range(600)]
    findings = found(rows)
    assert findings["separator_missing"].rows.count == findings["stop_missing"].rows.count == 600
    fixes = [findings[id_].fix for id_ in ("separator_missing", "stop_missing")]
    assert [dict(fix.change) for fix in fixes if fix] == [{"prompt_suffix": " ->"}, {"completion_suffix": "\n"}]


def test_stop_sequences_are_missed_and_found_inside() -> None:
    rows = stories()
    rows[3] = (rows[3][0], " It sailed.")
    rows[4] = (rows[4][0], " The END of it. END")
    findings = found(rows)
    assert findings["stop_missing"].rows == RowList(1, (4,))
    assert findings["stop_inside"].rows == RowList(1, (5,))


@pytest.mark.parametrize(
    ("prompts", "separator"),
    [
        (["Is it?\n\n###\n\n", "Was it?\n\n###\n\n"], "\n\n###\n\n"),
        (["one two =>", "three four =>", "five"], " =>"),
        (["Is it so?", "Was it so?"], "?"),
        (["Is it? Or so?", "Was it? Or so?"], None),
        (["the cat", "a bat"], None),
        ([], None),
        ([""], None),
    ],
)
def test_separators_are_what_most_prompts_end_with_on_purpose(prompts: list[str], separator: str | None) -> None:
    assert Marks.of(prompts, [""] * len(prompts)).separator == separator


@pytest.mark.parametrize(
    ("completions", "stop"),
    [
        ([" positive", " negative"], None),
        ([" He came.\n", " She went.\n", " They"], "\n"),
        ([" He came. END", " She went. END"], " END"),
        ([" a\n###\n", " b\n###\n"], "\n###\n"),
        ([" He came.", " She went."], "."),
        ([" He came. So.", " She went. So."], None),
    ],
)
def test_stops_are_what_most_completions_end_with_on_purpose(completions: list[str], stop: str | None) -> None:
    assert Marks.of([""] * len(completions), completions).stop == stop


def test_turns_of_a_talk_hold_the_separator_by_design() -> None:
    rows = [(f"Customer: {n}?\nAgent: yes.\nCustomer: so {n}?\nAgent:", f" It is {n}.\n") for n in range(600)]
    findings = found(rows)
    assert list(findings) == ["dialogue"]
    assert findings["dialogue"].severity is Severity.NOTE


def test_classes_are_counted_and_weighed() -> None:
    rows = reviews(400) + [(f"The box {n} is here ->", " other") for n in range(19)]
    findings = found(rows)
    assert "other (19)" in findings["few_rows"].explanation
    assert findings["few_rows"].severity is Severity.NOTE
    assert (findings["class_imbalance"].severity, findings["class_imbalance"].rows.count) == (Severity.SUGGESTED, 19)
    assert "class_imbalance" not in found(rows + [(f"The bag {n} is here ->", " other") for n in range(2)])


def test_few_rows_for_generation_are_noted() -> None:
    assert found(stories(499))["few_rows"].severity is Severity.NOTE
    assert "few_rows" not in found(stories(500))


def words_to_tokens(texts: Sequence[str]) -> list[list[int]]:
    """A token a word of up to six letters, the rest of it one more; capitals make other tokens."""
    return [[hash(piece) for word in text.split() for piece in (word[:6], word[6:]) if piece] for text in texts]


def test_class_names_are_one_token_each_and_differ_in_it() -> None:
    names = [" good", " very good", " very bad", " disappointed", " disappearing"]
    judged = judge_classes(names, words_to_tokens)
    assert judged.several_tokens == tuple(names[1:])
    assert judged.alike == tuple(names[1:])
    spelt = [judged.spellings.get(name, name) for name in names]
    tokens = words_to_tokens(spelt)
    assert {len(ids) for ids in tokens} == {1}
    assert len({ids[0] for ids in tokens}) == len(names)
    assert judge_classes(spelt, words_to_tokens) == judge_classes([], words_to_tokens)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), max_size=12, unique=True))
def test_proposed_names_always_do(names: list[str]) -> None:
    names = list(dict.fromkeys(f" {name.strip()}" for name in names if name.strip()))
    judged = judge_classes(names, TOKENS.encode_many)
    tokens = TOKENS.encode_many([judged.spellings.get(name, name) for name in names])
    assert all(len(ids) == 1 for ids in tokens)
    assert len({ids[0] for ids in tokens}) == len(names)


def test_class_findings_name_a_spelling() -> None:
    rows = [(prompt, {" positive": " unputdownable"}.get(name, name)) for prompt, name in reviews()]
    diagnosis = diagnose(examined(rows), CODEC)
    assert [finding.id for finding in diagnosis.findings] == ["class_tokens"]
    spelling = diagnosis.class_spellings[" unputdownable"]
    assert len(TOKENS.encode(spelling)) == 1
    fix = diagnosis.findings[0].fix
    assert fix is not None
    assert f"`unputdownable` -> `{spelling.strip()}`" in fix.action
    assert diagnosis.findings[0].rows.count == 120


def test_texts_whose_tokens_say_something_else_are_found() -> None:
    composing = Codec(lambda texts: [[ord(letter) for letter in text] for text in texts], lambda ids: "\u00e9", ())
    rows = [("cafe\u0301 ->", " a"), ("caf\u00e9 ->", " a"), ("cafe ->", " b")]
    assert examined(rows, codec=composing).texts["changed_tokens"] == RowList(1, (1,))


KEY_40 = "a8Fj3kLm29dKwq77ZpRtXc4vB6nM1sDf0gHj/Q+b"
"""As long as a secret key of AWS."""


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("secrets", "key AKIAQ3EGUR7HXNB2MKTP."),
        ("secrets", "-----BEGIN RSA PRIVATE KEY-----\nMIIE"),
        ("secrets", "token=ghp_a8Fj3kLm29dKwq77ZpRtXc4vB6nM1sDf0gHj"),
        ("secrets", "postgres://admin:hunter22@db.host.io/x"),
        ("secrets", "aws_secret_access_key = " + KEY_40),
        ("secrets", '{"SecretAccessKey":"' + KEY_40 + '"}'),
        ("secrets", "DefaultEndpointsProtocol=https;AccountKey=" + 2 * KEY_40 + "abcdef==;"),
        ("secrets", "pypi-AgEIcHlwaS5vcmc" + KEY_40.replace("/", "_")),
        ("secrets", "SENDGRID=SG.a8Fj3kLm29dKwq77ZpRtXc.4vB6nM1sDf0gHja8Fj3kLm29dKwq77ZpRtXc"),
        ("secrets", "client secret GOCSPX-a8Fj3kLm29dKwq77ZpRtXc4v"),
        ("secrets", "ghu_a8Fj3kLm29dKwq77ZpRtXc4vB6nM1sDf0gHj"),
        ("secrets", "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"),
        ("secrets", "docker login -p dckr_pat_a8Fj3kLm29dKwq77ZpRtXc4vB"),
        ("secrets", "dop_v1_" + 4 * "a8f13c1f29d0e477"),
        ("secrets", "signed with whsec_a8Fj3kLm29dKwq77ZpRtXc4vB6nM1sDf"),
        ("secrets", "xapp-1-A02BC3D4E5F-1234567890-a8f13c1f29d0e477b6e1c4f0"),
        ("secrets", "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dBjftJeZ4CVPmB92K27uhb"),
        ("card_numbers", "paid with 4012 8888 8888 1881 today"),
        ("card_numbers", "3782-822463-10005"),
        ("email_addresses", "mail jo+x@my-firm.co.uk!"),
        ("phone_numbers", "call +49 30 901820 11 now"),
        ("phone_numbers", "call (212) 736-5000"),
        ("phone_numbers", "212-736-5000"),
        ("control_characters", "a\x1b[0m"),
        ("control_characters", "\ufeffa"),
    ],
)
def test_secrets_and_personal_data_are_found(kind: str, text: str) -> None:
    texts = ["plain", text, "", text + " " + text]
    assert {name: places for name, places in scan(texts).places.items() if places} == {kind: [1, 3]}


@pytest.mark.parametrize(
    "text",
    [
        "sk-xxxxxxxxxxxxxxxxxxxxxxxx",
        "sk-learn-is-a-library-for-machine-learning",
        "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "Set secret_access_key=<your key> and go on.",
        "The SG. Flensburg-Handewitt.Team plays on Sunday",
        "pypi-publish is a workflow",
        "AKIAIOSFODNN7EXAMPLE",
        "https://user:password@host",
        "postgres://user:<password>@host",
        "https://t.co/abc http://a.b:8000/c@d",
        "jo@example.com @handle me@ a@b @you.me",
        "4012 8888 8888 1882",
        "order 1234567890123456, 20220817123456",
        "10-20-3000, 2022-08-17 12:30:00, 192.168.100.200",
        "+1 million, 3+400, 1-800-555-0199, 212-555-0123",
        "800-736-5000, 0.212-736-5000",
        "ISBN 978-3-16-148410-0; 1,000,000,000",
        "tabs\tand\r\nlines \U0001f468\u200d\U0001f469\u200d\U0001f467",
    ],
)
def test_what_only_looks_like_it_is_let_through(text: str) -> None:
    assert scan([text]).places == {kind: [] for kind in KINDS}


@given(st.lists(st.text(max_size=8), max_size=9))
def test_half_characters_are_those_that_no_bytes_stand_for(texts: list[str]) -> None:
    expected = [place for place, text in enumerate(texts) if any(0xD800 <= ord(letter) < 0xE000 for letter in text)]
    assert half_characters(texts) == expected


def test_scan_reads_nul_like_any_other_sign() -> None:
    texts = ["a\0b", "jo@post.org", "\x01", "\0jo@post.org"]
    places = scan(texts).places
    assert (places["control_characters"], places["email_addresses"]) == ([0, 2, 3], [1, 3])


TEXT = (
    "the customer wrote that the parcel came two days late and the box was open on one side so that the cup in it "
    "had lost its handle which nobody at the counter wanted to believe at first sight"
)


def overlap(validation: Sequence[Row], training: Sequence[Row], separator: str | None = " ->") -> Overlap:
    rows = ValidationRows(separator)
    for batch in batches(validation, 3):
        rows.add(batch)
    for batch in batches(training, 4):
        rows.meet(batch)
    return rows.result()


def test_overlap_is_exact_but_for_spelling_or_near() -> None:
    validation = [
        ("Hello there ->", " a"),
        ("Good MORNING, all! ->", " a"),
        (TEXT + " ->", " a"),
        ("Hello you ->", " a"),
        ("", " alone"),
        ("Unheard of ->", " a"),
    ]
    training = [
        ("Hello there ->", " b"),
        ("good morning all ->", " a"),
        (TEXT.replace("two days", "three days") + " ->", " a"),
        ("Hello thee ->", " a"),
        ("", " alone"),
    ] * 3
    met = overlap(validation, training)
    assert met == Overlap(RowList(2, (1, 5)), RowList(1, (2,)), RowList(1, (3,)), 0)
    assert overlap(validation, []) == Overlap(RowList(), RowList(), RowList(), 0)
    assert overlap([], training) == Overlap(RowList(), RowList(), RowList(), 0)


def runs(row: Row) -> set[tuple[str, ...]]:
    words = normal_words(row[0]) + normal_words(row[1])
    return {tuple(words[start : start + 3]) for start in range(len(words) - 2)}


@pytest.mark.parametrize("seed", range(3))
def test_near_rows_are_those_of_a_comparison_of_all_pairs(seed: int) -> None:
    chance = random.Random(seed)
    words = TEXT.split()

    def text() -> str:
        some = chance.choices(words[:12], k=chance.randint(5, 30))
        return " ".join(some)

    def changed(text: str) -> str:
        some = text.split()
        for _ in range(chance.randint(1, 3)):
            some[chance.randrange(len(some))] = chance.choice(words)
        return " ".join(some)

    training = [(text(), " yes") for _ in range(150)]
    validation = [(changed(chance.choice(training)[0]), " yes") for _ in range(150)]
    met = overlap(validation, training)
    expected = []
    for number, row in enumerate(validation, 1):
        mine, prompts = runs(row), {prompt for prompt, _ in training}
        if row[0] in prompts or len(mine) < FEWEST_RUNS:
            continue
        others = [other for other in map(runs, training) if len(other) >= FEWEST_RUNS]
        if any(len(mine & other) >= NEAR * len(mine | other) for other in others):
            expected.append(number)
    assert met.near == RowList().plus(expected)
    assert len(expected) > 5


def test_beyond_the_room_for_runs_rows_are_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_overlap, "MOST_RUNS", 20)
    validation = [(TEXT + f" {n}", " a") for n in range(5)]
    met = overlap(validation, [(TEXT + " 9", " a"), (TEXT + " 4", " a")])
    assert met == Overlap(RowList(1, (5,)), RowList(), RowList(3, (1, 2, 3)), 2)
    assert [finding.id for finding in about_validation(examined(reviews()), examined([]), met)][
        -1
    ] == "overlap_unlooked"


def test_validation_is_judged_by_the_marks_and_classes_of_training() -> None:
    training = examined(reviews())
    rows = [(f"Is {n} here?\n\n###\n\n", " maybe" if n % 2 else " positive") for n in range(40)]
    findings = {f.id: f for f in about_validation(training, examined(rows, training.marks), overlap([], []))}
    assert findings["separator_missing"].rows.count == 40
    assert findings["unknown_classes"].rows.count == 20
    assert "maybe" in findings["unknown_classes"].explanation


def test_rows_without_completion_are_named_once() -> None:
    faults = MarkFaults(Marks(" ->", "\n"))
    faults.add(Batch(1, ["a ->", "b ->"], ["", " x\n"], 0))
    assert faults.no_space.count == faults.stop_missing.count == 0
    assert found([("a ->", ""), ("b ->", "")])["no_examples"].severity is Severity.FATAL


@given(
    st.lists(st.tuples(st.text(max_size=6), st.text(max_size=6)), max_size=25),
    st.lists(st.tuples(st.text(max_size=6), st.text(max_size=6)), max_size=8),
)
def test_nothing_in_a_text_stops_the_doctor(rows: list[Row], others: list[Row]) -> None:
    training = examined(rows)
    counts = [finding.rows for finding in diagnose(training, CODEC).findings]
    counts += [f.rows for f in about_validation(training, examined(others, training.marks), overlap(others, rows))]
    assert all(0 <= some.count <= max(len(rows), len(others)) for some in counts)
    assert all(1 <= row <= max(len(rows), len(others)) for some in counts for row in some.shown)
