"""Models as zip files, on their way out and in. Knows names and sizes of files; what is in them, engines judge.

Nothing that could run code is taken: only safetensors, JSON and tokenizer files, by their names.
"""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath
from typing import IO

from tunesmith.core.blobs import READ_CHUNK_BYTES, full_disk_is_storage_full
from tunesmith.errors import InvalidRequest

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CHECKPOINT_FILES = ("config.json", "model.safetensors")
ALLOWED = frozenset(
    {
        *ADAPTER_FILES,
        *CHECKPOINT_FILES,
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
)
"""What an imported model keeps; other files in its package are passed over."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MAX_ENTRIES = 10_000


def pack(folder: Path, out: IO[bytes]) -> None:
    """Writes the files of `folder` as a zip, stored as they are: equal files give equal bytes."""
    with full_disk_is_storage_full(), zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as package:
        for path in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo(path.name)  # dated 1980: when it was written says nothing about a model
            entry.external_attr = 0o644 << 16
            entry.file_size = path.stat().st_size
            with path.open("rb") as source, package.open(entry, "w") as target:
                while chunk := source.read(READ_CHUNK_BYTES):
                    target.write(chunk)


def unpack(package: IO[bytes], folder: Path, *, limit_bytes: int) -> None:
    """Takes a model out of a zip: its known files, from the top or from the one folder that it has.

    Raises InvalidRequest for what is no zip, for one without a whole model, for pickled weights, and for files of more
    than `limit_bytes` together, however small they were packed; StorageFull.
    """
    try:
        with zipfile.ZipFile(package) as opened:
            chosen = _choose(opened)
            folder.mkdir(parents=True)
            room = limit_bytes
            for name, entry in chosen.items():
                with full_disk_is_storage_full():
                    room = _extract(opened, entry, folder / name, room, limit_bytes)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        # zipfile's RuntimeError is for a password, its NotImplementedError for a method that it does not know.
        raise InvalidRequest(f"The file is not a zip that can be read here: {error}.", param="file") from error


def _choose(package: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    entries = [entry for entry in package.infolist() if not entry.is_dir()]
    if len(entries) > MAX_ENTRIES:
        raise InvalidRequest(f"The zip has {len(entries)} files; a model has a few.", param="file")
    folders = {PurePosixPath(entry.filename).parent for entry in entries}
    top = min(folders, key=lambda path: len(path.parts), default=PurePosixPath())
    named = {PurePosixPath(e.filename).name: e for e in entries if PurePosixPath(e.filename).parent == top}
    for needed in (ADAPTER_FILES, CHECKPOINT_FILES):
        if all(name in named for name in needed):
            others = {*ADAPTER_FILES, *CHECKPOINT_FILES} - set(needed)
            return {name: entry for name, entry in named.items() if name in ALLOWED - others}
    pickled = next((name for name in named if name.endswith(PICKLES)), None)
    if pickled is not None:
        raise InvalidRequest(
            f"The zip holds {pickled}; pickled weights are never read. Save the model as safetensors.", param="file"
        )
    raise InvalidRequest(
        f"The zip holds no model: an adapter is {' and '.join(ADAPTER_FILES)} (PEFT's format), all weights are "
        f"{' and '.join(CHECKPOINT_FILES)}. It has: {', '.join(sorted(named)[:10]) or 'nothing'}.",
        param="file",
    )


def _extract(package: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, room: int, limit_bytes: int) -> int:
    with package.open(entry) as source, path.open("wb") as target:
        while chunk := source.read(READ_CHUNK_BYTES):
            room -= len(chunk)
            if room < 0:
                raise InvalidRequest(
                    f"The model in the zip is larger than the {limit_bytes} bytes this server takes. Ask the server's "
                    "owner to raise TUNESMITH_MAX_UPLOAD_BYTES.",
                    param="file",
                )
            target.write(chunk)
    return room
