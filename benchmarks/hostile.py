"""Claim: files made to do harm get a clear error, or are read; memory stays flat, and nothing is written half.

    python -m benchmarks.hostile [--scale 1.0] [--folder DIR]

Each file is given to `prepare -q` and to `doctor --fix --yes`, each in a process of its own. Its peak of memory is that
of the process or of the child that opens workbooks, whichever is larger. With --scale 0.01 the large ones are small.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import conclude, parser, table

MOST_RSS_BYTES = 500_000_000
CHUNK_BYTES = 1 << 20
GIB = 1 << 30
ENDS = ("\r\n", "\n", "\r", "\n\n")


@dataclass(frozen=True, slots=True)
class Harm:
    """A file, and what has to be said of it."""

    name: str
    file: str
    make: Callable[[Path, float], None]
    said: tuple[str, ...]
    """One of them; none if the file is to be read."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a command made of a file."""

    code: int
    said: str
    rss_bytes: int
    took_s: float
    new: tuple[str, ...]
    """Files that are there now and were not before, hidden ones too."""

    def faults(self, harm: Harm) -> Iterator[str]:
        """What is wrong with it, in words."""
        if self.rss_bytes > MOST_RSS_BYTES:
            yield f"{self.rss_bytes / 1e6:.0f} MB of memory"
        if "Traceback" in self.said:
            yield "a traceback"
        if any(letter < " " and letter not in "\n\t" for letter in self.said):
            yield "control characters on the terminal"
        if not harm.said:
            if not self.new:
                yield f"not read: {self.said[-200:]}"
        elif self.code == 0 or not any(part in self.said for part in harm.said):
            yield f"code {self.code}, said {self.said[-300:]!r}"
        if harm.said and self.new:
            yield f"left behind: {self.new}"


def main() -> int:
    """Exit code 0 if the claim holds."""
    options = parser(__doc__)
    options.add_argument("--scale", type=float, default=1.0, help="size of the large files, as a share")
    options.add_argument("--folder", type=Path, help="where there is room for a gigabyte")
    args = options.parse_args()
    lines, faults = [], []
    with tempfile.TemporaryDirectory(prefix="tunesmith-hostile-", dir=args.folder) as name:
        for harm in HARMS:
            for command in (["prepare", "-q"], ["doctor", "--fix", "--yes"]):
                result = try_out(harm, command, Path(name), args.scale)
                faults += [f"{harm.name}, {command[0]}: {fault}" for fault in result.faults(harm)]
                outcome = "read" if result.code == 0 or not harm.said else "refused"
                lines.append((harm.name, command[0], outcome, result.took_s, result.rss_bytes / 1e6))
    print(table(("file", "command", "outcome", "s", "peak RSS MB"), lines))
    for fault in faults:
        print(f"FAULT {fault}")
    return conclude("hostile", not faults, {"cases": len(lines), "faults": len(faults), "scale": args.scale})


