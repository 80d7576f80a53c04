"""The reference pages say what the code does."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

import tunesmith
from tunesmith.settings import PREFIX, Settings

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)
def test_every_setting_is_documented_with_its_default(field: dataclasses.Field[object]) -> None:
    start = f"| `{PREFIX}{field.name.upper()}` |"
    rows = [row for row in (DOCS / "settings.md").read_text().splitlines() if row.startswith(start)]
    assert len(rows) == 1, f"docs/settings.md has no row for {field.name}"
    if field.default not in (dataclasses.MISSING, None):
        assert rows[0].startswith(f"{start} `{field.default}` |")
    assert rows[0].endswith(f"| {_docstring(field.name)} |")


def _docstring(field: str) -> str:
    """The line that stands under a field of Settings in its source."""
    lines = inspect.getsource(Settings).splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith(f"    {field}: "))
    return lines[place + 1].strip().strip('"')


def test_the_map_names_every_module_with_what_it_knows() -> None:
    source = Path(tunesmith.__file__).parent
    modules = [path for path in source.rglob("*.py") if path.name != "__init__.py" and path.parent.name != "versions"]
    rows = (DOCS / "design" / "modules.md").read_text().splitlines()
    missing = [
        row
        for path in modules
        if (row := f"| `{path.relative_to(source).as_posix()}` | {_first_paragraph(path)} |") not in rows
    ]
    assert missing == []
    assert len(modules) == sum(row.startswith("| `") for row in rows), "the map names a module that is gone"


def _first_paragraph(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def test_every_link_between_pages_leads_somewhere() -> None:
    pages = [*DOCS.rglob("*.md"), *(DOCS.parent / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in _links(page.read_text())
        if "://" not in target and not (page.parent / target.partition("#")[0]).exists()
    ]
    assert broken == []


def _links(text: str) -> list[str]:
    return [piece.partition(")")[0] for piece in text.split("](")[1:]]
