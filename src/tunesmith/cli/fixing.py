"""`tunesmith doctor --fix` and `--undo`: a diff to look at, a question, files that are there whole or not at all.

What is mended is in `tunesmith.data.repair`; here is the talking.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.cli.datafile import watching
from tunesmith.cli.output import Output, UsageError
from tunesmith.data.doctor import Examined
from tunesmith.data.doctor_private import redacted
from tunesmith.data.facts import Lengths
from tunesmith.data.findings import Finding
from tunesmith.data.formats import Example, write_jsonl
from tunesmith.data.inplace import put_in_place, undo
from tunesmith.data.json_rows import Shape
from tunesmith.data.outputs import Staged, publish
from tunesmith.data.repair import IF_NAMED, MENDED, Change, Changes, Repair, mend, plan_repair
from tunesmith.data.source import Format, Source, refusal
from tunesmith.data.verdict import TRAINING, VALIDATION, Verdict
from tunesmith.errors import InvalidRequest

FIXED = "_fixed"
MOST_SHOWN_CHARACTERS = 400
"""Of a line of the diff; what both lines share is cut before what differs."""
AROUND = 40
"""Characters that are left beside a difference."""
_NEVER_SHOWN = ("secrets", "card_numbers")


@dataclass(frozen=True, slots=True)
class Mended:
    """One file as it would be."""

    source: Source
    staged: Staged
    changes: Changes


def check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that need another, and for findings that nothing mends by itself."""
    if not args.fix and (args.only or args.in_place or args.yes):
        raise UsageError("--only, --in-place and --yes go with --fix.")
    if args.fix and args.undo:
        raise UsageError("--fix and --undo contradict each other.")
    unknown = [id_ for id_ in args.only if id_ not in (*MENDED, *IF_NAMED)]
    if unknown:
        raise UsageError(
            f"--only {unknown[0]}: only a person can mend that, or there is no such finding. Those that can be mended "
            f"are {', '.join((*MENDED, *IF_NAMED))}."
        )


def take_back(paths: Sequence[Path], output: Output) -> int:
    """Undoes the last fix in place of each file. Raises InvalidRequest where there was none."""
    aside = {path: undo(path) for path in paths}
    for path, name in aside.items():
        output.say(f"{path} is as it was; the mended rows are in {name}.")
    if output.machine:
        output.show({"undone": [{"file": str(path), "mended": str(name)} for path, name in aside.items()]})
    return 0


def fix(
    verdict: Verdict,
    sources: Mapping[str, Source],
    lengths: Lengths,
    special: Sequence[str],
    args: argparse.Namespace,
    output: Output,
) -> tuple[bool, dict[str, Any]]:
    """Shows what would change, asks, writes; whether the data trains as it lies now, and the same for machines.

    Raises InvalidRequest, with the reason, where nothing can be mended; then nothing was written.
    """
    examined = {TRAINING: verdict.training, VALIDATION: verdict.validation}
    for name, source in sources.items():
        _check(name, source, examined[name], verdict, in_place=args.in_place)
    repair, findings = plan_repair(verdict, special, args.only)
    with ExitStack() as stack:
        mended = {
            name: _mend(source, name, repair, verdict, lengths, stack.enter_context(Staged(source.path.parent)), output)
            for name, source in sources.items()
        }
        needed = {name: one for name, one in mended.items() if _differs(one)}
        diff = [line for one in needed.values() for line in _diff(one, in_place=args.in_place)]
        record: dict[str, Any] = {"diff": diff, "mended": sorted({finding.id for finding in findings}), "written": []}
        for name, one in mended.items():
            record[name] = {"rows": one.changes.kept, "changed": one.changes.changed, "removed": one.changes.removed}
        if not needed:
            output.say("There is nothing that could be mended without a person.")
            return not verdict.warnings, record
        _preview(diff, needed, findings, output)
        if not _agreed(args, output):
            return False, record
        record["written"] = [str(name) for name in _write(needed, output, in_place=args.in_place)]
    left = {finding.id for _, finding in verdict.warnings} - {*record["mended"], *_WRITTEN}
    if left:
        output.say(f"Left for a person: {', '.join(sorted(left))}.")
    return not left, record


_WRITTEN = frozenset({"format", "encoding", "prompt_column", "completion_column", "additional_column"})
"""Writing JSONL mends these."""


def _check(name: str, source: Source, examined: Examined | None, verdict: Verdict, *, in_place: bool) -> None:
    """Raises InvalidRequest for a file of which nothing can be made."""
    fatal = [finding for which, finding in verdict.findings if which == name and finding.id == "unreadable"]
    if examined is None or fatal:
        reason = fatal[0].explanation if fatal else "The other file cannot be read."
        raise InvalidRequest(f"Nothing was mended: {reason}", param="file", code="unreadable")
    if not examined.facts.kept:
        raise InvalidRequest(
            f"Nothing was mended: {source.path} has no row with a completion.", param="file", code="no_examples"
        )
    if in_place and (source.format is not Format.JSONL or source.shape is not Shape.LINES):
        raise UsageError(f"--in-place is for JSONL; {source.path} is none. Without it, new files are written beside.")


