"""`tunesmith doctor`: what is odd about training data, for people and for scripts. Asks nothing, writes nothing.

The rules are in `tunesmith.data`; here is the telling. The exit code is 0 if nothing is worse than a note.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.cli.datafile import base_and_folder, finding_record, lengths_of, watching
from tunesmith.cli.home import home_settings
from tunesmith.cli.output import Output
from tunesmith.data.doctor import Codec, Examination, Examined, first_marks
from tunesmith.data.doctor_findings import about_file, about_validation, diagnose
from tunesmith.data.doctor_marks import Marks
from tunesmith.data.doctor_overlap import ValidationRows
from tunesmith.data.facts import Lengths
from tunesmith.data.findings import Finding, Severity, Subject, shown
from tunesmith.data.rows import Batch, Wanted
from tunesmith.data.source import Changed, Source, open_source
from tunesmith.errors import InvalidRequest
from tunesmith.tokenizer import Tokenizer

EXIT_FINDINGS = 1
TRAINING, VALIDATION = "training", "validation"

_COLOURS = {Severity.FATAL: 91, Severity.REQUIRED: 91, Severity.SUGGESTED: 93, Severity.NOTE: 90}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of it."""

    findings: tuple[tuple[str, Finding], ...]
    """Each with TRAINING or VALIDATION, whose rows it names."""
    training: Examined | None
    """None if the file cannot be read to its end."""
    class_spellings: Mapping[str, str]

    @property
    def exit_code(self) -> int:
        """Whether a script should go on."""
        return EXIT_FINDINGS if any(found.severity is not Severity.NOTE for _, found in self.findings) else 0


def doctor(args: argparse.Namespace, output: Output) -> int:
    """Look, tell; the exit code. Raises InvalidRequest for a file that cannot even be opened."""
    base, folder = base_and_folder(home_settings(args).home, args.model)
    tokenizer = Tokenizer.from_folder(folder)
    codec = Codec(tokenizer.encode_many, tokenizer.decode, tuple(map(tokenizer.token_text, tokenizer.ending_ids)))
    files = {TRAINING: args.file} | ({} if args.validation_file is None else {VALIDATION: args.validation_file})
    wanted = Wanted(args.prompt_column, args.completion_column)
    sources = {name: open_source(Path(file), wanted, args.sheet) for name, file in files.items()}
    verdict = _judge(sources, lengths_of(base, tokenizer), codec, output)
    if output.machine:
        output.show({"files": files, "model": base.name} | _record(verdict))
    else:
        _tell(verdict, files, output)
    return verdict.exit_code


def _judge(sources: Mapping[str, Source], lengths: Lengths, codec: Codec, output: Output) -> Verdict:
    """Looks at both files, again from the beginning where one turns out to be read otherwise than thought."""
    while True:
        try:
            return _look(sources, lengths, codec, output)
        except Changed as changed:
            sources = {
                name: changed.source if source.path == changed.source.path else source
                for name, source in sources.items()
            }


def _look(sources: Mapping[str, Source], lengths: Lengths, codec: Codec, output: Output) -> Verdict:
    training, validation = sources[TRAINING], sources.get(VALIDATION)
    try:
        marks = first_marks(training.batches())
    except InvalidRequest as error:
        return Verdict(((TRAINING, _unreadable(error)),), None, {})
    rows = ValidationRows(marks.separator)
    found: list[tuple[str, Finding]] = []
    tried: Examined | None = None
    if validation is not None:
        try:
            tried = _pass(validation, marks, lengths, codec, output, rows.add)
        except InvalidRequest as error:
            found.append((VALIDATION, _unreadable(error)))
    try:
        examined = _pass(training, marks, lengths, codec, output, (lambda _: None) if tried is None else rows.meet)
    except InvalidRequest as error:
        return Verdict((*found, (TRAINING, _unreadable(error))), None, {})
    diagnosis = diagnose(examined, codec)
    ours = [*about_file(Subject(training, examined.facts, lengths)), *diagnosis.findings]
    if tried is not None and validation is not None:
        found += [(VALIDATION, finding) for finding in about_validation(examined, tried, rows.result())]
    every = [*((TRAINING, finding) for finding in ours), *found]
    order = list(Severity)
    every.sort(key=lambda told: -order.index(told[1].severity))
    return Verdict(tuple(every), examined, diagnosis.class_spellings)


def _pass(
    source: Source,
    marks: Marks,
    lengths: Lengths,
    codec: Codec,
    output: Output,
    each: Callable[[Batch], None],
) -> Examined:
    with (
        Examination(marks, lengths, codec) as examination,
        watching(output, "Reading", source.size_bytes) as progress,
    ):
        for batch in source.batches():
            examination.add(batch)
            each(batch)
            progress(batch.read_bytes)
        return examination.result()


def _unreadable(error: InvalidRequest) -> Finding:
    return Finding("unreadable", Severity.FATAL, error.message)


def _record(verdict: Verdict) -> dict[str, Any]:
    training = verdict.training
    about = {} if training is None else _about(training)
    return about | {
        "findings": [
            {"file": file, "count": finding.rows.count}
            | finding_record(finding)
            | {
                "fix": None
                if finding.fix is None
                else {"action": finding.fix.action, "prepare": dict(finding.fix.change)}
            }
            for file, finding in verdict.findings
        ],
        "class_spellings": dict(verdict.class_spellings),
        "ok": verdict.exit_code == 0,
    }


def _about(training: Examined) -> dict[str, Any]:
    return {
        "rows": training.facts.rows,
        "task": training.facts.task.value,
        "separator": training.marks.separator,
        "stop": training.marks.stop,
    }


def _tell(verdict: Verdict, files: Mapping[str, str], output: Output) -> None:
    if verdict.training is not None:
        about, marks = verdict.training.facts, verdict.training.marks
        output.say(f"{files[TRAINING]}: {about.rows:,} rows for {about.task.value}.")
        for what, mark in ("Prompts", marks.separator), ("Completions", marks.stop):
            if mark is not None:
                output.say(f"{what} end with `{shown(mark)}`.")
        output.say()
    for file, finding in verdict.findings:
        colour, plain = (f"\033[{_COLOURS[finding.severity]}m", "\033[0m") if output.terminal else ("", "")
        where = "" if file == TRAINING else f" in {files[file]}"
        rows = f" {finding.rows}" if finding.rows.shown else ""
        count = f", {finding.rows.count:,} row{'s' * (finding.rows.count != 1)}" if finding.rows.count else ""
        output.say(f"{colour}{finding.severity.value}{plain} {finding.id}{where}{count}{':' * bool(rows)}{rows}")
        output.say(f"  {finding.explanation}")
        if finding.fix is not None:
            done = f" `tunesmith prepare {files[file]}` does it." if finding.fix.change else ""
            output.say(f"  Fix: {finding.fix.action}.{done}")
    output.say("Nothing stands against training on it." if not verdict.exit_code else "")
