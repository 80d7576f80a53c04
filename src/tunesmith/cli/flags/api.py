"""The flags of `tunesmith api`: the verbs of the published 0.28 command line, spelled and meant the same.

Source: docs of openai-python 0.28.1, `openai api --help`.
"""

from __future__ import annotations

import argparse
from typing import Literal

from tunesmith.cli.flags.common import EVERYWHERE, LISTING, Commands, add_group, add_name
from tunesmith.cli.flags.fine_tunes import add_fields, add_files

REFUSED = {
    "fine_tuning.job.follow": "the published command line refuses it too; fine_tunes.follow does it",
    "deployments.list": "deployments belong to Azure; models.list shows what can be called",
    "deployments.get": "deployments belong to Azure; models.get shows a model",
    "deployments.create": "deployments belong to Azure; a model can be called here once it is there",
    "deployments.delete": "deployments belong to Azure; models.delete deletes a model",
    "image.create": "no model here makes images",
    "image.create_edit": "no model here makes images",
    "image.create_variation": "no model here makes images",
    "audio.transcribe": "no model here hears",
    "audio.translate": "no model here hears",
}
"""Verbs of the published command line that are not here -> why, and what to use instead."""


def add_api(commands: Commands) -> None:
    """`api` and its verbs."""
    verbs = add_group(
        commands, "api", "The verbs of the published command line: files, fine-tunes, completions, models."
    )

    def add(name: str, run: str, text: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, parents=[EVERYWHERE], help=text, description=text)
        verb.set_defaults(run=f"tunesmith.cli.{run}")
        return verb

    def add_list(name: str, run: str, text: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, parents=[LISTING], help=text, description=text)
        verb.set_defaults(run=f"tunesmith.cli.{run}")
        return verb

    def with_id(verb: argparse.ArgumentParser, of: Literal["job", "model", "file"]) -> argparse.ArgumentParser:
        what = {"job": "fine-tune job", "model": "model", "file": "file"}[of]
        add_name(verb, "-i", "--id", of=of, required=True, help=f"The id of the {what}.")
        return verb

    create = add("files.create", "api:create_file", "Upload a file. It is named on the server as typed here.")
    create.add_argument("-f", "--file", required=True, help="File to upload.")
    create.add_argument("-p", "--purpose", required=True, help="What the file is for: fine-tune, for training data.")
    with_id(add("files.get", "api:get_file", "Show a file object."), "file")
    with_id(add("files.delete", "api:delete_file", "Delete a file."), "file")
    add_list("files.list", "api:list_files", "List the files.")

    _add_fine_tune_create(add("fine_tunes.create", "fine_tunes:create", "Fine-tune a model, and follow the job."))
    with_id(add("fine_tunes.follow", "fine_tunes:follow", "Show the events of a job as they come."), "job")
    add_list("fine_tunes.list", "fine_tunes:list_jobs", "List the fine-tune jobs.")
    with_id(add("fine_tunes.get", "fine_tunes:get", "Show a fine-tune job."), "job")
    with_id(add("fine_tunes.cancel", "fine_tunes:cancel", "Cancel a fine-tune job."), "job")
    rest = "Let a job rest: it saves what it has and makes room for others. Our own."
    with_id(add("fine_tunes.pause", "fine_tunes:pause", rest), "job")
    with_id(add("fine_tunes.resume", "fine_tunes:resume", "Let a paused job go on. Our own."), "job")
    snapshots = "List the epochs of a job that became models of their own. Our own."
    with_id(add_list("fine_tunes.checkpoints", "fine_tunes:checkpoints", snapshots), "job")
    events = with_id(add_list("fine_tunes.events", "fine_tunes:events", "Show the events so far."), "job")
    events.add_argument("-s", "--stream", action="store_true", help="No longer: use fine_tunes.follow.")
    with_id(add("fine_tunes.results", "fine_tunes:results", "Show results.csv, one row per step."), "job")
    with_id(add("fine_tunes.delete", "fine_tunes:delete", "Delete a fine-tune job."), "job")

    since_2023 = "in the shape of late 2023"
    add_list("fine_tuning.job.list", "fine_tuning_jobs:list_jobs", f"List the jobs {since_2023}, newest first.")
    _add_job_create(add("fine_tuning.job.create", "fine_tuning_jobs:create", f"Make a job, shown {since_2023}."))
    with_id(add("fine_tuning.job.get", "fine_tuning_jobs:get", f"Show a job {since_2023}."), "job")
    with_id(add("fine_tuning.job.cancel", "fine_tuning_jobs:cancel", f"Cancel a job, shown {since_2023}."), "job")
    newest = with_id(
        add_list("fine_tuning.job.events", "fine_tuning_jobs:events", f"List the events of a job {since_2023}."), "job"
    )
    newest.add_argument("--limit", type=int, help="So many of them, the newest first (default: all).")
    with_id(add("fine_tuning.job.results", "fine_tunes:results", "The same as fine_tunes.results."), "job")

    _add_completion_create(add("completions.create", "api:create_completion", "Complete a prompt."))
    _add_chat_create(add("chat_completions.create", "api:create_chat_completion", "Answer in a conversation."))

    add_list("models.list", "api:list_models", "List the models.")
    with_id(add("models.get", "api:get_model", "Show a model."), "model")
    owner = "Delete a fine-tuned model; needs the role owner."
    with_id(add("models.delete", "api:delete_model", owner), "model")
    add_list("engines.list", "api:list_engines", "List the models under their old name, engines.")
    with_id(add("engines.get", "api:get_engine", "Show an engine, with how many copies of it are loaded."), "model")
    update = with_id(add("engines.update", "api:update_engine", "Load the model of an engine."), "model")
    update.add_argument("-r", "--replicas", type=int, help="1 loads the model now; the server runs one copy of each.")
    _add_engine_generate(add("engines.generate", "api:generate", "Complete a text as in 2020, before completions."))

    for name in REFUSED:
        # Whatever flags follow are words like any other: nobody is to be told that one of them is wrong.
        refused = verbs.add_parser(name, add_help=False, prefix_chars="\0")
        refused.add_argument("words", nargs="*")
        refused.set_defaults(run="tunesmith.cli.api:refuse", verb=name)


