"""The base catalogue: ada, babbage, curie, davinci -> a checkpoint folder. Knows names and folders, loads no weights.

Four names come with the package. `<home>/bases.toml` adds bases or puts others in their place: see `core/catalogue.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core import box
from tunesmith.core.architectures import architecture_of
from tunesmith.core.catalogue import FILE, Entry, read_catalogue
from tunesmith.core.checkpoint_folder import CONFIG, TOKENIZER, context_tokens_of, read_config
from tunesmith.errors import InvalidRequest, NotFound

logger = logging.getLogger(__name__)

LONGEST_EXAMPLE_TOKENS = 2_048
"""The most a training example may hold unless `context_tokens` allows more. Source: the fine-tuning guide (2023)."""
DEFAULT_LEARNING_RATE = 0.0003
"""Of a base from outside. Times the usual multiplier of 0.1 and at our scale of adapters this is what 5e-4 is at the
customary one: docs/design/decisions/defaults.md."""
BOX_LEARNING_RATES = {"ada": 0.0025, "babbage": 0.0019, "curie": 0.00125, "davinci": 0.0009}
"""By packed checkpoint: measured for ada, and for the others in proportion to one over the width."""
BOX_CREATED_UNIX = 1_795_305_600
BOX_NAMES = {
    name: (packed, BOX_LEARNING_RATES[packed])
    for name, packed in {"ada": "ada", "babbage": "babbage", "curie": "curie", "davinci": "curie"}.items()
}
"""Name -> (packed checkpoint under `weights/`, learning rate)."""


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
    price_per_1k_training_tokens: float = 0.0
    """US dollars; what a job says it costs."""
    refusal: str | None = None
    """Why it can be neither tuned nor served, as far as its config tells; None where nothing speaks against it."""


class Bases:
    """All bases of one home folder. The catalogue file is read once, when this is made.

    A hub model that has not been pulled is there under its name alone: it is not listed, and asking for it says how to
    get it. Once it is pulled it can be used at once.
    """

    def __init__(self, home: Path) -> None:
        """Raises ValueError naming entry and rule if `<home>/bases.toml` or a folder that it names is wrong."""
        self._home = home
        self._entries = read_catalogue(home)
        in_the_box = [name for name in BOX_NAMES if name not in self._entries]
        self._bases = {name: _box_base(name, [other for other in in_the_box if other != name]) for name in in_the_box}
        self._waiting: set[str] = set()
        for name, entry in self._entries.items():
            if entry.hub is None:
                self._bases[name] = self._read(entry)
                continue
            self._waiting.add(name)
            try:
                self._arrive(name)
            except NotFound as error:
                logger.warning("base cannot be used base=%s reason=%s", name, error.message)

    def list(self) -> list[Base]:
        """Every base that can be used, the box first, then the catalogue's in its order."""
        for name in sorted(self._waiting):
            with suppress(NotFound):
                self._arrive(name)
        order = [*BOX_NAMES, *(name for name in self._entries if name not in BOX_NAMES)]
        return [self._bases[name] for name in order if name in self._bases]

    def get(self, name: str) -> Base:
        """Raises KeyError for a name that is not in the catalogue, NotFound for a hub model that is not here."""
        if name in self._waiting:
            self._arrive(name)
        return self._bases[name]

    def folder(self, name: str) -> Path:
        """The checkpoint folder of a base; a box model is unpacked on first use (under a second).

        Raises NotFound for a hub model that is not here, and for a name that is not, or no longer, in the catalogue;
        InvalidRequest for a model that cannot be run here.
        """
        try:
            refusal = self.get(name).refusal
        except KeyError as error:
            raise NotFound(
                f"The base `{name}` is not among those of this server. Whoever runs it adds it to {FILE} again.",
                param="model",
                code="model_not_found",
            ) from error
        if refusal is not None:
            raise InvalidRequest(f"The base `{name}` cannot be used on this server: {refusal}.", param="model")
        entry = self._entries.get(name)
        return box.unpack(box.BOX / BOX_NAMES[name][0], self._home) if entry is None else entry.folder

    def _arrive(self, name: str) -> None:
        """Take up a hub model that has been pulled since. Raises NotFound if it has not, or is no checkpoint."""
        entry = self._entries[name]
        if not entry.folder.is_dir():
            raise NotFound(
                f"The base `{name}` is {entry.hub} of the model hub and has not been pulled to this server. Whoever "
                f"runs the server gets it with: {entry.pull_command}",
                param="model",
                code="model_not_found",
            )
        try:
            self._bases[name] = self._read(entry)
        except ValueError as error:
            raise NotFound(str(error), param="model", code="model_not_found") from error
        self._waiting.discard(name)

    def _read(self, entry: Entry) -> Base:
        where = f"{self._home / FILE}: [{entry.name}]"
        if not entry.folder.is_dir():
            raise ValueError(f"{where}: folder {entry.folder} is not there. Correct it, or take the entry out.")
        for needed in (CONFIG, TOKENIZER):
            if not (entry.folder / needed).is_file():
                raise ValueError(f"{where}: folder {entry.folder} has no {needed}; a base is an ordinary checkpoint.")
        if not any(entry.folder.glob("*.safetensors")):
            raise ValueError(f"{where}: folder {entry.folder} has no *.safetensors; pickled weights are never read.")
        try:
            config = read_config(entry.folder)
        except ValueError as error:
            raise ValueError(f"{where}: folder {entry.folder}: {error}.") from error
        reads_tokens = context_tokens_of(config)
        if entry.context_tokens is not None and reads_tokens is not None and entry.context_tokens > reads_tokens:
            raise ValueError(
                f"{where}: context_tokens is {entry.context_tokens}, and the model reads {reads_tokens}. Lower it."
            )
        refusal = architecture_of(config).reason
        if refusal is not None:
            logger.warning("base cannot be used base=%s reason=%s", entry.name, refusal)
        # What stands behind a base is for its users; where it lies is not for every member to know.
        source = (
            f"checkpoint {entry.folder.name}" if entry.hub is None else f"{entry.hub} at {str(entry.revision)[:12]}"
        )
        return Base(
            name=entry.name,
            context_tokens=entry.context_tokens or min(reads_tokens or LONGEST_EXAMPLE_TOKENS, LONGEST_EXAMPLE_TOKENS),
            learning_rate=DEFAULT_LEARNING_RATE if entry.learning_rate is None else entry.learning_rate,
            created_unix=int((entry.folder / CONFIG).stat().st_mtime),
            note=source,
            price_per_1k_training_tokens=entry.price_per_1k_training_tokens,
            refusal=refusal,
        )


def _box_base(name: str, others: Sequence[str]) -> Base:
    packed, learning_rate = BOX_NAMES[name]
    sharing = [other for other in others if BOX_NAMES[other][0] == packed]
    shared = f"; the same weights as {', '.join(sharing)}" if sharing else ""
    return Base(
        name=name,
        context_tokens=LONGEST_EXAMPLE_TOKENS,
        learning_rate=learning_rate,
        created_unix=BOX_CREATED_UNIX,
        note=f"in the box: the {packed} checkpoint{shared}",
    )
