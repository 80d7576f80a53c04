"""The flags of `prepare`, its published name `tools fine_tunes.prepare_data`, and `doctor`."""

from __future__ import annotations

from tunesmith.cli.flags.common import EVERYWHERE, Commands, add_group


def add_prepare(commands: Commands) -> None:
    """One command under two names: `tools fine_tunes.prepare_data -f FILE`, as published, and `prepare FILE`."""
    description = (
        "Reads a file of prompts and completions, says what would hurt a fine-tune, offers to mend it, and writes "
        "JSONL ready to train on beside it. The file itself stays as it is. Needs no server."
    )
    verbs = add_group(commands, "tools", "The tools of the published command line: preparing training data.")
    published = verbs.add_parser(
        "fine_tunes.prepare_data", parents=[EVERYWHERE], help="The same as `prepare`.", description=description
    )
    published.add_argument("-f", "--file", required=True, help="CSV, TSV, XLSX, JSON, JSONL or TXT file to prepare.")
    own = commands.add_parser(
        "prepare",
        parents=[EVERYWHERE],
        help="Check and mend training data: CSV, TSV, XLSX, JSON, JSONL or TXT to JSONL ready to train on.",
        description=description,
    )
    own.add_argument("file", metavar="FILE", help="CSV, TSV, XLSX, JSON, JSONL or TXT file to prepare.")
    for verb in (published, own):
        verb.add_argument("-q", "--quiet", action="store_true", help="Take every suggestion; ask nothing.")
        verb.add_argument("--prompt-column", metavar="NAME", help="Column/key to read prompts from (default: prompt).")
        verb.add_argument(
            "--completion-column", metavar="NAME", help="Column/key to read completions from (default: completion)."
        )
        verb.add_argument("--sheet", metavar="NAME", help="Sheet of a workbook to read (default: the first).")
        verb.add_argument(
            "-m",
            "--model",
            default="ada",
            help="Base model whose tokens are counted and whose length is the limit (default: ada).",
        )
        verb.add_argument(
            "--split",
            choices=["stratified", "random", "none"],
            default="stratified",
            help="How validation rows are chosen where the rows look like classification: as many of each class as it "
            "has and equal prompts on one side; as the published command does; or not at all (default: stratified).",
        )
        verb.add_argument(
            "--exact-tokens",
            action="store_true",
            help="Count the tokens of large files whole too; otherwise those of a part, from 16 MiB on.",
        )
        verb.add_argument(
            "--home", help="Folder for everything that is kept (default: TUNESMITH_HOME or ~/.tunesmith)."
        )
        verb.set_defaults(run="tunesmith.cli.prepare:prepare")


def add_doctor(commands: Commands) -> None:
    """`doctor`."""
    doctor = commands.add_parser(
        "doctor",
        parents=[EVERYWHERE],
        help="Look for what hurts a fine-tune: overlap, contradictions, lost separators, secrets and more.",
        description="Reads training data, and validation data if there is some, and says what is odd about it, row by "
        "row. Needs no server, and without --fix writes nothing. Exit code 1 if anything is worse than a note, or was "
        "not mended.",
    )
    doctor.add_argument("file", metavar="FILE", help="Training data: JSONL, or any format that `prepare` reads.")
    doctor.add_argument("-v", "--validation-file", metavar="FILE", help="Validation data of the same job.")
    doctor.add_argument(
        "--fix",
        action="store_true",
        help="Show as a diff what can be mended without a person, ask, and write NAME_fixed.jsonl beside each file.",
    )
    doctor.add_argument(
        "--only",
        action="append",
        metavar="ID",
        default=[],
        help="With --fix: mend this finding; may be repeated (default: all that no person has to decide).",
    )
    doctor.add_argument(
        "--in-place",
        action="store_true",
        help="With --fix: write JSONL files anew; what they were is kept beside them as NAME.orig.",
    )
    doctor.add_argument("-y", "--yes", action="store_true", help="With --fix: write without asking.")
    doctor.add_argument("--undo", action="store_true", help="Put back what the last --fix --in-place has replaced.")
    doctor.add_argument("-m", "--model", default="ada", help="Base model whose tokens are judged by (default: ada).")
    doctor.add_argument("--prompt-column", metavar="NAME", help="Column/key to read prompts from (default: prompt).")
    doctor.add_argument(
        "--completion-column", metavar="NAME", help="Column/key to read completions from (default: completion)."
    )
    doctor.add_argument("--sheet", metavar="NAME", help="Sheet of a workbook to read (default: the first).")
    doctor.add_argument("--home", help="Folder for everything that is kept (default: TUNESMITH_HOME or ~/.tunesmith).")
    doctor.set_defaults(run="tunesmith.cli.doctor:doctor")
