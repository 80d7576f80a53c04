"""What should not be in a training set: keys, and the data of persons; and characters that nobody types. Pure.

Few false alarms matter more than many kinds: what looks like a placeholder is let through, numbers have to check out.
"""

from __future__ import annotations

import bisect
import re
import string
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

KINDS = ("secrets", "card_numbers", "email_addresses", "phone_numbers", "control_characters")

PLACEHOLDERS = {
    "secrets": "[secret]",
    "card_numbers": "[card number]",
    "email_addresses": "[email address]",
    "phone_numbers": "[phone number]",
}

_SECRET_BEGINS = (
    "-----BEGIN",
    "sk-",
    "sk_live_",
    "rk_live_",
    "AKIA",
    "ASIA",
    "AIza",
    "ghp_",
    "gho_",
    "ghs_",
    "ghu_",
    "ghr_",
    "github_pat_",
    "glpat-",
    "xox",
    "hf_",
    "npm_",
    "pypi-",
    "SG.",
    "GOCSPX-",
    "ya29.",
    "dop_v1_",
    "shpat_",
    "shpss_",
    "dckr_pat_",
    "whsec_",
    "AGE-SECRET-KEY-1",
    "xapp-",
    "secret_access_key",
    "SECRET_ACCESS_KEY",
    "SecretAccessKey",
    "AccountKey=",
    "eyJ",
    "://",
)
"""One of them stands in every secret that is known here: most texts need no closer look."""
_SECRET = re.compile(
    r"""
    -----BEGIN\ (?:[A-Z0-9]+\ )*PRIVATE\ KEY(?:\ BLOCK)?-----
    | (?<![\w-]) (?:
        sk-(?:proj-|ant-|svcacct-|or-)?[A-Za-z0-9_-]{20,}
        | [sr]k_live_[A-Za-z0-9]{16,}
        | A[KS]IA[0-9A-Z]{16}
        | AIza[\w-]{35}
        | gh[oprsu]_[A-Za-z0-9]{36}
        | github_pat_\w{40,}
        | glpat-[\w-]{20,}
        | xox[abprs]-[A-Za-z0-9-]{16,}
        | hf_[A-Za-z0-9]{30,}
        | npm_[A-Za-z0-9]{36}
        | pypi-[\w-]{50,}
        | SG\.[\w-]{16,32}\.[\w-]{16,64}
        | GOCSPX-[\w-]{20,}
        | ya29\.[\w-]{20,}
        | dop_v1_[a-f0-9]{64}
        | shp(?:at|ss)_[a-fA-F0-9]{32}
        | dckr_pat_[\w-]{20,}
        | whsec_[A-Za-z0-9+/]{24,}
        | AGE-SECRET-KEY-1[0-9A-Z]{50,}
        | xapp-\d-[A-Z0-9]{8,}-\d+-[A-Za-z0-9]{16,}
        | eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}
    ) (?![\w-])
    | (?:secret_access_key|SECRET_ACCESS_KEY|SecretAccessKey)["']?[ ]{0,3}[=:][ ]{0,3}["']?[A-Za-z0-9/+]{40}(?![\w/+])
    | AccountKey=[A-Za-z0-9+/]{80,96}={0,2}
    | ://[^\s:/@\0]{1,64}:[^\s:/@\0]{6,64}@(?=[\w.-]+)
    """,
    re.VERBOSE,
)
_FEWEST_DIFFERENT = 8
"""Characters of a key: `sk-xxxxxxxxxxxxxxxxxxxxxxxx` is a placeholder."""
_PLACEHOLDER = re.compile(r"example|your|placeholder|password@|xxxx|<|\{|\$", re.IGNORECASE)

_EMAIL = re.compile(
    r"(?<=[A-Za-z0-9_%+-])@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24})(?![\w@])"
)
_NOBODYS = re.compile(
    r"(?:^|\.)(?:example\.\w+|(?:domain|email|company|mail|yourdomain|yourcompany)\.com|[\w-]+\.(?:example|test|invalid|"
    r"localhost|local))$",
    re.IGNORECASE,
)
"""Reserved for examples (RFC 2606), or used for them."""
_CREDENTIALS = re.compile(r"://[^\s/\0]*$")
"""Before the @ of an address on the net."""
_MOST_CREDENTIALS = 132
_PHONE = re.compile(
    r"(?<![\w.,+/=#-])(?:"
    r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"
    r"|\(\d{3}\) ?\d{3}[-. ]\d{4}"
    r"|\d{3}([-.])\d{3}\1\d{4}"
    r")(?![\w-]|\.\d|,\d)"
)
_FREE_CALLS = frozenset({"800", "833", "844", "855", "866", "877", "888"})
_CARD = re.compile(
    r"(?<![\w.,+-])(?:"
    r"(?:4\d{3}|5[1-5]\d{2}|2[2-7]\d{2}|6\d{3})([ -]?)\d{4}\1\d{4}\1\d{4}"
    r"|3[47]\d{2}([ -]?)\d{6}\2\d{5}"
    r")(?![\w-]|\.\d)"
)
_CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_HALF = re.compile("[\ud800-\udfff]")
_KEY_END = re.compile(r"-----END [^\n-]{0,64}-----")
_BEFORE_AT = string.ascii_letters + string.digits + "_.%+-"
_NOT_DIGITS = re.compile(r"\D")


