"""Rows without a defect, and defects to plant into rows: what `benchmarks.doctor` and its test measure with."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

Row = tuple[str, str]

SHARE = 0.01
"""Of the rows get each defect."""
FEWEST_WORDS = 30
"""Of rows in which a word is replaced: in shorter ones another word makes another row."""
UNUSUAL = " unputdownable"
"""A class name that is several tokens for any small vocabulary."""
LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Set:
    """Rows for training and validation."""

    name: str
    training: Sequence[Row]
    validation: Sequence[Row]
    separator: str
    stop: str | None
    talk: bool = False
    """Prompts hold the separator earlier too."""
    classes: tuple[str, ...] = ()
    """Completions, where they are classes."""


@dataclass(frozen=True, slots=True)
class Planted:
    """A set with defects in it."""

    rows: Set
    training: Mapping[str, set[int]]
    """By the id of the finding, the training rows that it should name, counted from 1."""
    validation: Mapping[str, set[int]]
    touched: frozenset[int] = frozenset()
    """Training rows that a planted one was copied from."""


def plant(one: Set, chance: Random, context_tokens: int) -> Planted:
    """All defects of rows that fit a set, each in rows of its own; no row is added or moved."""
    training, validation = list(one.training), list(one.validation)
    places = iter(chance.sample(range(len(training)), len(training)))
    donors: set[int] = set()
    in_training: dict[str, set[int]] = {}
    for id_, spoil in row_defects(one, context_tokens).items():
        some = [next(places) for _ in range(how_many(training))]
        for place in some:
            training[place] = spoil(training[place], chance)
        in_training[id_] = {place + 1 for place in some}
    in_training["duplicated_rows"] = set()
    for _ in range(how_many(training)):
        first, second = sorted((next(places), next(places)))
        training[second] = training[first]
        donors.add(first + 1)
        in_training["duplicated_rows"].add(second + 1)
    if one.classes:
        in_training["contradicting_rows"] = set()
        for _ in range(how_many(training)):
            first, second = next(places), next(places)
            prompt, label = training[first]
            training[second] = prompt, chance.choice([other for other in one.classes if other != label])
            in_training["contradicting_rows"] |= {first + 1, second + 1}
    untouched = [training[place] for place in places]
    in_validation: dict[str, set[int]] = {}
    targets = iter(chance.sample(range(len(validation)), len(validation)))
    for id_, leak in leaks(one).items():
        fit = untouched if id_ != "overlap_near" else [row for row in untouched if words(row) >= FEWEST_WORDS]
        for row in chance.sample(fit, min(len(fit), how_many(validation))):
            place = next(targets)
            validation[place] = leak(row, chance)
            in_validation.setdefault(id_, set()).add(place + 1)
    spoilt = replace(one, training=training, validation=validation)
    return Planted(spoilt, in_training, in_validation, frozenset(donors))


def whole_file_defects(one: Set) -> Iterator[tuple[str, Set]]:
    """Sets with one defect of the whole file, and the id of the finding."""
    if not one.classes:
        return
    stop = one.stop or ""
    first, second = one.classes[:2]
    yield "class_tokens", _renamed(one, {first: UNUSUAL + stop})
    yield "class_first_tokens", _renamed(one, {first: f" very good{stop}", second: f" very bad{stop}"})
    rare = [place for place, (_, label) in enumerate(one.training) if label == first][2:]
    yield (
        "class_imbalance",
        replace(one, training=[r for place, r in enumerate(one.training) if place not in set(rare)]),
    )
    yield "unknown_classes", replace(one, validation=[(p, UNUSUAL + stop) for p, _ in one.validation[:5]])
    yield "separator_missing", replace(one, training=[(p.removesuffix(one.separator), c) for p, c in one.training])


def how_many(some: Sequence[Row]) -> int:
    """Rows get each defect."""
    return max(5, int(SHARE * len(some)))


def words(row: Row) -> int:
    """Words of a row."""
    return len(f"{row[0]} {row[1]}".split())


Spoil = Callable[[Row, Random], Row]


def row_defects(one: Set, context_tokens: int) -> dict[str, Spoil]:
    """What spoils a single training row, by the id of the finding."""
    separator, stop = one.separator, one.stop
    body = len(separator)

    def inside(text: Callable[[Random], str]) -> Spoil:
        """Puts a text among the words of the prompt."""
        return lambda row, chance: (_insert(row[0][:-body], text(chance), chance) + separator, row[1])

    spoils: dict[str, Spoil] = {
        "separator_missing": lambda row, chance: (row[0][:-body].rstrip() or "?", row[1]),
        "separator_space": lambda row, chance: (
            chance.choice([row[0] + " ", row[0][:-body] + separator.strip() + "\t"]),
            row[1],
        ),
        "completion_space": lambda row, chance: (row[0], row[1].lstrip() or row[1]),
        "empty_completion": lambda row, chance: (row[0], ""),
        "half_characters": inside(lambda chance: chance.choice(["\ud83d", "\udc4d", "ok\ud800"])),
        "control_characters": inside(lambda chance: chr(chance.choice([0, 1, 7, 8, 27, 127, 0x93, 0xFEFF]))),
        "special_tokens": lambda row, chance: (row[0], f"{row[1][:1]}<|endoftext|>{row[1][1:]}"),
        "long_examples": inside(lambda chance: "so long " * context_tokens),
        "secrets": inside(_secret),
        "card_numbers": inside(_card),
        "email_addresses": inside(_email),
        "phone_numbers": inside(_phone),
    }
    if not one.talk:
        spoils["separator_inside"] = inside(lambda chance: f"this{separator}that")
    if stop is not None:
        spoils["stop_missing"] = lambda row, chance: (row[0], row[1].removesuffix(stop))
        spoils["stop_inside"] = lambda row, chance: (row[0], f" So{stop}{row[1]}")
    return spoils


def leaks(one: Set) -> dict[str, Spoil]:
    """What makes a validation row of a training row, by the id of the finding."""

    def other_spelling(row: Row, chance: Random) -> Row:
        text = row[0].removesuffix(one.separator)
        changed = chance.choice([text.swapcase(), f"{text.replace(' ', '  ')}!", text.upper()])
        return changed + (" ." if changed == text else "") + one.separator, row[1]

    def other_word(row: Row, chance: Random) -> Row:
        some = row[0].removesuffix(one.separator).split(" ")
        some[chance.randrange(1, len(some))] = "".join(chance.choices(string.ascii_lowercase, k=9))
        return " ".join(some) + one.separator, row[1]

    return {
        "overlap_exact": lambda row, chance: row,
        "overlap_spelling": other_spelling,
        "overlap_near": other_word,
    }


def made_up() -> list[Set]:
    """Three sets without a defect, for classification, for generation, and of talks."""
    chance = Random(1)
    kinds = " complaint", " question", " praise"
    labels = [(f"{_text(chance, n)} ->", chance.choice(kinds)) for n in range(2_400)]
    tales = [(f"{_text(chance, n)}\n\n###\n\n", f" {_text(chance, n + 10**6)} END") for n in range(1_800)]
    talks = []
    for n in range(1_200):
        turns = "".join(f"Customer: {_text(chance, n)}\nAgent: Let me see.\n" for _ in range(chance.randint(1, 3)))
        talks.append((f"{turns}Customer: And {n}?\nAgent:", f" {_text(chance, n + 10**6)}\n"))
    return [
        Set("made up: classes", labels[:2_000], labels[2_000:], " ->", None, classes=kinds),
        Set("made up: texts", tales[:1_500], tales[1_500:], "\n\n###\n\n", " END"),
        Set("made up: talks", talks[:1_000], talks[1_000:], "\nAgent:", "\n", talk=True),
    ]


_WORDS = (  # noqa: SIM905  a text is easier to read
    "order late parcel refund please account card money never again quickly friendly broken screen battery charger "
    "return label weeks answer phone support customer again thanks Monday London invoice number wrong size colour "
    "caf\u00e9 na\u00efve \u65e5\u672c \U0001f44d \u2026 don't \u201cwell\u201d"
).split()
_LOOKALIKES: Sequence[Callable[[Random], str]] = (
    lambda chance: f"order {chance.randrange(10**9, 10**10)}",
    lambda chance: f"tracking 1Z{chance.randrange(10**15, 10**16)}",
    lambda chance: f"on 2023-{chance.randint(10, 12)}-{chance.randint(10, 28)} 12:{chance.randint(10, 59)}:00",
    lambda chance: f"${chance.randint(1, 999)},{chance.randint(100, 999)}.50",
    lambda chance: f"from 192.168.{chance.randint(0, 255)}.{chance.randint(0, 255)}",
    lambda chance: f"v{chance.randint(1, 9)}.{chance.randint(0, 30)}.{chance.randint(0, 99)}-beta",
    lambda chance: f"https://shop.example.com/p/{chance.randrange(10**8)}?a=b&c={chance.randrange(99)}",
    lambda chance: f"@{chance.choice(_WORDS)}_{chance.randrange(99)} #late",
    lambda chance: "someone@example.com",
    lambda chance: f"ISBN 978-3-16-{chance.randrange(10**5, 10**6)}-0",
    lambda chance: f"{chance.randint(2, 9)} - {chance.randint(10, 99)} of {chance.randint(100, 999)}",
    lambda chance: "1-800-555-0199",
    lambda chance: f"sku-{''.join(chance.choices(string.hexdigits, k=12))}",
)


def _text(chance: Random, number: int) -> str:
    some = chance.choices(_WORDS, k=chance.randint(6, 60))
    some.insert(chance.randrange(len(some)), chance.choice(_LOOKALIKES)(chance))
    return f"{' '.join(some).capitalize()}, {number}"


def _insert(text: str, other: str, chance: Random) -> str:
    some = text.split(" ")
    some.insert(chance.randrange(len(some) + 1), other)
    return " ".join(some)


def _secret(chance: Random) -> str:
    def letters(count: int, alphabet: str = LETTERS) -> str:
        return "1" + "".join(chance.choices(alphabet, k=count - 2)) + "a"

    return chance.choice(
        [
            f"sk-{letters(48)}",
            f"sk-proj-{letters(60)}",
            f"AKIA{''.join(chance.choices(string.ascii_uppercase + string.digits, k=14))}4Q",
            f"AIza{letters(35)}",
            f"ghp_{letters(36)}",
            f"hf_{letters(34)}",
            f"ghu_{letters(36)}",
            f"aws_secret_access_key={letters(40)}",
            f"AccountKey={letters(86)}==",
            f"pypi-{letters(80)}",
            f"SG.{letters(22)}.{letters(43)}",
            f"GOCSPX-{letters(28)}",
            f"ya29.{letters(60)}",
            f"dop_v1_{''.join(chance.choices('0123456789abcdef', k=64))}",
            f"dckr_pat_{letters(27)}",
            f"whsec_{letters(32)}",
            f"sk_live_{letters(24)}",
            f"xoxb-{chance.randrange(10**11, 10**12)}-{letters(24)}",
            f"eyJ{letters(20)}.eyJ{letters(40)}.{letters(43)}",
            f"postgres://admin:{letters(12)}@db.internal:5432/x",
            f"-----BEGIN {chance.choice(['RSA ', 'EC ', 'OPENSSH ', ''])}PRIVATE KEY-----\nMIIE{letters(60)}",
        ]
    )


def _card(chance: Random) -> str:
    begin = chance.choice(["4", "51", "55", "2221", "6011", "37"])
    size = 15 if begin == "37" else 16
    digits = begin + "".join(chance.choices(string.digits, k=size - 1 - len(begin)))
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[::-2])
    digits += str(-(doubled + sum(map(int, digits[-2::-2]))) % 10)
    gap = chance.choice(["", " ", "-"])
    cuts = (4, 10, 15) if size == 15 else (4, 8, 12, 16)
    return gap.join(digits[start:end] for start, end in zip((0, *cuts), cuts, strict=False))


def _email(chance: Random) -> str:
    name = "".join(chance.choices(string.ascii_lowercase, k=6))
    return (
        f"{name}{chance.choice(['', '.doe', '+x', '_9'])}@{name[::-1]}.{chance.choice(['com', 'co.uk', 'org', 'io'])}"
    )


def _phone(chance: Random) -> str:
    area, exchange = chance.choice(["212", "415", "617"]), chance.randint(200, 499)
    line = chance.randrange(1_000, 10_000)
    return chance.choice(
        [
            f"({area}) {exchange}-{line}",
            f"{area}-{exchange}-{line}",
            f"{area}.{exchange}.{line}",
            f"+1 {area} {exchange} {line}",
            f"+1-{area}-{exchange}-{line}",
            f"+44 20 7{exchange} {line}",
            f"+49 (0) 30 {exchange}{line}",
            "+33 6 " + " ".join(str(chance.randint(10, 99)) for _ in range(4)),
        ]
    )


def _renamed(one: Set, names: Mapping[str, str]) -> Set:
    return replace(one, training=[(prompt, names.get(label, label)) for prompt, label in one.training])
