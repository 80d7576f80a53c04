"""The flags of `wandb sync` and `export`. Those of `wandb sync` are the published ones, and a few more."""

from __future__ import annotations

from tunesmith.cli.flags.common import EVERYWHERE, Commands, add_group, add_name

PUBLISHED_PROJECT = "OpenAI-Fine-Tune"
TRACKERS = ("wandb", "trackio", "mlflow", "csv")


def add_wandb(commands: Commands) -> None:
    """`wandb sync`."""
    verbs = add_group(commands, "wandb", "Runs at Weights & Biases of jobs that have succeeded.")
    sync = verbs.add_parser(
        "sync",
        parents=[EVERYWHERE],
        help="Make runs of jobs that have succeeded: numbers, config, files.",
        description="Makes one run for each job, with every number of results.csv, the job as its config, its files "
        "and its model. Needs pip install 'tunesmith[wandb]'. With WANDB_MODE=offline runs are written to ./wandb.",
    )
    add_name(sync, "-i", "--id", of="job", help="The job to sync (default: all that have succeeded).")
    sync.add_argument(
        "-n", "--n_fine_tunes", type=int, metavar="N", help="Without an id: only the N most recent jobs (default: all)."
    )
    sync.add_argument("--project", default=PUBLISHED_PROJECT, help=f"Project at W&B (default: {PUBLISHED_PROJECT}).")
    sync.add_argument("--entity", help="User or team at W&B (default: that of the API key).")
    sync.add_argument("--force", action="store_true", help="Replace runs of the same job that are there already.")
    sync.add_argument("--legacy", action="store_true", help="As published; here it changes nothing.")
    sync.add_argument("--weights", action="store_true", help="Put the weights of the model into the run too.")
    sync.set_defaults(run="tunesmith.cli.tracking:sync")


def add_export(commands: Commands) -> None:
    """`export`."""
    export = commands.add_parser(
        "export",
        parents=[EVERYWHERE],
        help="Bring a job to a tracker: Weights & Biases, Trackio, MLflow, or a folder of CSV and JSON.",
        description="Brings a job that has succeeded to a tracker, with every number of results.csv, the job as its "
        "config, its files and its model. Each tracker but csv needs its package: pip install 'tunesmith[mlflow]'.",
    )
    add_name(export, "job", of="job", metavar="JOB", help="The job.")
    export.add_argument("--to", required=True, choices=TRACKERS, help="Where to.")
    export.add_argument("--project", default="tunesmith", help="Project or experiment there (default: tunesmith).")
    export.add_argument("--name", help="What the run is called there (default: the id of the job).")
    export.add_argument("--entity", help="User or team, where the tracker has such.")
    export.add_argument("--tag", action="append", default=[], metavar="TAG", help="A tag; may be given again.")
    export.add_argument(
        "--folder",
        help="Where on this machine it is kept (default: this folder for csv; else where the tracker's package and its "
        "variables say, such as MLFLOW_TRACKING_URI, TRACKIO_DIR and WANDB_DIR).",
    )
    export.add_argument("--force", action="store_true", help="Replace what is there of this job already.")
    export.add_argument("--weights", action="store_true", help="Take the weights of the model along.")
    export.set_defaults(run="tunesmith.cli.tracking:export")
