"""Reading files: formats, encodings, line ends, broken rows, and files that are there to do harm."""

from __future__ import annotations

import csv
import io
import itertools
import json
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data import analysis, encoding, json_rows, tables
from tunesmith.data.analysis import analyse
from tunesmith.data.encoding import MAX_LINE_CHARACTERS, lines_of
from tunesmith.data.rows import Batch, Columns, Wanted
from tunesmith.data.source import Source, open_source
from tunesmith.errors import InvalidRequest


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


AS_NAMED = Wanted()


def read(path: Path, wanted: Wanted = AS_NAMED, sheet: str | None = None) -> tuple[Source, list[tuple[str, str]]]:
    rows, _ = analyse(open_source(path, wanted, sheet), None, lambda read_bytes: None)
    source = rows.source
    pairs = [pair for batch in source.batches() for pair in zip(batch.prompts, batch.completions, strict=True)]
    return source, pairs


def refusal(path: Path, wanted: Wanted = AS_NAMED) -> str:
    with pytest.raises(InvalidRequest) as caught:
        read(path, wanted)
    return caught.value.message


ROWS = [("Grüße “x”", "čaj\n2"), ("c", 'd, "e"')]
CSV = 'prompt,completion\nGrüße “x”,"čaj\n2"\nc,"d, ""e"""\n'


@pytest.mark.parametrize("name", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_encodings_are_told_from_the_file(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path, "data.csv", CSV.encode(name)))[1] == ROWS


def test_what_is_not_utf_8_is_read_as_windows_1252_also_late_in_the_file(tmp_path: Path) -> None:
    early = "prompt,completion\n" + "plain,text\n" * 100_000
    source, pairs = read(write(tmp_path, "data.csv", early.encode() + "“Grüße”,x\n".encode("cp1252")))
    assert source.encoding == "cp1252"
    assert pairs[-1] == ("“Grüße”", "x")
    source, pairs = read(write(tmp_path, "other.csv", b"prompt,completion\n\x81\xe9,x\n"))
    assert (source.encoding, pairs) == ("latin-1", [("\x81é", "x")])


def test_damaged_utf_16_is_refused(tmp_path: Path) -> None:
    assert "UTF-16" in refusal(write(tmp_path, "data.csv", CSV.encode("utf-16") + b"\x00\xd8\x00"))


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 1 << 20])
def test_lines_do_not_depend_on_blocks(tmp_path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", block_bytes)
    path = write(tmp_path, "data.txt", "a\r\nb\rc\n\n\r\r\nd é\u2028e\r")
    batches = list(lines_of(path, "utf-8"))
    assert [text for batch in batches for text in batch.texts] == [
        "a\r\n",
        "b\r",
        "c\n",
        "\n",
        "\r",
        "\r\n",
        "d é\u2028e\r",
    ]
    assert batches[0].first == 1
    assert all(one.first + len(one.texts) == two.first for one, two in itertools.pairwise(batches))


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.json", "data.txt"])
def test_a_line_without_end_is_refused_in_little_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(b'{"prompt":"' if "json" in name else b"prompt,completion\n")
        file.writelines(b"x" * (1 << 20) for _ in range(64))
    tracemalloc.start()
    message = refusal(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"{MAX_LINE_CHARACTERS:,}" in message or "67,108" in message
    assert peak_bytes < 24 << 20


def test_conversations_need_no_preparing(tmp_path: Path) -> None:
    assert "upload the file as it is" in refusal(write(tmp_path, "data.jsonl", '{"messages": []}\n' * 2))


def test_a_nul_byte_is_refused_with_its_line(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, "data.csv", b"prompt,completion\na,b\nc\0,d\n")).startswith("Line 3 of the file")


def test_rows_with_too_many_cells_are_all_named(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "data.csv", 'prompt,completion\n"a\nb",c\nd,e,f\ng,h\ni,j,k,l\nm,n,,\n'))
    assert "Line 4 begins a row of 3 cells where the heading has 2" in message
    assert "Line 6 begins a row of 4 cells" in message
    assert "Line 7" not in message


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("block_bytes", [7, 64, 1 << 20])
def test_a_row_is_named_by_its_line_after_many_plain_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, block_bytes: int
) -> None:
    """Quick rows are not counted by lines on the way; one of them here has two, and a \\r of its own."""
    monkeypatch.setattr(encoding, "BLOCK_BYTES", block_bytes)
    rows = ["prompt,completion", *["a,b"] * 20, f'"two{end}lines, a\rthird",c', *["ü,b"] * 20, "one,two,three", ""]
    assert "Line 45 begins a row of 3 cells" in refusal(write(tmp_path, "data.csv", end.join(rows)))


