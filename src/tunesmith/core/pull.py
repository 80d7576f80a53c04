"""Bringing a model from the hub: which files, whether they fit, whole and verified, and its entry in `bases.toml`.

A model is gathered in `<home>/bases/ORG--NAME-COMMIT.part/` and that folder renamed once all of it is there, so that a
base is never half a model. What an interrupted pull has gathered, the next one keeps.
"""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.architectures import ForwardPass, architecture_of
from tunesmith.core.catalogue import COMMIT, FILE_NAME, NAME, REPOSITORY, hub_folder, put, read_catalogue
from tunesmith.core.checkpoint_folder import (
    CONFIG,
    INDEX,
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    PICKLES,
    TOKENIZER,
    WEIGHTS,
    indexed_files,
    read_config,
    read_object,
)
from tunesmith.core.hub import Hub, Progress, PullFailed, RemoteFile, Repository
from tunesmith.rundir import sync_folder

DESCRIPTIONS = {
    CONFIG: MAX_CONFIG_BYTES,
    "generation_config.json": MAX_CONFIG_BYTES,
    TOKENIZER: 256 << 20,
    "tokenizer_config.json": 16 << 20,
    "chat_template.jinja": MAX_CONFIG_BYTES,
    "special_tokens_map.json": MAX_CONFIG_BYTES,
    INDEX: MAX_INDEX_BYTES,
}
"""What is fetched besides weights, and how many bytes it may have. Nothing else ever is, code least of all."""
SPARE_BYTES = 256 << 20
"""Left free on the disk: the database and the runs need room too."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model that is here."""

    name: str
    """The base it is now."""
    repository: Repository
    folder: Path
    sha256: dict[str, str]
    """File name -> digest, of all its files."""
    fetched_bytes: int
    """How much had to come; 0 where everything was here."""
    was: str | None
    """What stood behind the name before, where that was something else."""