def _add_fine_tune_create(verb: argparse.ArgumentParser) -> None:
    add_files(verb)
    _add_no_check(verb)
    verb.add_argument("--no_follow", action="store_true", help="Return once the job is created; do not follow it.")
    add_fields(verb)


def _add_job_create(verb: argparse.ArgumentParser) -> None:
    add_files(verb)
    _add_no_check(verb)
    add_name(verb, "-m", "--model", of="model", help="The model to start from: a base, or a fine-tuned model.")
    verb.add_argument("--suffix", help="Up to 64 characters that go into the name of the tuned model.")
    verb.add_argument("--n_epochs", type=int, help="How often to go through the training file.")


def _add_no_check(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--no_check_if_files_exist",
        dest="check_if_files_exist",
        action="store_false",
        help="Upload local files at once, without looking for one of the same name and size on the server.",
    )


def _add_completion_create(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-e", "--engine", help="The model, under its old name.")
    add_name(verb, "-m", "--model", of="model", help="The model.")
    verb.add_argument("-p", "--prompt", help="The text to complete.")
    verb.add_argument(
        "--logprobs", type=int, help="Log-probabilities of this many tokens at each place, shown with --json."
    )
    _add_sampling(verb)


def _add_chat_create(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "-g",
        "--message",
        action="append",
        nargs=2,
        metavar=("ROLE", "CONTENT"),
        required=True,
        help="A message: who says it (system, user or assistant), and what. Give one for each.",
    )
    either = verb.add_mutually_exclusive_group()
    either.add_argument("-e", "--engine", help="The model, under its old name.")
    add_name(either, "-m", "--model", of="model", help="The model.")
    _add_sampling(verb)


def _add_engine_generate(verb: argparse.ArgumentParser) -> None:
    add_name(verb, "-i", "--id", of="model", required=True, help="The id of the engine: a model.")
    verb.add_argument("-c", "--context", help="The text to go on from.")
    verb.add_argument(
        "--logprobs", type=int, help="Log-probabilities of this many tokens at each place, shown with --json."
    )
    add_name(verb, "-m", "--model", of="model", help="A model tuned from the engine (default: the engine itself).")
    _add_sampling(verb, length=("-l", "--length"), top_p=("-p", "--top_p"), how_many=("-n", "--completions"))


def _add_sampling(
    verb: argparse.ArgumentParser,
    *,
    length: tuple[str, str] = ("-M", "--max-tokens"),
    top_p: tuple[str, str] = ("-P", "--top_p"),
    how_many: tuple[str, str] = ("-n", "--n"),
) -> None:
    verb.add_argument("--stream", action="store_true", help="Show tokens as they come.")
    verb.add_argument(*length, type=int, help="The most tokens to generate.")
    verb.add_argument(
        "-t", "--temperature", type=float, help="0 takes the most likely token; 0.9 is for creative work."
    )
    verb.add_argument(*top_p, type=float, help="Sample among the most likely tokens of this total probability.")
    verb.add_argument(*how_many, type=int, help="How many completions.")
    verb.add_argument("--stop", help="Text at which to stop; it is not shown.")