def test_the_last_row_needs_no_line_end(tmp_path: Path) -> None:
    pairs = read(write(tmp_path, "data.csv", 'prompt,completion\r\na,b\r\n"c","d"'))[1]
    assert pairs == [("a", "b"), ("c", "d")]


def test_a_quote_that_never_closes_is_named_where_it_opens(tmp_path: Path) -> None:
    assert "Line 3 of the file opens a quote" in refusal(
        write(tmp_path, "data.csv", 'prompt,completion\na,b\n"c,d\ne,f\n')
    )
    endless = 'prompt,completion\n"' + "c,d\n" * 400_000
    assert "never closed" in refusal(write(tmp_path, "data.csv", endless))


def test_broken_lines_of_json_are_all_named(tmp_path: Path) -> None:
    good = '{"prompt": "a", "completion": "b"}\n'
    bad = [
        '{"prompt": "a"\n',
        good.strip() + good,
        "[1]\n",
        '{"prompt": "\\ud83d", "completion": "b"}\n',
        "[" * 9_000 + "\n",
    ]
    message = refusal(write(tmp_path, "data.jsonl", good + "".join(good + line for line in bad)))
    assert message.startswith("Line 3 is not JSON")
    for named in (
        "Line 5 holds more than one JSON value",
        "Line 7 is no object",
        "Line 9 holds half a",
        "Line 11 is not JSON",
    ):
        assert named in message


def test_lines_that_only_together_are_json_are_refused(tmp_path: Path) -> None:
    lines = [
        '{"prompt":"a","completion":"b","x":[{}',
        "{}]}",
        '{"prompt":"c","completion":"d"},{"prompt":"e","completion":"f"}',
    ]
    assert "Line 1 is not JSON" in refusal(write(tmp_path, "data.jsonl", "\n".join(lines) + "\n"))


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "a", "completion": 1}\n{"prompt": null, "completion": {"k": [1, "é"]}}\n',
        '[{"prompt": "a", "completion": 1},\n {"completion": {"k": [1, "é"]}}]',
        '{"prompt": ["a", null], "completion": [1, {"k": [1, "é"]}]}',
        '{"prompt": {"0": "a"}, "completion": {"0": 1, "1": {"k": [1, "é"]}}}',
        '{\n"prompt": "a",\n"completion": 1}\n{"completion":\n {"k": [1, "é"]}}',
    ],
)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_json_is_read_however_it_is_written(tmp_path: Path, name: str, text: str) -> None:
    assert read(write(tmp_path, name, text))[1] == [("a", "1"), ("", '{"k": [1, "é"]}')]


def test_a_key_that_comes_late_is_taken_up(tmp_path: Path) -> None:
    early = '{"Prompt": "a", "completion": "b"}\n' * 5_000
    source, pairs = read(write(tmp_path, "data.jsonl", early + '{"prompt": "c", "completion": "d", "id": 1}\n'))
    assert (pairs[0], pairs[-1]) == (("", "b"), ("c", "d"))
    assert source.columns.extra == ("Prompt", "id")


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl"])
def test_fifty_thousand_columns_are_refused(tmp_path: Path, name: str) -> None:
    names = [f"c{n}" for n in range(50_000)]
    text = ",".join(names) if name.endswith("csv") else json.dumps(dict.fromkeys(names, 1))
    message = refusal(write(tmp_path, name, text + "\n" + text + "\n"))
    assert "more than 1,000 columns" in message or "longer than" in message
    assert len(message) < 1_000


def test_columns_are_named_by_the_user(tmp_path: Path) -> None:
    path = write(tmp_path, "data.tsv", "id\ttext\tlabel\n1\ta\tb\n")
    source, pairs = read(path, Wanted("text", "label"))
    assert (pairs, source.columns.extra) == ([("a", "b")], ("id",))
    assert "there are: `id`, `text`, `label`. Name the right one with --prompt-column" in refusal(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nowhere.csv")
    assert "folder or a device" in refusal(tmp_path / "folder.csv")
    assert "does not exist" in refusal(tmp_path / "gone.csv")
    assert "folder or a device" in refusal(Path("/dev/zero"))
    assert "ends with `.pdf`" in refusal(write(tmp_path, "data.pdf", "x"))
    for name in ("data.csv", "data.jsonl", "data.json", "data.xlsx"):
        assert refusal(write(tmp_path, name, ""))


def test_a_file_that_changes_between_passes_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "data.csv", CSV)
    source, _ = read(path)
    write(tmp_path, "data.csv", CSV + "x,y\n")
    with pytest.raises(InvalidRequest, match="was changed meanwhile"):
        next(source.batches())


