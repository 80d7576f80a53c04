"""The flags of `import`."""

from __future__ import annotations

from tunesmith.cli.flags.common import EVERYWHERE, Commands, add_group


def add_import(commands: Commands) -> None:
    """`import openai-export`."""
    verbs = add_group(commands, "import", "Bring what was saved from elsewhere: files, jobs, names of models.")
    export = verbs.add_parser(
        "openai-export",
        parents=[EVERYWHERE],
        help="Bring files and fine-tunes saved from an OpenAI account.",
        description="Reads a folder of saved objects (files, fine-tunes, jobs, events) and contents, uploads the files "
        "that are not here yet, and with --retrain trains each model again with its own hyperparameters; its old name "
        "then answers with the new model. Doing it again changes nothing. What is left out is named with its reason.",
    )
    export.add_argument("folder", metavar="DIR", help="The folder. What it may hold: docs/coming-home.md.")
    export.add_argument("--dry-run", action="store_true", help="Only show what would come; the server is only asked.")
    export.add_argument("--retrain", action="store_true", help="Start the fine-tunes again, under their old names.")
    export.add_argument(
        "--base",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="Retrain what was trained from OLD on the base NEW, as in gpt-3.5-turbo-0613=curie; may be given again "
        "(default: the base of the same name; babbage-002 and davinci-002 without their number).",
    )
    export.set_defaults(run="tunesmith.cli.importing:import_openai_export")
