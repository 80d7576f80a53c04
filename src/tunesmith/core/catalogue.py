"""`<home>/bases.toml`: the bases a user adds, read, and written by `tunesmith models pull` and `quantize`. Opens no
checkpoint.

    [curie]
    hub = "HuggingFaceTB/SmolLM2-135M"                      # or: folder = "/models/smollm2-135m"
    revision = "93efa2f097d58c2a74874c7e644dbc9b0cee75a2"   # with hub: a commit, so that the weights never change

Every key: docs/bases.md.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.rundir import write_bytes

FILE = "bases.toml"
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
COMMIT = re.compile(r"[0-9a-f]{40}")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
"""A file directly in a checkpoint folder: no path, nothing hidden."""
MAX_CONTEXT_TOKENS = 1 << 20
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_REWRITTEN = ("folder", "hub", "revision")
"""Keys that `put` decides, whatever it is given; others of an entry stay as the user wrote them."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One table of the file. Either `folder` is given, or `hub` with `revision`."""

    name: str
    folder: Path
    """Where the checkpoint is, or for a hub model will be once it is pulled. Absolute."""
    hub: str | None = None
    """`ORG/NAME` on the model hub."""
    revision: str | None = None
    """The commit; 40 hexadecimal digits."""
    learning_rate: float | None = None
    context_tokens: int | None = None
    price_per_1k_training_tokens: float = 0.0
    sha256: Mapping[str, str] = field(default_factory=dict)
    """File name -> digest; `tunesmith models check` holds the files against them."""

    @property
    def pull_command(self) -> str:
        """What brings a hub model here."""
        return f"tunesmith models pull {self.hub} --revision {self.revision} --as {self.name}"


def hub_folder(home: Path, repository: str, commit: str) -> Path:
    """Where a pulled model lies. The hub allows no `--` within a name, so two repositories never share a folder."""
    return home / "bases" / f"{repository.replace('/', '--')}-{commit[:12]}"


def read_catalogue(home: Path) -> dict[str, Entry]:
    """The entries of a home folder, in their order. Raises ValueError naming entry, key, rule and value."""
    path = home / FILE
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    return {name: _entry(home, name, fields) for name, fields in tables.items()}


def put(home: Path, name: str, keys: Mapping[str, str | int | float], sha256: Mapping[str, str]) -> None:
    """Makes `name` what `keys` say, in place of what it was; other entries, other keys and comments stay as they are.

    Atomic. Raises ValueError with the lines to paste if the file is written in a way that this cannot edit.
    """
    path = (home / FILE).resolve()  # a link to a file kept elsewhere stays a link
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    after = _edited(before, name, keys, sha256)
    expected = tomllib.loads(before)
    kept = {key: value for key, value in expected.get(name, {}).items() if key not in (*_REWRITTEN, *keys, "sha256")}
    expected[name] = {**keys, "sha256": dict(sha256)} | kept
    try:
        understood = tomllib.loads(after) == expected
    except tomllib.TOMLDecodeError:
        understood = False
    if understood:  # what nobody could read afterwards is not written
        _entry(home, name, expected[name])
    else:
        lines = "\n".join(["", *_lines(name, keys), *_digest_lines(name, sha256)])
        raise ValueError(f"{path} writes [{name}] in a way that is not edited here. Put this in its place:\n{lines}")
    write_bytes(path, after.encode())