def workbook(folder: Path, rows: str, *, name: str = "data.xlsx", padding: int = 0) -> Path:
    """The least that is a workbook: one sheet, `rows` as they stand in its XML."""
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    kind = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"

    def link(what: str, target: str) -> str:
        inner = f'<Relationship Id="rId1" Type="{kind}/{what}" Target="{target}"/>'
        return f'<Relationships xmlns="{package}/relationships">{inner}</Relationships>'

    sheet = '<sheet name="One" sheetId="1" r:id="rId1"/>'
    default = '<Default Extension="xml" ContentType="application/xml"/>'
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types">{default}</Types>',
        "_rels/.rels": link("officeDocument", "xl/workbook.xml"),
        "xl/workbook.xml": f'<workbook {main} xmlns:r="{kind}"><sheets>{sheet}</sheets></workbook>',
        "xl/_rels/workbook.xml.rels": link("worksheet", "worksheets/sheet1.xml"),
        "xl/worksheets/sheet1.xml": f"<worksheet {main}><sheetData>{rows}</sheetData></worksheet>" + " " * padding,
    }
    path = folder / name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part, text in parts.items():
            archive.writestr(part, text)
    return path


def cell(place: str, text: str) -> str:
    return f'<c r="{place}" t="inlineStr"><is><t>{text}</t></is></c>'


HEADING = f'<row r="1">{cell("A1", "prompt")}{cell("B1", "completion")}</row>'


def test_formulas_are_read_by_their_stored_result(tmp_path: Path) -> None:
    row = '<row r="2"><c r="A2" t="str"><f>"a"&amp;"b"</f><v>ab</v></c><c r="B2"><f>1+1</f><v>2</v></c></row>'
    bare = '<row r="3"><c r="A3"><f>1+1</f></c><c r="B3" t="b"><v>1</v></c></row>'
    assert read(workbook(tmp_path, HEADING + row + bare))[1] == [("ab", "2"), ("", "True")]


def test_a_sheet_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = workbook(tmp_path, HEADING)
    with pytest.raises(InvalidRequest, match="no sheet 'Two'; there are: One"):
        open_source(path, Wanted(), "Two")


def test_a_workbook_that_claims_to_unpack_to_much_is_refused_at_once(
    tmp_path: Path,
) -> None:
    path = workbook(tmp_path, HEADING, padding=1 << 20)
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\x01\x02")  # the last entry of the directory: the sheet
    content[place + 24 : place + 28] = (3 << 30).to_bytes(4, "little")
    assert "unpacks to 3,22" in refusal(write(tmp_path, "bomb.xlsx", bytes(content)))


def test_a_sheet_that_reaches_to_the_last_cell_takes_the_child_only(tmp_path: Path) -> None:
    last = f'<row r="1048576">{cell("XFD1048576", "x")}</row>'
    assert "memory" in refusal(workbook(tmp_path, HEADING + last))


def test_what_is_no_archive_is_no_workbook(tmp_path: Path) -> None:
    assert "no XLSX workbook" in refusal(write(tmp_path, "data.xlsx", b"PK\x03\x04 and so on"))
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    assert "no XLSX workbook" in refusal(write(tmp_path, "data.xlsx", empty.getvalue()))


pieces = st.sampled_from(["a", "é", " ", ",", '"', '""', "\n", "\r", "\r\n", "x y"])
cells = st.lists(pieces, max_size=6).map("".join)


