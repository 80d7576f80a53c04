"""The flags that say what a fine-tune is: its files and its fields, for every command that makes or plans one."""

from __future__ import annotations

import argparse

from tunesmith.cli.flags.common import add_name

_FILE_KINDS = "This can be the id of an uploaded file (file-abc123), a local path, or a URL that starts with http."


def add_files(parser: argparse.ArgumentParser, kinds: str = _FILE_KINDS) -> None:
    """Training and validation file."""
    parser.add_argument("-t", "--training_file", required=True, help=f"JSONL file to train on. {kinds}")
    parser.add_argument("-v", "--validation_file", help=f"JSONL file to validate with. {kinds}")


def add_fields(parser: argparse.ArgumentParser) -> None:
    """Every field of a job but its files; each flag is spelled as the field. See docs/fine-tuning.md."""
    add_name(parser, "-m", "--model", of="model", help="The model to start from: a base, or a fine-tuned model.")
    parser.add_argument(
        "--suffix",
        help="Up to 40 characters that go into the name of the tuned model, lower-cased and with dashes for "
        "punctuation and spaces: ada:ft-your-org:custom-model-name-2022-02-15-04-21-04.",
    )
    parser.add_argument("--n_epochs", type=int, help="How often to go through the training file.")
    parser.add_argument("--batch_size", type=int, help="Examples per step.")
    parser.add_argument(
        "--learning_rate_multiplier", type=float, help="The learning rate is the base's own times this value."
    )
    parser.add_argument(
        "--prompt_loss_weight", type=float, help="Weight of prompt tokens in the loss; completion tokens weigh 1."
    )
    _add_classification(parser)
    parser.add_argument(
        "--seed", type=int, help="Seed of everything random; equal jobs give equal models (default: 0)."
    )
    _add_method(parser)
    _add_epochs(parser)
    parser.add_argument(
        "--wandb",
        metavar="PROJECT",
        help="Have Weights & Biases follow the job, in this project; more of it over HTTP: docs/tracking.md.",
    )
    parser.add_argument(
        "--alias", metavar="NAME", help="Another name for the model, such as the one that it had elsewhere."
    )


def _add_classification(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compute_classification_metrics",
        action="store_true",
        default=None,
        help="Measure accuracy, F1 and the like on the validation file after every epoch.",
    )
    parser.add_argument("--classification_n_classes", type=int, help="Number of classes; needed for more than two.")
    parser.add_argument(
        "--classification_positive_class", help="The class that precision, recall and F1 are about, for two classes."
    )
    parser.add_argument(
        "--classification_betas", type=float, nargs="+", help="Also give F-beta scores for these values of beta."
    )


def _add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lora_rank", type=int, help="Rank of the adapter, from 1 to 256 (default: 32).")
    parser.add_argument(
        "--lora_alpha", type=float, help="The adapter is scaled by this over its rank (default: 16 times the rank)."
    )
    parser.add_argument(
        "--lora_targets",
        nargs="+",
        metavar="MODULE",
        help="What the adapter covers, as in q_proj v_proj (default: every linear layer, and the embedding).",
    )
    parser.add_argument(
        "--method",
        choices=("lora", "full"),
        help="Train an adapter (lora, the default) or all weights of the model (full).",
    )


def _add_epochs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--best_epoch",
        action="store_true",
        default=None,
        help="Keep the epoch with the lowest loss on the validation file instead of the last.",
    )
    parser.add_argument(
        "--early_stopping_patience",
        type=int,
        help="End after this many epochs in which the loss on the validation file did not fall any lower.",
    )
    parser.add_argument(
        "--epoch_checkpoints",
        type=int,
        help="Make models of this many of the last epochs too; their names end in :ckpt-step-N.",
    )
