"""What a loaded model is called between engine and callers: its folders and the identity of the files in them.

A model that is deleted and made again at the same path gets another handle, so that stale weights are never served.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.rundir import holds_all_weights

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def handle_of(base_dir: Path, adapter_dir: Path | None) -> str:
    """The handle of a base, or of what was tuned from it. Cheap: looks at file tables, not at contents.

    Raises ValueError if there is no `config.json` in `base_dir`, or neither that nor adapter weights in `adapter_dir`.
    """
    parts = _checkpoint(base_dir)
    if adapter_dir is not None and holds_all_weights(adapter_dir):
        parts += _checkpoint(adapter_dir)
    elif adapter_dir is not None:
        parts += [str(adapter_dir), _identity(adapter_dir / ADAPTER_WEIGHTS, adapter_dir)]
    return "|".join(parts)


def _checkpoint(folder: Path) -> list[str]:
    weights = sorted(folder.glob("*.safetensors"))
    return [str(folder), *(_identity(path, folder) for path in [folder / "config.json", *weights])]


def _identity(path: Path, folder: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"{folder} is not a model: {path.name} cannot be read ({error.strerror})") from error
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"