@given(
    rows=st.lists(st.lists(cells, min_size=1, max_size=3), max_size=12),
    ends=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    spoilt=st.none() | st.tuples(st.integers(0, 200), st.sampled_from(['"', "\n", ",", "\r"])),
    block_bytes=st.sampled_from([3, 16, 1 << 20]),
)
def test_plain_rows_are_read_as_the_parser_reads_them(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[list[str]],
    ends: str,
    quoting: Literal[0, 1],
    spoilt: tuple[int, str] | None,
    block_bytes: int,
) -> None:
    """The quick way against the slow one, on files that are right and on files that are not."""
    written = io.StringIO()
    csv.writer(written, lineterminator=ends, quoting=quoting).writerows([["prompt", "completion"], *rows])
    text = written.getvalue()
    if spoilt is not None:
        place = min(spoilt[0], len(text))
        text = text[:place] + spoilt[1] + text[place:]
    path = write(tmp_path_factory.mktemp("cells"), "data.csv", text)
    columns = Columns(("prompt", "completion"), "prompt", "completion")

    def outcome(quick: bool) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoding, "BLOCK_BYTES", block_bytes)
            if not quick:
                patch.setattr(tables, "MOST_OPEN_CHARACTERS", -1)
            try:
                batches = list(tables.table_batches(path, "utf-8", ",", columns))
            except InvalidRequest as error:
                return error.message
        places = [batch.first for batch in batches]
        counts = [len(batch) for batch in batches]
        assert places == [1 + sum(counts[:n]) for n in range(len(counts))]
        return [pair for batch in batches for pair in zip(batch.prompts, batch.completions, strict=True)]

    assert outcome(quick=True) == outcome(quick=False)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
objects = st.fixed_dictionaries({"prompt": texts, "completion": texts}).map(json.dumps)
oddities = st.sampled_from(
    [
        "",
        " ",
        "{",
        "1",
        "[]",
        '{"prompt": 1, "completion": null}',
        '{"prompt": "a", "completion": "b", "id": 3}',
        '{"prompt": "a"}',
        '{"prompt": "a", "prompt": "c", "completion": "b"}',
        '{"prompt": "a", "completion": "b"} {"prompt": "a", "completion": "b"}',
        '{"prompt": "\\ud83d\\ude00", "completion": "\\u00e9\\/"}',
        '{"prompt": "\\ud83d", "completion": "b"}',
        '{"prompt": "tab\there", "completion": "b"}',
        '{"prompt": NaN, "completion": [1, {"a": "é"}]}',
        '{"prompt": "é日", "completion": "b"}   ',
    ]
)


@given(
    lines=st.lists(st.tuples(objects | objects | oddities, st.sampled_from(["\n", "\n", "\r\n", "\r"])), max_size=8),
    block_bytes=st.sampled_from([5, 40, 1 << 20]),
)
def test_plain_lines_are_read_as_any_lines_are(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, str]], block_bytes: int
) -> None:
    """The quick way against the slow one, on lines that are right and on lines that are not."""
    first = '{"prompt": "a", "completion": "b"}\n' * 2
    path = write(tmp_path_factory.mktemp("lines"), "data.jsonl", first + "".join(line + end for line, end in lines))
    columns = Columns(("prompt", "completion"), "prompt", "completion")

    def outcome(quick: bool) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoding, "BLOCK_BYTES", block_bytes)
            if not quick:
                patch.setattr(json_rows, "_plain", lambda *_: False)
            try:
                batches = list(json_rows.json_batches(path, "utf-8", json_rows.Shape.LINES, columns, AS_NAMED))
            except InvalidRequest as error:
                return error.message
            except json_rows.NewColumns as new:
                return new.columns
        return [pair for batch in batches for pair in zip(batch.prompts, batch.completions, strict=True)]

    assert outcome(quick=True) == outcome(quick=False)


def test_small_files_are_read_once_and_others_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "data.csv", CSV)
    opened: list[Source] = []
    real = Source.batches

    def batches(self: Source) -> Iterator[Batch]:
        opened.append(self)
        return real(self)

    monkeypatch.setattr(Source, "batches", batches)
    for remembered, times in ((analysis.REMEMBERED_BYTES, 1), (10, 2)):
        monkeypatch.setattr(analysis, "REMEMBERED_BYTES", remembered)
        opened.clear()
        rows, _ = analyse(open_source(path, AS_NAMED), None, lambda read_bytes: None)
        again = [pair for batch in rows.batches() for pair in zip(batch.prompts, batch.completions, strict=True)]
        assert (again, len(opened)) == (ROWS, times)
    rows, _ = analyse(open_source(path, AS_NAMED), None, lambda read_bytes: None)
    write(tmp_path, "data.csv", CSV + "x,y\n")
    with pytest.raises(InvalidRequest, match="was changed meanwhile"):
        next(rows.batches())
