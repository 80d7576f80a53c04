"""The flags of `tunesmith api`: the verbs of the published 0.28 command line, spelled and meant the same.

Source: docs of openai-python 0.28.1, `openai api --help`.
"""

from __future__ import annotations

import argparse

_FILE_KINDS = "This can be the id of an uploaded file (file-abc123), a local path, or a URL that starts with http."


def add_api(commands: argparse._SubParsersAction[argparse.ArgumentParser], everywhere: argparse.ArgumentParser) -> None:
    """Adds `api` and its verbs to the command line; `everywhere` holds the flags that every verb has."""
    api = commands.add_parser(
        "api", help="The verbs of the published command line: files, fine-tunes, completions, models."
    )
    verbs = api.add_subparsers(title="verbs", metavar="VERB", required=True)

    def add(name: str, run: str, text: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, parents=[everywhere], help=text, description=text)
        verb.set_defaults(run=f"tunesmith.cli.{run}")
        return verb

    def add_with_id(name: str, run: str, text: str, what: str) -> argparse.ArgumentParser:
        verb = add(name, run, text)
        verb.add_argument("-i", "--id", required=True, help=f"The id of the {what}.")
        return verb

    create = add("files.create", "api:create_file", "Upload a file.")
    create.add_argument("-f", "--file", required=True, help="File to upload.")
    create.add_argument("-p", "--purpose", required=True, help="What the file is for: fine-tune, for training data.")
    add_with_id("files.get", "api:get_file", "Show a file object.", "file")
    add_with_id("files.delete", "api:delete_file", "Delete a file.", "file")
    add("files.list", "api:list_files", "List the files.")

    _add_fine_tune_create(add("fine_tunes.create", "fine_tunes:create", "Fine-tune a model, and follow the job."))
    add_with_id("fine_tunes.follow", "fine_tunes:follow", "Show the events of a job as they come.", "fine-tune job")
    add("fine_tunes.list", "fine_tunes:list_jobs", "List the fine-tune jobs.")
    add_with_id("fine_tunes.get", "fine_tunes:get", "Show a fine-tune job.", "fine-tune job")
    add_with_id("fine_tunes.cancel", "fine_tunes:cancel", "Cancel a fine-tune job.", "fine-tune job")
    add_with_id(
        "fine_tunes.pause",
        "fine_tunes:pause",
        "Let a job rest: it saves what it has and makes room for others. Our own.",
        "fine-tune job",
    )
    add_with_id("fine_tunes.resume", "fine_tunes:resume", "Let a paused job go on. Our own.", "fine-tune job")
    add_with_id(
        "fine_tunes.checkpoints",
        "fine_tunes:checkpoints",
        "List the epochs of a job that became models of their own. Our own.",
        "fine-tune job",
    )
    events = add_with_id("fine_tunes.events", "fine_tunes:events", "Show the events so far.", "fine-tune job")
    events.add_argument("-s", "--stream", action="store_true", help="No longer: use fine_tunes.follow.")
    add_with_id("fine_tunes.results", "fine_tunes:results", "Show results.csv, one row per step.", "fine-tune job")
    add_with_id("fine_tunes.delete", "fine_tunes:delete", "Delete a fine-tune job.", "fine-tune job")

    _add_completion_create(add("completions.create", "api:create_completion", "Complete a prompt."))

    add("models.list", "api:list_models", "List the models.")
    add_with_id("models.get", "api:get_model", "Show a model.", "model")
    add_with_id("models.delete", "api:delete_model", "Delete a fine-tuned model; needs the role owner.", "model")
    add("engines.list", "api:list_engines", "List the models under their old name, engines.")
    add_with_id("engines.get", "api:get_engine", "Show an engine.", "engine")


def _add_fine_tune_create(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-t", "--training_file", required=True, help=f"JSONL file to train on. {_FILE_KINDS}")
    verb.add_argument("-v", "--validation_file", help=f"JSONL file to validate with. {_FILE_KINDS}")
    verb.add_argument(
        "--no_check_if_files_exist",
        dest="check_if_files_exist",
        action="store_false",
        help="Upload local files at once, without looking for one of the same name and size on the server.",
    )
    verb.add_argument("-m", "--model", help="The model to start from: a base, or a fine-tuned model.")
    verb.add_argument(
        "--suffix",
        help="Up to 40 characters that go into the name of the tuned model, lower-cased and with dashes for "
        "punctuation and spaces: ada:ft-your-org:custom-model-name-2022-02-15-04-21-04.",
    )
    verb.add_argument("--no_follow", action="store_true", help="Return once the job is created; do not follow it.")
    verb.add_argument("--n_epochs", type=int, help="How often to go through the training file.")
    verb.add_argument("--batch_size", type=int, help="Examples per step.")
    verb.add_argument(
        "--learning_rate_multiplier", type=float, help="The learning rate is the base's own times this value."
    )
    verb.add_argument(
        "--prompt_loss_weight", type=float, help="Weight of prompt tokens in the loss; completion tokens weigh 1."
    )
    verb.add_argument(
        "--compute_classification_metrics",
        action="store_true",
        default=None,
        help="Measure accuracy, F1 and the like on the validation file after every epoch.",
    )
    verb.add_argument("--classification_n_classes", type=int, help="Number of classes; needed for more than two.")
    verb.add_argument(
        "--classification_positive_class", help="The class that precision, recall and F1 are about, for two classes."
    )
    verb.add_argument(
        "--classification_betas", type=float, nargs="+", help="Also give F-beta scores for these values of beta."
    )
    verb.add_argument("--seed", type=int, help="Seed of everything random; equal jobs give equal models (default: 0).")
    verb.add_argument("--lora_rank", type=int, help="Rank of the adapter, from 1 to 256 (default: 32).")
    verb.add_argument(
        "--lora_alpha", type=float, help="The adapter is scaled by this over its rank (default: 16 times the rank)."
    )
    verb.add_argument(
        "--lora_targets",
        nargs="+",
        metavar="MODULE",
        help="What the adapter covers, as in q_proj v_proj (default: every linear layer, and the embedding).",
    )
    verb.add_argument(
        "--method",
        choices=("lora", "full"),
        help="Train an adapter (lora, the default) or all weights of the model (full).",
    )
    verb.add_argument(
        "--best_epoch",
        action="store_true",
        default=None,
        help="Keep the epoch with the lowest loss on the validation file instead of the last.",
    )
    verb.add_argument(
        "--early_stopping_patience",
        type=int,
        help="End after this many epochs in which the loss on the validation file did not fall any lower.",
    )
    verb.add_argument(
        "--epoch_checkpoints",
        type=int,
        help="Make models of this many of the last epochs too; their names end in :ckpt-step-N.",
    )


def _add_completion_create(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-e", "--engine", help="The model, under its old name.")
    verb.add_argument("-m", "--model", help="The model.")
    verb.add_argument("--stream", action="store_true", help="Show tokens as they come.")
    verb.add_argument("-p", "--prompt", help="The text to complete.")
    verb.add_argument("-M", "--max-tokens", type=int, help="The most tokens to generate.")
    verb.add_argument(
        "-t", "--temperature", type=float, help="0 takes the most likely token; 0.9 is for creative work."
    )
    verb.add_argument(
        "-P", "--top_p", type=float, help="Sample among the most likely tokens of this total probability."
    )
    verb.add_argument("-n", "--n", type=int, help="How many completions.")
    verb.add_argument(
        "--logprobs", type=int, help="Log-probabilities of this many tokens at each place, shown with --json."
    )
    verb.add_argument("--stop", help="Text at which to stop; it is not shown.")