@dataclass(frozen=True, slots=True)
class Scan:
    """For each of KINDS the places of the texts that hold it, in order, each once."""

    places: dict[str, list[int]]


def scan(texts: Sequence[str]) -> Scan:
    """Looks through texts, all at once: one search over all is several times faster than one for each."""
    joined = "\0".join(texts)
    if texts and joined.count("\0") >= len(texts):  # some text holds one, and is split by another sign
        odd = [place for place, text in enumerate(texts) if "\0" in text]
        rest = scan([text.replace("\0", " ") for text in texts])
        rest.places["control_characters"] = sorted({*rest.places["control_characters"], *odd})
        return rest
    ends = list(accumulate(len(text) + 1 for text in texts))
    return Scan(
        {
            kind: list(dict.fromkeys(bisect.bisect(ends, match.start()) for match in _matches(kind, joined)))
            for kind in KINDS
        }
    )


def redacted(text: str, kinds: Collection[str], instead: Callable[[str], str] | None = None) -> str:
    """The text with a placeholder for each find of these kinds (of PLACEHOLDERS), or with what `instead` makes of it.

    >>> redacted("Ask jane.doe@mailbox.org", ["email_addresses"])
    'Ask [email address]'
    """
    for kind in kinds:
        while spans := list(_spans(kind, text)):  # what is taken out may uncover another
            for start, end in reversed(spans):
                put = PLACEHOLDERS[kind] if instead is None else instead(text[start:end])
                text = text[:start] + put + text[end:]
    return text


def without_controls(text: str) -> str:
    """The text without control characters, NUL among them."""
    return _CONTROL.sub("", text).replace("\0", "")


def half_characters(texts: Sequence[str]) -> list[int]:
    """Places of the texts with half a surrogate pair, which no bytes stand for."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return [place for place, text in enumerate(texts) if _HALF.search(text)]
    return []


def without_halves(text: str) -> str:
    """The text with U+FFFD for half characters."""
    return _HALF.sub("\N{REPLACEMENT CHARACTER}", text)


def _matches(kind: str, text: str) -> Iterator[re.Match[str]]:
    # A quick look spares most texts the search.
    if (kind == "secrets" and not any(begin in text for begin in _SECRET_BEGINS)) or (
        kind == "email_addresses" and "@" not in text
    ):
        return
    pattern, counts = _FINDERS[kind]
    yield from (match for match in pattern.finditer(text) if counts(match))


def _spans(kind: str, text: str) -> Iterator[tuple[int, int]]:
    """Where the finds lie, each whole: none within another."""
    reached = 0
    for match in _matches(kind, text):
        start, end = match.span()
        if start < reached:
            continue
        if kind == "email_addresses":
            start = max(reached, len(text[:start].rstrip(_BEFORE_AT)))
        elif match[0].startswith("-----"):
            closing = _KEY_END.search(text, end)
            end = len(text) if closing is None else closing.end()
        yield start, end
        reached = end


def _secret(match: re.Match[str]) -> bool:
    key = match[0]
    if key.startswith("-----"):
        return True
    if _PLACEHOLDER.search(key):
        return False
    if key.startswith("://"):
        return True
    body = key[4:]
    return len(set(body)) >= _FEWEST_DIFFERENT and any(map(str.isdigit, body)) and any(map(str.isalpha, body))


def _somebodys(match: re.Match[str]) -> bool:
    before = match.string[max(0, match.start() - _MOST_CREDENTIALS) : match.start()]
    return not _NOBODYS.search(match[1]) and not _CREDENTIALS.search(before)


def _phone(match: re.Match[str]) -> bool:
    digits = _NOT_DIGITS.sub("", match[0])
    if match[0].startswith("+"):
        return 10 <= len(digits) <= 15 and len(set(digits)) > 2
    area, exchange, line = digits[:3], digits[3:6], digits[6:]
    fictional = exchange == "555" and line.startswith("01")
    return area not in _FREE_CALLS and not fictional and area[0] not in "01" and exchange[0] not in "01"


def _luhn(digits: str) -> bool:
    """Whether the check digit is right (ISO/IEC 7812-1, annex B).

    >>> _luhn("4012888888881881"), _luhn("4012888888881882")
    (True, False)
    """
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0 and len(set(digits)) > 2


_FINDERS: dict[str, tuple[re.Pattern[str], Callable[[re.Match[str]], bool]]] = {
    "secrets": (_SECRET, _secret),
    "card_numbers": (_CARD, lambda match: _luhn(_NOT_DIGITS.sub("", match[0]))),
    "email_addresses": (_EMAIL, _somebodys),
    "phone_numbers": (_PHONE, _phone),
    "control_characters": (_CONTROL, lambda match: True),
}
