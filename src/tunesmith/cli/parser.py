"""The flags of every command, with no import beyond the standard library: help answers in a few hundredths of a second.

Each command names the function that runs it as "module:function"; `main` loads it. Why argparse and not a library:
docs/design/decisions/cli.md.
"""

from __future__ import annotations

import argparse

from tunesmith import __version__
from tunesmith.cli.legacy import add_api

EXIT_CODES = "exit codes: 0 done, 1 the server refused or the job failed, 2 wrong usage, 130 interrupted"


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="tunesmith",
        description="Fine-tune and serve language models on your own machine, behind OpenAI's API.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("-V", "--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "-v", "--verbose", action="count", dest="verbosity", default=0, help="Log more; twice for everything."
    )
    parser.add_argument(
        "-b",
        "--api-base",
        help="Base URL of the server, with /v1. Otherwise the first that is set of TUNESMITH_BASE_URL, "
        "OPENAI_BASE_URL and OPENAI_API_BASE; otherwise http://127.0.0.1:8000/v1.",
    )
    parser.add_argument(
        "-k",
        "--api-key",
        help="API key. Otherwise OPENAI_API_KEY; otherwise, for a server on this machine, the owner key "
        "in its home folder.",
    )
    parser.add_argument(
        "-p",
        "--proxy",
        nargs="+",
        default=[],
        help="HTTP proxies to reach the server through; one that starts with https is for https servers. Another flag "
        "has to follow, as with the published command line, since this one takes every word after it.",
    )
    parser.add_argument("-o", "--organization", help="Sent along as the OpenAI-Organization header.")
    parser.add_argument("--json", action="store_true", help="JSON on standard output, and nothing else.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="JSON on standard output, and nothing else."
    )
    _add_serve(commands, everywhere)
    _add_demo(commands, everywhere)
    _add_keys(commands, everywhere)
    _add_models(commands, everywhere)
    _add_prepare(commands, everywhere)
    _add_doctor(commands, everywhere)
    add_api(commands, everywhere)
    return parser


Commands = argparse._SubParsersAction  # the only name argparse has for what add_subparsers returns


def _add_serve(commands: Commands[argparse.ArgumentParser], everywhere: argparse.ArgumentParser) -> None:
    serve = commands.add_parser(
        "serve",
        parents=[everywhere],
        help="Start the server: API, training and generation.",
        description="Start the server. Every flag may also be given as TUNESMITH_<FLAG>, for example TUNESMITH_HOME. "
        "The first start makes an owner key, shows it once and keeps it in <home>/owner.key.",
    )
    serve.add_argument("--home", help="Folder for everything that is kept (default: ~/.tunesmith).")
    serve.add_argument(
        "--host", help="Address to listen on (default: 127.0.0.1). Any other than loopback needs TUNESMITH_OWNER_KEY."
    )
    serve.add_argument("--port", help="Port to listen on; 0 takes a free one (default: 8000).")
    serve.add_argument(
        "--organization",
        dest="organization_title",
        help="Title of the organisation that the first start creates; it stands in model names (default: personal).",
    )
    serve.add_argument(
        "--max-concurrent-runs",
        help="How many trainers work at once, each on one job or several small ones (default: 1).",
    )
    serve.set_defaults(run="tunesmith.cli.serve:serve")


def _add_demo(commands: Commands[argparse.ArgumentParser], everywhere: argparse.ArgumentParser) -> None:
    demo = commands.add_parser(
        "demo",
        parents=[everywhere],
        help="Fine-tune a small model on real tweets, end to end, in a few minutes.",
        description="Starts a server of its own on a free port, fine-tunes ada to tell positive from negative tweets, "
        "and compares it with the base model on tweets it has not seen. Nothing is left running.",
    )
    demo.add_argument(
        "--home", default=".demo", help="Folder the demo works in (default: ./.demo); it stays afterwards."
    )
    demo.add_argument(
        "--keep", action="store_true", help="Go on in the home of an earlier demo instead of starting it afresh."
    )
    demo.set_defaults(run="tunesmith.cli.demo:demo")


def _add_keys(commands: Commands[argparse.ArgumentParser], everywhere: argparse.ArgumentParser) -> None:
    keys = commands.add_parser("keys", help="API keys of the organisation.")
    verbs = keys.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = verbs.add_parser("list", parents=[everywhere], help="List the keys; secrets are never shown again.")
    listing.set_defaults(run="tunesmith.cli.keys:list_keys")
    create = verbs.add_parser("create", parents=[everywhere], help="Make a key and show its secret, once.")
    create.add_argument(
        "--role",
        choices=["owner", "member"],
        default="member",
        help="Owners may delete models and manage keys (default: member).",
    )
    create.add_argument("--name", required=True, help="What the key is for, for people.")
    create.set_defaults(run="tunesmith.cli.keys:create_key")
    revoke = verbs.add_parser("revoke", parents=[everywhere], help="End a key at once.")
    revoke.add_argument("-i", "--id", required=True, help="Id of the key, from `tunesmith keys list`.")
    revoke.set_defaults(run="tunesmith.cli.keys:revoke_key")