def try_out(harm: Harm, command: list[str], folder: Path, scale: float) -> Result:
    """Makes the file, runs the command on it, removes what there is."""
    work = folder / "work"
    work.mkdir()
    harm.make(work / harm.file, scale)
    before = set(work.iterdir())
    words = [sys.executable, "-m", "tunesmith", command[0], harm.file, *command[1:], "--home", str(folder / "home")]
    with (folder / "said").open("w+b") as said:
        began_s = time.perf_counter()
        process = subprocess.Popen(words, cwd=work, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        took_s = time.perf_counter() - began_s
        process.returncode = os.waitstatus_to_exitcode(status)
    text = (folder / "said").read_text(errors="replace")
    new = tuple(sorted(path.name for path in set(work.iterdir()) - before))
    for path in work.iterdir():
        path.unlink()
    work.rmdir()
    return Result(process.returncode, text, usage.ru_maxrss * 1024, took_s, new)


def repeated(path: Path, piece: bytes, size_bytes: float, *, begin: bytes = b"", end: bytes = b"") -> None:
    """Writes `begin`, many times `piece`, and `end`."""
    block = piece * max(1, CHUNK_BYTES // len(piece))
    with path.open("wb") as file:
        file.write(begin)
        for _ in range(max(2, int(size_bytes / len(block)))):
            file.write(block)
        file.write(end)


def single_line(path: Path, scale: float) -> None:
    """One JSON object of a gigabyte."""
    repeated(path, b"x", GIB * scale, begin=b'{"prompt": "', end=b'", "completion": "y"}\n')


def single_cell(path: Path, scale: float) -> None:
    """A quote that never closes."""
    repeated(path, b"x,y\n", GIB * scale, begin=b'prompt,completion\n"')


def nul_bytes(path: Path, scale: float) -> None:
    """Rows with NUL bytes, late in the file."""
    repeated(path, b"text,label\n", 64 * CHUNK_BYTES * scale, begin=b"prompt,completion\n", end=b"te\0xt,label\n")


def zeros(path: Path, scale: float) -> None:
    """A gigabyte of nothing, sparse."""
    with path.open("wb") as file:
        file.truncate(int(GIB * scale))


def utf_16(path: Path, _scale: float) -> None:
    """Line ends of all kinds in UTF-16."""
    rows = "".join(f"Grüße {n} →,{('ja', 'nein')[n % 2]}{ENDS[n % 3]}" for n in range(5_000))
    path.write_bytes(("prompt,completion\r\n" + rows).encode("utf-16"))


def half_utf_16(path: Path, scale: float) -> None:
    """UTF-16 that ends within a character."""
    utf_16(path, scale)
    path.write_bytes(path.read_bytes() + b"\x00\xd8\x00")


def mixed_ends(path: Path, _scale: float) -> None:
    """Line ends of all kinds, and blank lines."""
    rows = "".join(
        json.dumps({"prompt": f"text {n} ->", "completion": f" {n % 3}"}) + ENDS[n % 4] for n in range(5_000)
    )
    path.write_bytes(rows.encode())


def million_columns(path: Path, scale: float) -> None:
    """A heading that never ends."""
    with path.open("wb") as file:
        file.write(b"prompt,completion")
        file.writelines(b",c%d" % number for number in range(max(2_000, int(1_000_000 * scale))))
        file.write(b"\na,b\n")


def million_keys(path: Path, scale: float) -> None:
    """Every row with keys of its own."""
    with path.open("w") as file:
        for number in range(max(2_000, int(1_000_000 * scale))):
            file.write(f'{{"prompt": "a{number} ->", "completion": " b", "k{number}": 1}}\n')


def deep(path: Path, scale: float) -> None:
    """Brackets within brackets."""
    path.write_bytes(b'{"prompt": ' + b"[" * int(max(100_000, 500_000 * scale)) + b"\n")


def zip_bomb(path: Path, scale: float) -> None:
    """A sheet of blanks that unpacks to gigabytes."""
    blanks = itertools.repeat(" " * CHUNK_BYTES, int(max(4, 4_096 * scale)))
    workbook(path, itertools.chain([f'<row r="1">{HEADING}</row>'], blanks))


def lying_bomb(path: Path, scale: float) -> None:
    """The same with sizes in its directory that are made up."""
    zip_bomb(path, scale / 3)
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\x01\x02")  # the last entry of the directory: the sheet
    content[place + 24 : place + 28] = (1 << 16).to_bytes(4, "little")
    path.write_bytes(bytes(content))


def last_cell(path: Path, _scale: float) -> None:
    """One cell at the far end of the sheet: a table of 17 thousand million cells."""
    workbook(path, [f'<row r="1">{HEADING}</row><row r="1048576">{cell("XFD1048576", "x")}</row>'])


def many_cells(path: Path, scale: float) -> None:
    """A hundred megabytes of cells, a hundredth of it packed."""
    rows = (
        f'<row r="{n}">{cell(f"A{n}", f"{n} " + "the same text " * 40)}{cell(f"B{n}", str(n % 3))}</row>'
        for n in range(2, max(1_000, int(180_000 * scale)))
    )
    workbook(path, itertools.chain([f'<row r="1">{HEADING}</row>'], rows))


def formulas(path: Path, _scale: float) -> None:
    """Cells that would call out if anything ran them; what they last gave is read."""
    rows = "".join(
        f'<row r="{n}"><c r="A{n}" t="str"><f>WEBSERVICE("http://127.0.0.1:9/"&amp;A1)</f><v>text {n}</v></c>'
        f'<c r="B{n}" t="str"><f>cmd|"/c calc"!A0</f><v>label {n % 3}</v></c></row>'
        for n in range(2, 200)
    )
    workbook(path, [f'<row r="1">{HEADING}</row>{rows}'])


def climbing(path: Path, _scale: float) -> None:
    """An archive whose parts want to be written elsewhere."""
    workbook(
        path,
        [
            f'<row r="1">{HEADING}</row><row r="2">{cell("A2", "a")}{cell("B2", "b")}</row>'
            + f'<row r="3">{cell("A3", "c")}{cell("B3", "d")}</row>'
        ],
    )
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../climbed.txt", "x")
        archive.writestr("/tmp/climbed.txt", "x")


def link(path: Path, _scale: float) -> None:
    """A link to what no user should read, or to nothing that ends."""
    path.symlink_to("/dev/zero")


def pipe(path: Path, _scale: float) -> None:
    """Something to read from that nobody writes to."""
    os.mkfifo(path)


def circle(path: Path, _scale: float) -> None:
    """A link to itself."""
    path.symlink_to(path.name)


def steering(path: Path, _scale: float) -> None:
    """Headings and cells that would clear a terminal, and give it a title."""
    rows = b"\x1b[2Jthe same words here a,\x1b[2Jb,c\n\x1b[2Jthe same words here d,\x1b[2Je,f\n"
    path.write_bytes(b"prompt,completion,\x1b]0;title\x07\n" + rows)


def slow_patterns(path: Path, _scale: float) -> None:
    """Texts in which a careless search for addresses, numbers and keys begins anew at each character."""
    baits = ("a@", "a.", "1-", "1 ", "sk-", "eyJ", "-----BEGIN ", "http://a:", "password=", "(")
    rows = [{"prompt": bait * (200_000 // len(bait)) + " ->", "completion": " x"} for bait in baits]
    rows += [{"prompt": "a short one ->", "completion": " y"}, {"prompt": "another ->", "completion": " z"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def long_number(path: Path, _scale: float) -> None:
    """A number of a hundred thousand digits."""
    path.write_bytes(b'{"prompt": ' + b"1" * 100_000 + b', "completion": "x"}\n{"prompt": "a", "completion": "b"}\n')


def half_character(path: Path, _scale: float) -> None:
    """Half of a surrogate pair, escaped."""
    path.write_bytes(b'{"prompt": "\\ud800", "completion": "x"}\n{"prompt": "a", "completion": "b"}\n')


def mark_inside(path: Path, _scale: float) -> None:
    """Two files put together, the second with its byte order mark."""
    row = b'{"prompt": "a", "completion": "b"}\n'
    path.write_bytes(row * 3 + b"\xef\xbb\xbf" + row * 3)


def half_utf_32(path: Path, _scale: float) -> None:
    """UTF-32 that ends within a character."""
    path.write_bytes("prompt,completion\na,b\nc,d\n".encode("utf-32")[:-3])


def only_quotes(path: Path, _scale: float) -> None:
    """A million quotes, and one more."""
    path.write_bytes(b"prompt,completion\n" + b'"' * 1_000_001 + b"\n")


def entities(path: Path, _scale: float) -> None:
    """A sheet of names for names for texts, thousands of millions of characters long."""
    names = "abcdefghij"
    pairs = itertools.pairwise(names)
    declared = '<!ENTITY a "text">' + "".join(f'<!ENTITY {name} "{f"&{of};" * 10}">' for of, name in pairs)
    workbook(path, [f'<row r="1">{HEADING}</row><row r="2">{cell("A2", "&j;")}{cell("B2", "b")}</row>'])
    rewrite(path, "xl/worksheets/sheet1.xml", lambda text: f"<!DOCTYPE worksheet [{declared}]>{text}")


def missing_text(path: Path, _scale: float) -> None:
    """A cell whose text is to stand in a table that is not there."""
    lost = '<c r="A2" t="s"><v>99</v></c>'
    workbook(path, [f'<row r="1">{HEADING}</row><row r="2">{lost}{cell("B2", "b")}</row>'])


def no_sheet(path: Path, _scale: float) -> None:
    """A workbook without a sheet."""
    workbook(path, [])
    rewrite(path, "xl/workbook.xml", lambda text: text.replace('<sheet name="One" sheetId="1" r:id="rId1"/>', ""))


def no_workbook(path: Path, _scale: float) -> None:
    """An archive of something else."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")


def locked(path: Path, _scale: float) -> None:
    """How a workbook with a password begins."""
    path.write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(4_096))


def many_parts(path: Path, _scale: float) -> None:
    """A workbook among ten thousands of other files."""
    climbing(path, 1)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(60_000):
            archive.writestr(f"other/{number}", "")


def rewrite(path: Path, part: str, change: Callable[[str], str]) -> None:
    """One part of an archive anew."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name).decode() for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in parts.items():
            archive.writestr(name, change(text) if name == part else text)


def cell(place: str, text: str) -> str:
    """A cell of a sheet, in its XML."""
    return f'<c r="{place}" t="inlineStr"><is><t>{text}</t></is></c>'


HEADING = cell("A1", "prompt") + cell("B1", "completion")


def workbook(path: Path, pieces: Iterable[str]) -> None:
    """The least that is a workbook: one sheet, its rows in pieces of XML."""
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    kind = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"

    def to(what: str, target: str) -> str:
        inner = f'<Relationship Id="rId1" Type="{kind}/{what}" Target="{target}"/>'
        return f'<Relationships xmlns="{package}/relationships">{inner}</Relationships>'

    default = '<Default Extension="xml" ContentType="application/xml"/>'
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types">{default}</Types>',
        "_rels/.rels": to("officeDocument", "xl/workbook.xml"),
        "xl/workbook.xml": f'<workbook {main} xmlns:r="{kind}"><sheets><sheet name="One" sheetId="1" r:id="rId1"/>'
        "</sheets></workbook>",
        "xl/_rels/workbook.xml.rels": to("worksheet", "worksheets/sheet1.xml"),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for part, text in parts.items():
            archive.writestr(part, text)
        with archive.open("xl/worksheets/sheet1.xml", "w", force_zip64=True) as sheet:
            sheet.write(f"<worksheet {main}><sheetData>".encode())
            for piece in pieces:
                sheet.write(piece.encode())
            sheet.write(b"</sheetData></worksheet>")


HARMS = (
    Harm("1 GB in a line", "data.jsonl", single_line, ("longer than", "one JSON object")),
    Harm("1 GB in a cell", "data.csv", single_cell, ("never closed",)),
    Harm("NUL bytes", "data.csv", nul_bytes, ("NUL byte",)),
    Harm("1 GB of zeros", "data.jsonl", zeros, ("NUL",)),
    Harm("1 GB of zeros as CSV", "data.csv", zeros, ("NUL",)),
    Harm("UTF-16, mixed line ends", "data.csv", utf_16, ()),
    Harm("UTF-16, cut off", "data.csv", half_utf_16, ("UTF-16",)),
    Harm("mixed line ends, blank lines", "data.jsonl", mixed_ends, ()),
    Harm("a million columns", "data.csv", million_columns, ("column", "longer than")),
    Harm("a million keys", "data.jsonl", million_keys, ("columns",)),
    Harm("brackets in brackets", "data.jsonl", deep, ("JSON",)),
    Harm("zip bomb, 4 GB", "data.xlsx", zip_bomb, ("unpack", "no row")),
    Harm("zip bomb that lies", "data.xlsx", lying_bomb, ("workbook", "no row")),
    Harm("a cell at the far end", "data.xlsx", last_cell, ("workbook",)),
    Harm("100 MB of cells, 1 MB packed", "data.xlsx", many_cells, ()),
    Harm("formulas", "data.xlsx", formulas, ()),
    Harm("names that climb", "data.xlsx", climbing, ()),
    Harm("a link to /dev/zero", "data.jsonl", link, ("device",)),
    Harm("a pipe", "data.jsonl", pipe, ("device",)),
    Harm("a link to itself", "data.csv", circle, ("does not exist",)),
    Harm("texts that steer terminals", "data.csv", steering, ()),
    Harm("bait for slow patterns", "data.jsonl", slow_patterns, ()),
    Harm("a number of 100,000 digits", "data.jsonl", long_number, ("Line 1 is not JSON",)),
    Harm("half a character", "data.jsonl", half_character, ("half a character",)),
    Harm("a mark in the middle", "data.jsonl", mark_inside, ("Line 4 is not JSON",)),
    Harm("UTF-32, cut off", "data.csv", half_utf_32, ("UTF-32",)),
    Harm("a million quotes", "data.csv", only_quotes, ("never closed",)),
    Harm("entities of entities", "data.xlsx", entities, ("entity",)),
    Harm("a text that is not there", "data.xlsx", missing_text, ("shared strings",)),
    Harm("a workbook without a sheet", "data.xlsx", no_sheet, ("no sheet",)),
    Harm("another kind of archive", "data.xlsx", no_workbook, ("no XLSX workbook",)),
    Harm("a workbook with a password", "data.xlsx", locked, ("no XLSX workbook",)),
    Harm("60,000 other parts", "data.xlsx", many_parts, ()),
)


if __name__ == "__main__":
    sys.exit(main())