def _entry(home: Path, name: str, fields: object) -> Entry:
    where = f"{home / FILE}: [{name}]"
    if not NAME.fullmatch(name):
        raise ValueError(f"{where}: a name has lower-case letters, digits, '.', '_' and '-' only, at most 64.")
    if not isinstance(fields, dict):
        raise ValueError(f'{where}: is a table: [{name}] on a line of its own, then folder = "..." below it.')
    unknown = fields.keys() - Entry.__dataclass_fields__.keys() | fields.keys() & {"name"}
    if unknown:
        known = ", ".join(key for key in Entry.__dataclass_fields__ if key != "name")
        raise ValueError(f"{where}: {min(unknown)} is no key of a base. Keys are {known}.")
    if ("folder" in fields) == ("hub" in fields):
        raise ValueError(f'{where}: give either folder = "..." or hub = "ORG/NAME", and not both.')

    def value(key: str, kind: type[T] | tuple[type[T], ...], rule: str, holds: Callable[[T], bool]) -> T | None:
        given = fields.get(key)
        if given is not None and (not isinstance(given, kind) or isinstance(given, bool) or not holds(given)):
            raise ValueError(f"{where}: {key} is {rule}, not {given!r}.")
        return given

    hub = value("hub", str, 'a repository of the hub, "ORG/NAME"', lambda v: bool(REPOSITORY.fullmatch(v)))
    revision = value("revision", str, _revision_rule(hub, name), lambda v: bool(COMMIT.fullmatch(v)))
    if (revision is None) != (hub is None):
        raise ValueError(
            f"{where}: revision goes with hub; a folder has none."
            if hub is None
            else f"{where}: revision is missing; it is {_revision_rule(hub, name)}."
        )
    folder = value("folder", str, "a path in quotes", lambda v: v.strip() != "")
    rate = value("learning_rate", (int, float), "a number between 0 and 1", lambda v: 0 < v < 1)
    price = value("price_per_1k_training_tokens", (int, float), "an amount, 0 or more", lambda v: 0 <= v < 1e6)
    return Entry(
        name=name,
        folder=hub_folder(home, hub, revision or "") if hub is not None else home / Path(folder or "").expanduser(),
        hub=hub,
        revision=revision,
        learning_rate=None if rate is None else float(rate),
        context_tokens=value(
            "context_tokens",
            int,
            f"a whole number from 1 to {MAX_CONTEXT_TOKENS}",
            lambda v: 1 <= v <= MAX_CONTEXT_TOKENS,
        ),
        price_per_1k_training_tokens=float(price or 0),
        sha256=_digests(where, fields.get("sha256", {})),
    )


def _revision_rule(hub: str | None, name: str) -> str:
    return (
        "the 40 hexadecimal digits of a commit, for a branch or a tag can change what it means "
        f"(`tunesmith models pull {hub or 'ORG/NAME'} --as {name}` looks it up and writes it here)"
    )


def _digests(where: str, given: Any) -> dict[str, str]:
    if not isinstance(given, dict):
        raise ValueError(f'{where}: sha256 is a table of file name = "digest", not {given!r}.')
    for name, digest in given.items():
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"{where}: sha256 names {name!r}, which is no file directly in the folder.")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise ValueError(f"{where}: sha256 of {name} is 64 hexadecimal digits in lower case, not {digest!r}.")
    return given


def _lines(name: str, keys: Mapping[str, str | int | float]) -> list[str]:
    # A string of JSON is one of TOML, and so are its numbers.
    return [_header(name), *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in keys.items())]


def _digest_lines(name: str, sha256: Mapping[str, str]) -> list[str]:
    return [_header(name, "sha256"), *(f'"{file}" = "{digest}"' for file, digest in sha256.items())]


def _header(*keys: str) -> str:
    # A dot in a bare key would be a table within a table.
    return f"[{'.'.join(key if re.fullmatch('[A-Za-z0-9_-]+', key) else json.dumps(key) for key in keys)}]"


def _edited(text: str, name: str, keys: Mapping[str, str | int | float], sha256: Mapping[str, str]) -> str:
    """The file with both tables of `name` in place. Line by line; whether it came out right, the caller finds out."""
    lines, entry, digests = text.splitlines(), _lines(name, keys), _digest_lines(name, sha256)
    start, end = _table(lines, name, "sha256")
    if start is not None:
        lines[start:end] = []
    start, end = _table(lines, name)
    if start is None:
        return "\n".join([*lines, *([""] if lines and lines[-1].strip() else []), *entry, "", *digests, ""])
    replaced = "|".join({*_REWRITTEN, *keys, "sha256"})
    kept = [line for line in lines[start + 1 : end] if not re.match(rf"\s*({replaced})\s*=", line)]
    while kept and not kept[-1].strip():
        kept.pop()
    rest = lines[end:]
    lines[start:] = [lines[start], *entry[1:], *kept, "", *digests, *([""] if rest else []), *rest]
    return "\n".join([*lines, ""])


def _table(lines: list[str], *keys: str) -> tuple[int | None, int]:
    """Where a table begins and ends; what stands above the next header without a gap belongs to that one."""
    spelled = r"\s*\.\s*".join(rf"(?:{re.escape(key)}|\"{re.escape(key)}\"|'{re.escape(key)}')" for key in keys)
    headers = [index for index, line in enumerate(lines) if re.match(r"\s*\[", line)]
    start = next((i for i in headers if re.match(rf"\s*\[\s*{spelled}\s*\]\s*(#.*)?$", lines[i])), None)
    if start is None:
        return None, 0
    end = next((index for index in headers if index > start), len(lines))
    if end < len(lines):
        while end > start + 1 and lines[end - 1].lstrip().startswith("#"):
            end -= 1
    return start, end