@contextmanager
def pulling(home: Path) -> Iterator[None]:
    """Holds the home for one pull, or for another that adds a base: two would write the same files.

    Raises PullFailed where one is under way, and for what the disk refuses meanwhile.
    """
    try:
        (home / "bases").mkdir(parents=True, exist_ok=True)
        with (home / "bases" / ".pull.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PullFailed(f"Another base is being added in {home}. Wait until that has ended.") from None
            yield
    except OSError as error:
        raise PullFailed(
            f"{error.filename or home} cannot be written: {error.strerror}. What came until then is kept: the same "
            "command goes on from there."
        ) from error


def pull(home: Path, hub: Hub, name: str, revision: str | None, alias: str | None, progress: Progress) -> Pulled:
    """Brings the repository `name` here, at `revision` or the head of its main branch, and makes it the base `alias`.

    Without `alias` the base is called after the repository. To be called within `pulling`. Raises PullFailed; what has
    come by then is kept for the next attempt, and the catalogue is as it was.
    """
    base = _base_name(home, name, alias)
    repository = hub.repository(name, revision or "main")
    if revision is not None and COMMIT.fullmatch(revision) and repository.commit != revision:
        raise PullFailed(f"Asked for commit {revision} of {name}, the hub answers with {repository.commit}.")
    folder = hub_folder(home, repository.name, repository.commit)
    whole = folder.is_dir()
    gathering = folder if whole else folder.with_name(folder.name + ".part")
    gathering.mkdir(parents=True, exist_ok=True)

    fetched = _Fetch(hub, repository, gathering, progress)
    descriptions = _descriptions(repository)
    for file in descriptions:
        fetched.get(file)
    weights = _weights(repository, gathering)
    _refuse_own_code(repository, gathering)
    _check_room(gathering, weights)
    for file in weights:
        fetched.get(file)

    _hold_against_catalogue(home, base, repository, fetched.sha256)
    if not whole:
        sync_folder(gathering)
        gathering.rename(folder)
        sync_folder(folder.parent)
    was = _entry_source(home, base)
    try:
        put(home, base, {"hub": repository.name, "revision": repository.commit}, fetched.sha256)
    except ValueError as error:
        raise PullFailed(f"{repository.name} is in {folder}. {error}") from error
    return Pulled(
        name=base,
        repository=repository,
        folder=folder,
        sha256=fetched.sha256,
        fetched_bytes=fetched.bytes,
        was=None if was in (None, repository.name) else was,
    )


class _Fetch:
    """Gets files into one folder, each under its name only once it is whole and verified."""

    def __init__(self, hub: Hub, repository: Repository, folder: Path, progress: Progress) -> None:
        self._hub, self._repository, self._folder, self._progress = hub, repository, folder, progress
        self.sha256: dict[str, str] = {}
        self.bytes = 0

    def get(self, file: RemoteFile) -> None:
        """Nothing is fetched where the right content is there already."""
        path = self._folder / file.name
        part = path.with_name(path.name + ".part")
        if path.is_symlink():
            path.unlink()  # a download has none: somebody put it there
        digest = file.matches(path) if path.is_file() else None
        if digest is None:
            had = part.stat().st_size if part.exists() else 0
            if had > file.size_bytes:
                part.unlink()
                had = 0
            self._hub.fetch(self._repository, file, part, self._progress)
            digest = file.matches(part)
            if digest is None:
                part.unlink()
                raise PullFailed(
                    f"{file.name} came with another digest than {self._repository.name} lists "
                    f"({file.sha256 or file.git_sha1}); it was thrown away. Try again; if it stays so, do not trust "
                    "the connection or the mirror."
                )
            part.replace(path)
            self.bytes += file.size_bytes - had
            self._progress.ended(file, digest)
        self.sha256[file.name] = digest


def _base_name(home: Path, repository: str, alias: str | None) -> str:
    """What the base will be called. Raises PullFailed where that is no name, or is another model's already."""
    if not REPOSITORY.fullmatch(repository):
        raise PullFailed(f"{repository!r} is no repository of the hub: those are ORG/NAME, openai-community/gpt2 say.")
    name = alias if alias is not None else re.sub(r"[^a-z0-9._-]", "-", repository.partition("/")[2].lower())[:64]
    if not NAME.fullmatch(name):
        raise PullFailed(
            f"{name!r} cannot name a base: lower-case letters, digits, '.', '_' and '-' only, at most 64. Give --as."
        )
    known = _entry_source(home, name)
    if alias is None and known is not None and known != repository:
        raise PullFailed(f"{name} is {known} in this home. To put {repository} in its place, give --as {name}.")
    return name


def _entry_source(home: Path, name: str) -> str | None:
    try:
        entry = read_catalogue(home).get(name)
    except ValueError as error:
        raise PullFailed(str(error)) from error
    return None if entry is None else entry.hub or str(entry.folder)


def _descriptions(repository: Repository) -> list[RemoteFile]:
    """The JSON files to fetch, the config first. Raises PullFailed where the model could not be used."""
    files = {file.name: file for file in repository.files}
    if CONFIG not in files:
        raise PullFailed(f"{repository.name} has no {CONFIG}: it is no model for transformers, and none for us.")
    if not any(name.endswith(".safetensors") and "/" not in name for name in files):
        raise PullFailed(_no_safetensors(repository.name, sorted(files)))
    if TOKENIZER not in files:
        raise PullFailed(
            f"{repository.name} has no {TOKENIZER}, the one form of tokenizer that is read here. transformers can make "
            f"it of most others: AutoTokenizer.from_pretrained(...).save_pretrained(folder); put the safetensors and "
            f"{CONFIG} beside it and give the folder in bases.toml."
        )
    found = [files[name] for name in DESCRIPTIONS if name in files]
    for file in found:
        if file.size_bytes > DESCRIPTIONS[file.name]:
            raise PullFailed(f"{file.name} of {repository.name} has {file.size_bytes:,} bytes; that is no honest one.")
    return found


def _no_safetensors(repository: str, names: Sequence[str]) -> str:
    pickles = [name for name in names if name.endswith(PICKLES)]
    if not pickles:
        return f"{repository} has no *.safetensors, the one form of weights that is read here."
    return (
        f"{repository} has its weights only as {', '.join(pickles[:3])}. Such files can run code on whoever opens them "
        f"and are never read here. Often https://huggingface.co/{repository}/discussions has a conversion to "
        "safetensors: give its commit with --revision. Else convert the model where it can do no harm "
        "(save_pretrained of transformers) and give the folder in bases.toml."
    )


def _weights(repository: Repository, folder: Path) -> list[RemoteFile]:
    """The weight files of the model: what its index names, or its one file. Raises PullFailed."""
    files = {file.name: file for file in repository.files}
    if INDEX in files:
        try:
            names = indexed_files(read_object(folder / INDEX, MAX_INDEX_BYTES))
        except ValueError as error:
            raise PullFailed(f"{repository.name}: {error}.") from error
        missing = [name for name in names if name not in files]
        if missing:
            raise PullFailed(
                f"{repository.name} lacks {', '.join(missing[:5])}, of {len(names)} shards that its index names."
            )
    elif WEIGHTS in files:
        names = [WEIGHTS]
    else:
        names = sorted(name for name in files if name.endswith(".safetensors") and "/" not in name)
        if len(names) > 1:
            raise PullFailed(
                f"{repository.name} has {', '.join(names[:5])} and neither {WEIGHTS} nor {INDEX} that says which count."
            )
    odd = [name for name in names if not FILE_NAME.fullmatch(name)]
    if odd:
        raise PullFailed(f"{repository.name} calls a weight file {odd[0]!r}; that is no name for a file.")
    return [files[name] for name in names]


def _refuse_own_code(repository: Repository, folder: Path) -> None:
    """Before gigabytes are fetched that nothing here can compute."""
    try:
        architecture = architecture_of(read_config(folder))
    except ValueError as error:
        raise PullFailed(f"{repository.name}: {error}.") from error
    if architecture.forward_pass is ForwardPass.NONE and architecture.own_code:
        raise PullFailed(f"{repository.name} is refused: {architecture.reason}.")


def _check_room(folder: Path, weights: Sequence[RemoteFile]) -> None:
    have = sum(
        path.stat().st_size
        for file in weights
        for path in (folder / file.name, folder / f"{file.name}.part")
        if path.is_file()
    )
    missing = sum(file.size_bytes for file in weights) - have
    needed, free = missing + SPARE_BYTES, shutil.disk_usage(folder).free
    if missing and needed > free:
        raise PullFailed(
            f"The weights need {needed / 1e9:.1f} GB of disk in {folder.parent}, {SPARE_BYTES / 1e9:.1f} GB of "
            f"it as a reserve, and {free / 1e9:.1f} GB are free. Make room, or use another home."
        )


def _hold_against_catalogue(home: Path, name: str, repository: Repository, sha256: dict[str, str]) -> None:
    """Digests that the user's entry gives for this very commit count for more than what the hub says today."""
    entry = read_catalogue(home).get(name)
    if entry is None or entry.revision != repository.commit:
        return
    for file, digest in entry.sha256.items():
        if sha256.get(file, digest) != digest:
            raise PullFailed(
                f"{file} has the sha256 {sha256[file]}, and bases.toml pins {digest} for [{name}]. The hub now gives "
                "other content for the same commit: do not use it, unless the digest in bases.toml was wrong."
            )
