"""`tunesmith doctor`: what is odd about training data, for people and for scripts. What it mends is in `fixing`.

The rules are in `tunesmith.data`; here is the telling. The exit code is 0 if nothing is worse than a note,
or all of that was mended.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.cli.datafile import base_and_folder, finding_record, lengths_of, watching
from tunesmith.cli.fixing import check_flags, fix, take_back
from tunesmith.cli.home import home_settings
from tunesmith.cli.output import Output
from tunesmith.data.doctor import Codec, Examined
from tunesmith.data.facts import Lengths
from tunesmith.data.findings import Finding, Fix, Severity, shown
from tunesmith.data.rows import Batch, Wanted
from tunesmith.data.source import Changed, Source, open_source, refusal
from tunesmith.data.verdict import TRAINING, VALIDATION, Part, Verdict, judge
from tunesmith.tokenizer import Tokenizer

EXIT_FINDINGS = 1

_COLOURS = {Severity.FATAL: 91, Severity.REQUIRED: 91, Severity.SUGGESTED: 93, Severity.NOTE: 90}


def doctor(args: argparse.Namespace, output: Output) -> int:
    """Look, tell, mend if that is asked for; the exit code.

    Raises InvalidRequest for a file that cannot even be opened, or of which nothing can be made.
    """
    check_flags(args)
    files = {TRAINING: args.file} | ({} if args.validation_file is None else {VALIDATION: args.validation_file})
    if args.undo:
        return take_back([Path(file) for file in files.values()], output)
    base, folder = base_and_folder(home_settings(args).home, args.model)
    tokenizer = Tokenizer.from_folder(folder)
    codec = Codec(tokenizer.encode_many, tokenizer.decode, tuple(map(tokenizer.token_text, tokenizer.ending_ids)))
    lengths = lengths_of(base, tokenizer)
    wanted = Wanted(args.prompt_column, args.completion_column)
    opened = {name: open_source(Path(file), wanted, args.sheet) for name, file in files.items()}
    verdict, sources = _judge(opened, lengths, codec, output)
    if not output.machine:
        _tell(verdict, files, output)
    good, record = not verdict.warnings, dict[str, Any]()
    if args.fix:
        good, record = fix(verdict, sources, lengths, codec.special, args, output)
    if output.machine:
        output.show({"files": files, "model": base.name} | _record(verdict) | ({"fix": record} if args.fix else {}))
    return 0 if good else EXIT_FINDINGS


def _judge(
    sources: Mapping[str, Source], lengths: Lengths, codec: Codec, output: Output
) -> tuple[Verdict, Mapping[str, Source]]:
    """Looks at both files, again from the beginning where one turns out to be read otherwise than thought."""
    while True:
        parts = {name: Part(source, partial(_watched, source, output)) for name, source in sources.items()}
        try:
            verdict = judge(parts[TRAINING], parts.get(VALIDATION), lengths, codec)
        except Changed as changed:
            sources = {
                name: changed.source if source.path == changed.source.path else source
                for name, source in sources.items()
            }
        else:
            return verdict.plus(_refusals(verdict, sources)), sources


def _refusals(verdict: Verdict, sources: Mapping[str, Source]) -> Iterator[tuple[str, Finding]]:
    """Files that can be read, and would be refused as they lie though no other finding says so."""
    known = {which for which, finding in verdict.warnings if finding.severity in (Severity.REQUIRED, Severity.FATAL)}
    for name, source in sources.items():
        if name not in known and (reason := refusal(source)) is not None:
            yield name, Finding("format", Severity.REQUIRED, reason, fix=Fix("Write it anew as JSONL"))


def _watched(source: Source, output: Output) -> Iterator[Batch]:
    with watching(output, "Reading", source.size_bytes) as progress:
        for batch in source.batches():
            yield batch
            progress(batch.read_bytes)


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
        "ok": not verdict.warnings,
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
        where = "" if file == TRAINING else f" in {files[file]}"
        rows = f" {finding.rows}" if finding.rows.shown else ""
        count = f", {finding.rows.count:,} row{'s' * (finding.rows.count != 1)}" if finding.rows.count else ""
        told = f" {finding.id}{where}{count}{':' * bool(rows)}{rows}"
        output.say(told, lead=finding.severity.value, colour=_COLOURS[finding.severity])
        output.say(f"  {finding.explanation}")
        if finding.fix is not None:
            done = f" `tunesmith prepare {files[file]}` does it." if finding.fix.change else ""
            output.say(f"  Fix: {finding.fix.action}.{done}")
    output.say("Nothing stands against training on it." if not verdict.warnings else "")