def _add_models(commands: Commands[argparse.ArgumentParser], everywhere: argparse.ArgumentParser) -> None:
    models = commands.add_parser(
        "models",
        parents=[everywhere],
        help="Models: list them, export and import weights, pull and check base models.",
        description="Without a command: the same as list.",
    )
    models.set_defaults(run="tunesmith.cli.models:list_models")
    verbs = models.add_subparsers(title="commands", metavar="COMMAND")
    listing = verbs.add_parser(
        "list",
        parents=[everywhere],
        help="List the models that can be called and tuned, and what stands behind each.",
    )
    listing.set_defaults(run="tunesmith.cli.models:list_models")

    export = verbs.add_parser(
        "export",
        parents=[everywhere],
        help="Write the weights of a model as a zip.",
        description="By default what was trained: an adapter in PEFT's format, or a whole checkpoint where all weights "
        "were. Both are safetensors that other engines load.",
    )
    export.add_argument("model", metavar="MODEL", help="Name of the model.")
    export.add_argument(
        "--format", choices=["adapter", "merged"], help="The adapter alone, or a checkpoint with the adapter in it."
    )
    export.add_argument("-o", "--output", metavar="FILE", help="File to write (default: the model's name, .zip).")
    export.set_defaults(run="tunesmith.cli.models:export_model")

    importing = verbs.add_parser(
        "import",
        parents=[everywhere],
        help="Make a model of weights from elsewhere: a LoRA adapter of PEFT, or a checkpoint.",
        description="Safetensors only. The engine loads the model before it is taken: one that does not fit its base "
        "is refused with the reason.",
    )
    importing.add_argument("path", metavar="PATH", help="Folder or zip of the adapter or the checkpoint.")
    importing.add_argument("--base", required=True, help="The base that the weights are for.")
    importing.add_argument("--suffix", help="Up to 40 characters that go into the name of the model.")
    importing.set_defaults(run="tunesmith.cli.models:import_model")

    pull = verbs.add_parser(
        "pull",
        parents=[everywhere],
        help="Make a model of the model hub a base: download, verify and pin it.",
        description="Downloads safetensors, config and tokenizer, verifies every digest, and writes the base to "
        "<home>/bases.toml with its commit pinned. Broken off, the same command goes on where it was. HF_TOKEN opens "
        "gated and private models, HF_ENDPOINT names another hub. No other command downloads anything.",
    )
    pull.add_argument(
        "repository",
        nargs="?",
        metavar="ORG/NAME",
        help="The model on the hub; without it, every hub model of bases.toml that is not here yet.",
    )
    pull.add_argument("--revision", help="Commit, branch or tag (default: main); the commit it means now is pinned.")
    pull.add_argument(
        "--as",
        dest="alias",
        metavar="NAME",
        help="What the base is called; ada, babbage, curie or davinci put it in place of the one in the box "
        "(default: after the repository).",
    )
    pull.add_argument("--home", help="Folder for everything that is kept (default: TUNESMITH_HOME or ~/.tunesmith).")
    pull.set_defaults(run="tunesmith.cli.pull:pull_models")

    check = verbs.add_parser(
        "check",
        parents=[everywhere],
        help="Check base models: files, digests, tokenizer, forward pass, memory.",
        description="Looks at the base models of a home folder without a server and without loading weights. Exit code "
        "1 if anything is wrong with one of them.",
    )
    check.add_argument("names", nargs="*", metavar="NAME", help="Bases to check (default: all).")
    check.add_argument("--home", help="Folder for everything that is kept (default: TUNESMITH_HOME or ~/.tunesmith).")
    check.set_defaults(run="tunesmith.cli.check:check")


def _add_prepare(commands: Commands[argparse.ArgumentParser], everywhere: argparse.ArgumentParser) -> None:
    """One command under two names: `tools fine_tunes.prepare_data -f FILE`, as published, and `prepare FILE`."""
    description = (
        "Reads a file of prompts and completions, says what would hurt a fine-tune, offers to mend it, and writes "
        "JSONL ready to train on beside it. The file itself stays as it is. Needs no server."
    )
    tools = commands.add_parser("tools", help="The tools of the published command line: preparing training data.")
    verbs = tools.add_subparsers(title="tools", metavar="TOOL", required=True)
    published = verbs.add_parser(
        "fine_tunes.prepare_data", parents=[everywhere], help="The same as `prepare`.", description=description
    )
    published.add_argument("-f", "--file", required=True, help="CSV, TSV, XLSX, JSON, JSONL or TXT file to prepare.")
    own = commands.add_parser(
        "prepare",
        parents=[everywhere],
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


def _add_doctor(commands: Commands[argparse.ArgumentParser], everywhere: argparse.ArgumentParser) -> None:
    doctor = commands.add_parser(
        "doctor",
        parents=[everywhere],
        help="Look for what hurts a fine-tune: overlap, contradictions, lost separators, secrets and more.",
        description="Reads training data, and validation data if there is some, and says what is odd about it, row by "
        "row. Writes nothing and needs no server. Exit code 1 if anything is worse than a note.",
    )
    doctor.add_argument("file", metavar="FILE", help="Training data: JSONL, or any format that `prepare` reads.")
    doctor.add_argument("-v", "--validation-file", metavar="FILE", help="Validation data of the same job.")
    doctor.add_argument("-m", "--model", default="ada", help="Base model whose tokens are judged by (default: ada).")
    doctor.add_argument("--prompt-column", metavar="NAME", help="Column/key to read prompts from (default: prompt).")
    doctor.add_argument(
        "--completion-column", metavar="NAME", help="Column/key to read completions from (default: completion)."
    )
    doctor.add_argument("--sheet", metavar="NAME", help="Sheet of a workbook to read (default: the first).")
    doctor.add_argument("--home", help="Folder for everything that is kept (default: TUNESMITH_HOME or ~/.tunesmith).")
    doctor.set_defaults(run="tunesmith.cli.doctor:doctor")
