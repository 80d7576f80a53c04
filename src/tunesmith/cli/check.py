"""`tunesmith models check`: whether the bases of a home folder are sound, and what they need. Asks no server."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from typing import Any

from tunesmith.cli.home import home_settings
from tunesmith.cli.output import Output, UsageError
from tunesmith.cli.tables import show_table
from tunesmith.core.architectures import ForwardPass
from tunesmith.core.base_check import Report, base_names, check_base

GIB = 1 << 30


def check(args: argparse.Namespace, output: Output) -> int:
    """A table of the bases of a home folder and a line for each finding; 1 where one of them is an error."""
    home = home_settings(args).home
    try:
        known = base_names(home)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if unknown := [name for name in args.names if name not in known]:
        raise UsageError(f"{unknown[0]} is no base of {home}. Bases are {', '.join(known)}.")
    reports = [check_base(home, name) for name in args.names or known]
    if output.machine:
        output.show([_record(report) for report in reports])
    else:
        _show(reports, output)
    return 0 if all(report.ok for report in reports) else 1


def _show(reports: list[Report], output: Output) -> None:
    numbers = ("weights", "on disk", "context", "serve / tune", "rate")
    show_table(
        output,
        ["base", "type", *numbers, "findings"],
        [
            [
                report.name,
                _type(report),
                f"{_parameters(report.parameters)} {','.join(report.dtypes)}".rstrip(),
                _size(report.size_bytes),
                "-" if report.context_tokens is None else f"{report.context_tokens:,}",
                _memory(report.serving_bytes, report.training_bytes),
                f"{report.learning_rate:g}",
                _verdict(report),
            ]
            for report in reports
        ],
        numbers=frozenset(numbers),
    )
    findings = [(report.name, finding) for report in reports for finding in report.findings]
    if findings:
        output.say()
    for name, finding in findings:
        output.say(f"{name}: {finding.level}: {finding.message}")


def _type(report: Report) -> str:
    """`llama` for what our own forward pass computes, `gpt2 (transformers)` for what another does."""
    foreign = report.forward_pass is ForwardPass.TRANSFORMERS
    return f"{report.model_type or '-'}{' (transformers)' if foreign else ''}"


def _verdict(report: Report) -> str:
    counts = Counter(finding.level for finding in report.findings)
    return ", ".join(f"{count} {level}{'s' if count > 1 else ''}" for level, count in sorted(counts.items())) or "none"


def _parameters(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "-"
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _memory(serving_bytes: int | None, training_bytes: int | None) -> str:
    if serving_bytes is None or training_bytes is None:
        return "-"
    return f"{serving_bytes / GIB:.1f} / {training_bytes / GIB:.1f} GiB"


def _record(report: Report) -> dict[str, Any]:
    return asdict(report) | {"ok": report.ok, "folder": str(report.folder)}
