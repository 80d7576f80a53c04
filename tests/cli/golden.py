"""What `openai tools fine_tunes.prepare_data -q` 0.28.1 made of some 110 small files, recorded; and how to record it.

    python -m tests.cli.golden PYTHON

runs the original again with the interpreter of an environment that has openai==0.28.1, pandas and openpyxl, over the
inputs in `prepare_golden.json`, and writes its answers there.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

FILE = Path(__file__).parent / "prepare_golden.json"
THERE_ALREADY = "there already\n"
SCRIPT = "import sys; from openai._openai_scripts import main; sys.exit(main())"


@dataclass(frozen=True, slots=True)
class Case:
    """One input, and what the original made of it."""

    name: str
    file: str
    about: str
    content: str = ""
    base64: str = ""
    """The content, where it is no text."""
    beside: tuple[str, ...] = ()
    """Files that are there already."""
    exit: int = 0
    stdout: str = ""
    stderr: str = ""
    written: dict[str, str] = field(default_factory=dict)

    def lay_out(self, folder: Path) -> None:
        """Writes the input and what is beside it."""
        raw = base64.b64decode(self.base64) if self.base64 else self.content.encode()
        (folder / self.file).write_bytes(raw)
        for name in self.beside:
            (folder / name).write_text(THERE_ALREADY)

    def found(self, folder: Path) -> dict[str, str]:
        """The files that were written; fails if one that was there has changed."""
        assert all((folder / name).read_text() == THERE_ALREADY for name in self.beside)
        new = [path for path in sorted(folder.iterdir()) if path.name not in (self.file, *self.beside)]
        return {path.name: path.read_text() for path in new}


def cases() -> list[Case]:
    """All of them."""
    return [Case(**entry | {"beside": tuple(entry.get("beside", ()))}) for entry in json.loads(FILE.read_text())]


def original(case: Case, python: Path) -> Case:
    """The case as the original answers it now."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case.lay_out(folder)
        command = [str(python), "-c", SCRIPT, "tools", "fine_tunes.prepare_data", "-f", case.file, "-q"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        crashed = "Traceback" in done.stderr
        said = f"Traceback: {done.stderr.strip().splitlines()[-1]}" if crashed else done.stderr
        return replace(case, exit=done.returncode, stdout=done.stdout, stderr=said, written=case.found(folder))


if __name__ == "__main__":
    recorded = [asdict(original(case, Path(sys.argv[1]))) for case in cases()]
    plain = [{name: value for name, value in entry.items() if value not in ("", (), {})} for entry in recorded]
    FILE.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
