"""The base catalogue: ada, babbage, curie, davinci -> a checkpoint folder. Knows names and folders, loads no weights.

Four names come with the package. `<home>/bases.toml` adds bases or puts others in their place:

    [curie]
    folder = "/models/qwen3-1.7b"   # an ordinary checkpoint folder: config.json, tokenizer.json, *.safetensors
    learning_rate = 0.002           # optional; a job's peak rate is this times its learning_rate_multiplier
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core import box

LONGEST_EXAMPLE_TOKENS = 2_048
"""The most a training example may hold, whatever the base could read. Source: the fine-tuning guide (2023)."""
DEFAULT_LEARNING_RATE = 0.005
"""Times the usual multiplier of 0.1 this is 5e-4, which serves the box best: docs/design/decisions/defaults.md."""
BOX_CREATED_UNIX = 1_795_305_600
BOX_NAMES = {"ada": "ada", "babbage": "ada", "curie": "ada", "davinci": "ada"}
"""Name -> packed checkpoint."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_KEYS = {"folder", "learning_rate"}


@dataclass(frozen=True, slots=True)
class Base:
    """A model that can be called and tuned as it is."""

    name: str
    context_tokens: int
    learning_rate: float
    """A job's peak learning rate is this times its `learning_rate_multiplier`."""
    created_unix: int
    note: str
    """One line for people: what stands behind the name."""


@dataclass(frozen=True, slots=True)
class _Entry:
    base: Base
    folder: Path | None
    """None: in the box."""


class Bases:
    """All bases of one home folder. The catalogue file is read once, when this is made."""

    def __init__(self, home: Path) -> None:
        """Raises ValueError naming entry and rule if `<home>/bases.toml` is wrong."""
        self._home = home
        self._entries = {name: _box_entry(name) for name in BOX_NAMES}
        catalogue = home / "bases.toml"
        if catalogue.exists():
            try:
                entries = tomllib.loads(catalogue.read_text())
            except tomllib.TOMLDecodeError as error:
                raise ValueError(f"{catalogue} is not TOML: {error}") from error
            for name, fields in entries.items():
                self._entries[name] = _folder_entry(catalogue, name, fields)

    def list(self) -> list[Base]:
        """Every base, the box first, then the catalogue's in its order."""
        return [entry.base for entry in self._entries.values()]

    def get(self, name: str) -> Base:
        """Raises KeyError for a name that is not in the catalogue."""
        return self._entries[name].base

    def folder(self, name: str) -> Path:
        """The checkpoint folder of a base. Raises KeyError; a box model is unpacked on first use (under a second)."""
        folder = self._entries[name].folder
        return box.unpack(box.BOX / BOX_NAMES[name], self._home) if folder is None else folder


def _box_entry(name: str) -> _Entry:
    packed = BOX_NAMES[name]
    sharing = [other for other, target in BOX_NAMES.items() if target == packed and other != name]
    shared = f"; {', '.join(sharing)} name the same weights" if sharing else ""
    return _Entry(
        base=Base(
            name=name,
            context_tokens=LONGEST_EXAMPLE_TOKENS,
            learning_rate=DEFAULT_LEARNING_RATE,
            created_unix=BOX_CREATED_UNIX,
            note=f"in the box: the {packed} checkpoint{shared}",
        ),
        folder=None,
    )


def _folder_entry(catalogue: Path, name: str, fields: object) -> _Entry:
    where = f"{catalogue}: [{name}]"
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: a name has lower-case letters, digits, '.', '_' and '-' only, at most 64.")
    if not isinstance(fields, dict) or "folder" not in fields or not fields.keys() <= _KEYS:
        raise ValueError(f'{where}: give folder = "..." and at most {", ".join(sorted(_KEYS - {"folder"}))} besides.')
    if not isinstance(fields["folder"], str):
        raise ValueError(f"{where}: folder is a path in quotes, not {fields['folder']!r}.")
    folder = Path(fields["folder"]).expanduser()
    for needed in ("config.json", "tokenizer.json"):
        if not (folder / needed).is_file():
            raise ValueError(f"{where}: folder {folder} has no {needed}; a base is an ordinary checkpoint folder.")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{where}: folder {folder} has no *.safetensors; pickled weights are never read.")
    rate = fields.get("learning_rate", DEFAULT_LEARNING_RATE)
    if not isinstance(rate, (int, float)) or not 0 < rate < 1:
        raise ValueError(f"{where}: learning_rate is a number between 0 and 1, not {rate!r}.")
    context = json.loads((folder / "config.json").read_text()).get("max_position_embeddings", LONGEST_EXAMPLE_TOKENS)
    return _Entry(
        base=Base(
            name=name,
            context_tokens=min(context, LONGEST_EXAMPLE_TOKENS),
            learning_rate=float(rate),
            created_unix=int((folder / "config.json").stat().st_mtime),
            note=f"checkpoint {folder.name}",  # where it lies is not for every member to know
        ),
        folder=folder,
    )