def _mend(
    source: Source, name: str, repair: Repair, verdict: Verdict, lengths: Lengths, staged: Staged, output: Output
) -> Mended:
    examined = verdict.training if name == TRAINING else verdict.validation
    assert examined is not None
    gone = None
    if name == VALIDATION and verdict.overlap is not None and repair.drop_overlap:
        gone = np.any([verdict.overlap.masks[kind] for kind in repair.drop_overlap], axis=0)
    changes = Changes()
    with watching(output, "Mending", source.size_bytes) as progress:
        for batch in mend(source.batches(), repair, examined.facts, lengths, gone, changes):
            staged.write(batch)
            progress(batch.read_bytes)
    if not changes.kept:
        raise InvalidRequest(
            f"Nothing was mended: of {source.path} no row would be left. All {changes.removed:,} are empty, too long, "
            "or held by the training file.",
            param="file",
            code="no_examples",
        )
    return Mended(source, staged, changes)


def _differs(one: Mended) -> bool:
    return bool(one.changes.changed or one.changes.removed) or refusal(one.source) is not None


def _preview(diff: Sequence[str], needed: Mapping[str, Mended], findings: Sequence[Finding], output: Output) -> None:
    output.say()
    for finding in findings:
        action = "" if finding.fix is None else f": {finding.fix.action}"
        output.say(f"Mended is {finding.id}{action}.")
    output.say()
    for line in diff:
        output.say(lead=line, colour={"-": 31, "+": 32, "@": 36}.get(line[0]))
    for one in needed.values():
        changes = one.changes
        more = changes.changed + changes.removed - len(changes.shown)
        shown = f"; {more:,} more than are shown here" if more else ""
        output.say(
            f"{one.source.path}: {changes.changed:,} rows change, {changes.removed:,} go, {changes.kept:,} stay{shown}."
        )


def _diff(one: Mended, *, in_place: bool) -> list[str]:
    """The first changes as a unified diff without context, secrets masked."""
    path, changes = one.source.path, one.changes.shown
    new = path if in_place else path.with_name(f"{path.stem}{FIXED}.jsonl")
    return [f"--- {path}", f"+++ {new}", *(line for change in changes for line in _hunk(change))]


def _hunk(change: Change) -> list[str]:
    before = _line(change.before)
    if change.after is None:
        return [f"@@ -{change.row} +{change.written},0 @@", f"-{_cut(before, 0)}"]
    after = _line(change.after)
    shared = next((place for place, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    return [f"@@ -{change.row} +{change.written + 1} @@", f"-{_cut(before, shared)}", f"+{_cut(after, shared)}"]


def _line(row: Example) -> str:
    prompt, completion = (redacted(text, _NEVER_SHOWN, _masked) for text in (row.prompt, row.completion))
    shown = Example(prompt, completion)
    return b"".join(write_jsonl([shown])).decode().rstrip("\n")


def _masked(secret: str) -> str:
    return f"{secret[:2]}****"


def _cut(line: str, differs: int) -> str:
    """A line that is too long to show, from a little before the place where it differs."""
    if len(line) <= MOST_SHOWN_CHARACTERS:
        return line
    start = max(0, differs - AROUND)
    end = start + MOST_SHOWN_CHARACTERS
    return "\u2026" * (start > 0) + line[start:end] + "\u2026" * (end < len(line))


def _agreed(args: argparse.Namespace, output: Output) -> bool:
    if args.yes:
        return True
    if output.machine or not sys.stdin.isatty():
        output.aside("Nothing was written: there is nobody to ask. Add --yes to write.")
        return False
    try:
        agreed = input("\nWrite this? [y/N]: ").strip().lower() in ("y", "yes")
    except EOFError:
        agreed = False
    if not agreed:
        output.say("Nothing was written.")
    return agreed


def _write(needed: Mapping[str, Mended], output: Output, *, in_place: bool) -> list[Path]:
    """Gives the files their names. If the second cannot have its own, the first is as it was too."""
    done: list[tuple[Path, Path | None]] = []
    try:
        for one in needed.values():
            path = one.source.path
            one.source.check_unchanged()
            if in_place:
                done.append((path, put_in_place(path, one.staged)))
            else:
                done += [(name, None) for name in publish(path, [(FIXED, one.staged)])]
    except InvalidRequest:
        for name, kept in done:
            if kept is None:
                name.unlink()
            else:
                kept.replace(name)
        raise
    for name, kept in done:
        output.say(f"Wrote {name}." + ("" if kept is None else f" What it was is in {kept}; --undo puts it back."))
    return [name for name, _ in done]
