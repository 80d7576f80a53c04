"""`tunesmith prepare`: what is wrong with training data, what can be done, and a file that trains. Asks no server.

The rules are in `tunesmith.data`; here is the talking, in the order of `openai tools fine_tunes.prepare_data`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.cli.datafile import base_and_folder, finding_record, lengths_of, watching
from tunesmith.cli.home import home_settings
from tunesmith.cli.output import Output, UsageError, visible
from tunesmith.cli.pace import Speed, speed
from tunesmith.core.bases import Base
from tunesmith.core.requests import DEFAULT_N_EPOCHS
from tunesmith.data.advice import TokenMeter, Tokens, begin_alike, duration, metrics_flags, quoted
from tunesmith.data.analysis import Progress, analyse
from tunesmith.data.facts import Facts, FileFold, Task
from tunesmith.data.findings import Finding, Severity, Subject, find, shown
from tunesmith.data.outputs import Staged, publish
from tunesmith.data.plan import Plan, without_long
from tunesmith.data.rows import Batch, Wanted
from tunesmith.data.source import Source, open_source, refusal
from tunesmith.data.split import Strata, sampled_order
from tunesmith.errors import InvalidRequest
from tunesmith.tokenizer import Tokenizer

PREPARED, TRAIN, VALID = "_prepared", "_prepared_train", "_prepared_valid"


@dataclass(frozen=True, slots=True)
class Written:
    """What came out."""

    files: tuple[Path, ...]
    rows: tuple[int, ...]
    new: bool
    """Or the file that was given, which needs nothing."""


class Talk:
    """Says things and asks things, or takes every suggestion."""

    def __init__(self, output: Output, *, quiet: bool) -> None:
        """Raises UsageError if there is something to ask and nobody to answer."""
        if not quiet and (output.machine or not sys.stdin.isatty()):
            raise UsageError("There is no terminal to answer questions at. Add -q to take every suggestion.")
        self._output = output
        self._quiet = quiet

    def say(self, text: str = "") -> None:
        """A sentence."""
        self._output.say(text)

    def accepts(self, question: str) -> bool:
        """Whether the answer is yes; so is no answer, and everything but n."""
        if self._quiet:
            self.say(f"{question} [Y/n]: Y")
            return True
        try:
            return input(f"{visible(question)} [Y/n]: ").strip().lower() != "n"
        except EOFError:
            raise UsageError("There is nobody to answer any more; nothing was written.") from None


def prepare(args: argparse.Namespace, output: Output) -> int:
    """Analyse, ask, write, advise. Raises InvalidRequest for data that only a person can mend."""
    talk = Talk(output, quiet=args.quiet)
    home = home_settings(args).home
    base, folder = base_and_folder(home, args.model)
    tokenizer = Tokenizer.from_folder(folder)
    lengths = lengths_of(base, tokenizer)
    talk.say("Analyzing...\n")
    source = open_source(Path(args.file), Wanted(args.prompt_column, args.completion_column), args.sheet)
    with watching(output, "Reading", source.size_bytes) as progress:
        read, facts = analyse(source, lengths, progress)
    source = read.source
    findings = find(Subject(source, facts, lengths))
    for finding in findings:
        talk.say(f"- {finding.explanation}")
    if findings[-1].severity is Severity.FATAL:
        raise InvalidRequest(f"{findings[-1].explanation} Nothing was written.", param="file", code=findings[-1].id)
    plan = _agree(findings, talk)
    changed = plan != Plan() or any(finding.severity is Severity.REQUIRED for finding in findings)

    with ExitStack() as stack:
        staged = stack.enter_context(Staged(source.path.parent))
        strata = stack.enter_context(Strata()) if args.split == "stratified" else None
        meter = TokenMeter(lengths, source.size_bytes, exact=args.exact_tokens)
        with watching(output, "Preparing", source.size_bytes) as progress:
            rows = plan.apply(read.batches(), facts)
            grown: list[int] = []
            wanted = plan.drop_long or not facts.too_long.count
            if wanted and not lengths.fit(plan.most_characters(facts.most_characters)):
                rows = without_long(rows, lengths, grown)
            final = _stage(rows, facts, staged, strata, meter, progress)
        if grown:
            talk.say(f"- {len(grown):,} rows were left out: by what was added to them they became too long.")
        if not final.kept:
            raise InvalidRequest("No row is left after these changes. Nothing was written.", param="file")
        parts: list[tuple[str, Staged, int]] = [(PREPARED, staged, final.kept)]
        question = "- [Recommended] Would you like to split into training and validation set?"
        if args.split != "none" and final.task is Task.CLASSIFICATION and talk.accepts(question):
            parts = _split(staged, strata, final, stack) or parts
            if len(parts) == 1:
                talk.say("There are too few rows to split.")
        if not changed and len(parts) == 1 and refusal(source) is None:
            written = Written((source.path,), (final.kept,), new=False)
        elif talk.accepts("\nYour data will be written to a new JSONL file. Proceed"):
            names = publish(source.path, [(part, file) for part, file, _ in parts])
            written = Written(tuple(names), tuple(rows for _, _, rows in parts), new=True)
        else:
            talk.say("Aborting... did not write the file")
            return 0
    tokens = meter.result()
    alike = begin_alike(final, tokenizer.encode_many) if len(written.files) > 1 else []
    command = _command(written, final, alike)
    expected = speed(home, folder)
    if output.machine:
        output.show(_record(source, findings, final, written, command, tokens, base, expected) | {"begin_alike": alike})
    else:
        _tell(talk, written, final, command, tokens, base, expected)
        if alike:
            both = quoted([str(written.files[0]), "-v", str(written.files[1])])
            talk.say(
                f"Classification is not measured: {len(alike):,} classes begin with the same token of `{base.name}` as "
                f"another, `{shown(alike[0].strip())}` for one. `tunesmith doctor {both} --fix --only "
                "class_first_tokens` proposes names that do not, and writes them."
            )
    return 0


def _agree(findings: Sequence[Finding], talk: Talk) -> Plan:
    """What is done about the findings: the required fixes are named, the suggested ones asked about."""
    plan = Plan()
    fixes = [(finding.severity, finding.fix) for finding in findings if finding.fix is not None]
    if not fixes:
        talk.say("\nNo remediations found.")
        return plan
    talk.say("\nBased on the analysis we will perform the following actions:")
    for severity, fix in fixes:
        if severity is Severity.REQUIRED:
            talk.say(f"- [Necessary] {fix.action}")
        elif talk.accepts(f"- [Recommended] {fix.action}"):
            plan = fix.accept(plan)
    return plan


def _stage(
    rows: Iterable[Batch],
    before: Facts,
    staged: Staged,
    strata: Strata | None,
    meter: TokenMeter,
    progress: Progress,
) -> Facts:
    """Writes the prepared rows to `staged`; what they are like."""
    with FileFold(None, before) as fold:
        for batch in rows:
            staged.write(batch)
            fold.add(batch)
            meter.add(batch)
            if strata is not None:
                strata.add(batch)
            progress(batch.read_bytes)
        return fold.result()


def _split(staged: Staged, strata: Strata | None, final: Facts, stack: ExitStack) -> list[tuple[str, Staged, int]]:
    """The rows in two files; none if one of them would be empty."""
    train, valid = (stack.enter_context(Staged(staged.folder)) for _ in range(2))
    if strata is not None:
        n_valid, n_train = staged.part(strata.validation(), valid, train)
    else:
        order = sampled_order(final.kept)
        for line in staged.lines_at(order):
            train.write_bytes(line)
        rest = np.ones(final.kept, dtype=np.bool_)
        rest[order] = False
        for line in staged.lines_at(np.flatnonzero(rest)):
            valid.write_bytes(line)
        n_train, n_valid = len(order), final.kept - len(order)
    return [(TRAIN, train, n_train), (VALID, valid, n_valid)] if n_train and n_valid else []


def _command(written: Written, final: Facts, alike: Sequence[str]) -> str:
    words = ["-t", str(written.files[0])]
    if len(written.files) > 1:
        words += ["-v", str(written.files[1]), *metrics_flags(final, alike)]
    return "tunesmith api fine_tunes.create " + quoted(words)


def _tell(
    talk: Talk, written: Written, final: Facts, command: str, tokens: Tokens, base: Base, expected: Speed
) -> None:
    if written.new:
        parts = zip(written.files, written.rows, strict=True)
        talk.say("\nWrote " + " and ".join(f"`{name}` ({rows:,} rows)" for name, rows in parts) + ".")
        talk.say("Feel free to take a look!\n\nNow use that file when fine-tuning:")
    else:
        talk.say("\nYou can use your file for fine-tuning:")
    talk.say(f"> {command}\n")
    if suffix := final.prompts.common_suffix:
        talk.say(
            f"After you've fine-tuned a model, end your prompts with `{shown(suffix)}`: it tells the model to begin "
            "its answer, rather than to go on with the prompt."
        )
    if (suffix := final.completions.common_suffix) and not final.completions.identical:
        talk.say(f'Ask with `stop=["{shown(suffix)}"]`, so that generated texts end where they should.')
    trained = tokens.count * DEFAULT_N_EPOCHS
    about = "" if tokens.exact else "about "
    cost = trained / 1_000 * base.price_per_1k_training_tokens
    talk.say(
        f"The rows have {about}{tokens.count:,} tokens of `{base.name}`; {DEFAULT_N_EPOCHS} epochs train {about}"
        f"{trained:,}, which costs {f'${cost:,.2f}' if cost else 'nothing'}."
    )
    took = duration(trained / expected.tokens_per_s)
    talk.say(f"Training takes about {took} once it starts: {expected.because(f'`{base.name}`')}.")


def _record(
    source: Source,
    findings: Sequence[Finding],
    final: Facts,
    written: Written,
    command: str,
    tokens: Tokens,
    base: Base,
    expected: Speed,
) -> dict[str, Any]:
    trained = tokens.count * DEFAULT_N_EPOCHS
    return {
        "file": str(source.path),
        "encoding": source.encoding,
        "task": final.task.value,
        "findings": [finding_record(finding) for finding in findings],
        "files": [{"name": str(name), "rows": rows} for name, rows in zip(written.files, written.rows, strict=True)],
        "written": written.new,
        "command": command,
        "prompt_suffix": final.prompts.common_suffix,
        "stop": final.completions.common_suffix,
        "model": base.name,
        "tokens": tokens.count,
        "tokens_exact": tokens.exact,
        "n_epochs": DEFAULT_N_EPOCHS,
        "cost_usd": trained / 1_000 * base.price_per_1k_training_tokens,
        "training_s": trained / expected.tokens_per_s,
        "training_s_measured": expected.measured,
    }
