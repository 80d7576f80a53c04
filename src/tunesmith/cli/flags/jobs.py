"""The flags of `jobs`, `plan`, `complete` and `completion`."""

from __future__ import annotations

from tunesmith.cli.flags.common import EVERYWHERE, LISTING, Commands, add_group, add_name
from tunesmith.cli.flags.fine_tunes import add_fields, add_files


def add_jobs(commands: Commands) -> None:
    """`jobs` and its verbs."""
    verbs = add_group(commands, "jobs", "Fine-tune jobs: create, list, show, watch, pause, resume, cancel.")
    create = verbs.add_parser(
        "create",
        parents=[EVERYWHERE],
        help="Upload the files and make a job; with --wait, stay until it has ended.",
        description="Uploads local files, asks nothing, makes a job and shows its id. `tunesmith plan` takes the same "
        "flags and tells beforehand what the job will train with, take and cost.",
    )
    create.add_argument(
        "--wait",
        action="store_true",
        help="Watch the job until it has ended. Exit code 1 unless it has succeeded, 130 after Ctrl-C, which does not "
        "cancel it.",
    )
    add_files(create)
    add_fields(create)
    create.set_defaults(run="tunesmith.cli.jobs:create")

    listing = verbs.add_parser("list", parents=[LISTING], help="List the jobs, oldest first.")
    listing.set_defaults(run="tunesmith.cli.jobs:list_jobs")
    for name, text in (
        ("show", "Show what is known of a job."),
        ("cancel", "End a job that has not ended; what it trained is lost."),
        ("pause", "Let a job rest: it saves what it has and makes room for others."),
        ("resume", "Let a paused job go on."),
    ):
        verb = verbs.add_parser(name, parents=[EVERYWHERE], help=text, description=text)
        add_name(verb, "id", of="job", metavar="ID", help="The job, as in ft-abc123.")
        verb.set_defaults(run=f"tunesmith.cli.jobs:{name}")
    watch = verbs.add_parser(
        "watch",
        parents=[EVERYWHERE],
        help="Watch a job: its losses as a chart, rate, time left, cost, events.",
        description="Shows a job as it goes on until it has ended: a chart of its losses on a terminal, lines of text "
        "elsewhere, each event as JSON with --json. A connection that breaks is opened again where it was. Ctrl-C ends "
        "the watching, not the job. Exit code 1 if the job did not succeed.",
    )
    add_name(
        watch,
        "id",
        of="job",
        nargs="?",
        metavar="ID",
        help="The job (default: the one that is running, else the next one, else the last one).",
    )
    watch.set_defaults(run="tunesmith.cli.jobs:watch")


def add_plan(commands: Commands) -> None:
    """`plan`."""
    plan = commands.add_parser(
        "plan",
        parents=[EVERYWHERE],
        help="Tell what a fine-tune would train with, take and cost, before it is created.",
        description="Reads the files as the server would, refuses what it would refuse, and shows tokens, price, time, "
        "memory and every hyperparameter with the rule it comes from. Makes nothing. Needs no server for a local file "
        "and a base model.",
    )
    add_files(plan, "A local path, or the id of an uploaded file.")
    add_fields(plan)
    plan.add_argument("--home", help="Folder for everything that is kept (default: TUNESMITH_HOME or ~/.tunesmith).")
    plan.set_defaults(run="tunesmith.cli.plan:plan")


def add_complete(commands: Commands) -> None:
    """`complete`."""
    complete = commands.add_parser(
        "complete",
        parents=[EVERYWHERE],
        help="Let a model complete a prompt; with --show-probs, how sure it was of each token.",
        description="Shows what a model adds to a prompt, as it comes.",
    )
    complete.add_argument("prompt", nargs="?", metavar="PROMPT", help="The text to complete (default: standard input).")
    add_name(complete, "-m", "--model", of="model", required=True, help="The model.")
    complete.add_argument("-M", "--max-tokens", type=int, help="The most tokens to generate (default: 16).")
    complete.add_argument("-t", "--temperature", type=float, help="0 takes the most likely token (default: 1).")
    complete.add_argument(
        "-P", "--top_p", type=float, help="Sample among the most likely tokens of this total probability."
    )
    complete.add_argument("--stop", action="append", help="Text at which to stop; may be given up to four times.")
    complete.add_argument("--seed", type=int, help="The same seed gives the same text.")
    complete.add_argument(
        "--show-probs",
        action="store_true",
        help="Colour each token by its probability, and list every token with those that were likely in its place.",
    )
    complete.set_defaults(run="tunesmith.cli.complete:complete")


def add_completion(commands: Commands) -> None:
    """`completion`."""
    completion = commands.add_parser(
        "completion",
        parents=[EVERYWHERE],
        help="Print a script that makes a shell complete commands, flags and ids.",
        description='Prints a script for a shell\'s start-up file: `eval "$(tunesmith completion bash)"` in .bashrc or '
        "with zsh in .zshrc after compinit, `tunesmith completion fish | source` in config.fish. Ids of models, jobs "
        "and files come from the server if it answers within a second.",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="The shell.")
    completion.set_defaults(run="tunesmith.cli.completion:completion")
