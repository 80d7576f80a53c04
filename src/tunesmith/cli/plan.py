"""`tunesmith plan`: what a fine-tune would train with, take and cost, by the server's rules, before there is one."""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.api.body import Fields
from tunesmith.api.fine_tunes import request_from_wire
from tunesmith.cli.connection import connect
from tunesmith.cli.datafile import base_and_folder, watching
from tunesmith.cli.home import home_settings
from tunesmith.cli.jobs import fields_of
from tunesmith.cli.output import Output, UsageError
from tunesmith.cli.pace import speed
from tunesmith.cli.tables import show_table
from tunesmith.client import ServerUnreachable
from tunesmith.core import requests
from tunesmith.core.admission import admit
from tunesmith.core.base_check import check_base as report_on
from tunesmith.core.base_fit import chat, check_base, count_all_tokens, count_tokens
from tunesmith.core.bases import Bases
from tunesmith.core.requests import FineTuneRequest, Start
from tunesmith.data.advice import duration
from tunesmith.data.analysis import Progress
from tunesmith.data.formats import Chat, Example, read_examples, split_lines
from tunesmith.errors import InvalidRequest
from tunesmith.rundir import ResolvedHyperparameters, steps_of
from tunesmith.tokenizer import Tokenizer

GIB = 1 << 30
READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of a job that was not made."""

    model: str
    base: str
    training_file: str
    validation_file: str | None
    examples: int
    tokens: int
    """Of the training file, once through."""
    trained_tokens: int
    steps: int
    cost_usd: float
    tokens_per_s: float
    tokens_per_s_measured: bool
    """Whether earlier fine-tunes of this base have shown it; otherwise it is guessed from the processor."""
    tokens_per_s_because: str
    training_s: float
    memory_bytes: int | None
    """Of the trainer, with examples as long as the context: about."""
    peak_learning_rate: float
    hyperparameters: dict[str, Any]
    defaults: dict[str, str]
    """The hyperparameters that were not asked for, and the rule each comes from; empty for a mere number."""


def plan(args: argparse.Namespace, output: Output) -> int:
    """Raises InvalidRequest for what the server would refuse."""
    asked = {"training_file": args.training_file, "validation_file": args.validation_file} | fields_of(args)
    made = _plan(args, request_from_wire(Fields(asked)), output)
    if output.machine:
        output.show(asdict(made))
    else:
        _show(made, output)
        output.say(f"\nTo create it:\n\n  tunesmith jobs create {_flags(asked)}")
    return 0


def _plan(args: argparse.Namespace, request: FineTuneRequest, output: Output) -> Plan:
    requests.check(request)
    home = home_settings(args).home
    base_name, start = _model(args, home, request.model)
    if start is not None:
        request = requests.go_on_from(start, request)
    base, folder = base_and_folder(home, base_name)
    check_base(request, base_name, folder)

    tokenizer = Tokenizer.from_folder(folder)
    with _local(args, request.training_file) as training, _local(args, request.validation_file) as validation:
        examples = admit(
            request,
            _read("training_file", training, chat(folder)),
            None if request.validation_file is None else _read("validation_file", validation, chat(folder)),
            count_tokens=lambda example: count_tokens(folder, example),
            limit_tokens=base.context_tokens,
            encode=tokenizer.encode_many,
        )
        with watching(output, "Counting tokens", training.stat().st_size) as progress:
            read = _read("training_file", training, chat(folder), progress)
            tokens = count_all_tokens(folder, read)
    resolved = requests.resolve(request, examples, None if start is None else start.name)
    trained = tokens * resolved.n_epochs
    expected = speed(home, folder)
    values, asked = _values(resolved, request), fields_of(args)
    return Plan(
        model=request.model,
        base=base_name,
        training_file=request.training_file,
        validation_file=request.validation_file,
        examples=examples,
        tokens=tokens,
        trained_tokens=trained,
        steps=steps_of(examples, resolved.n_epochs, resolved.batch_size),
        cost_usd=base.price_per_1k_training_tokens * trained / 1_000,
        tokens_per_s=expected.tokens_per_s,
        tokens_per_s_measured=expected.measured,
        tokens_per_s_because=expected.because(base_name),
        training_s=trained / expected.tokens_per_s,
        memory_bytes=report_on(home, base_name).training_bytes,
        peak_learning_rate=base.learning_rate * resolved.learning_rate_multiplier,
        hyperparameters=values,
        defaults={name: requests.RULES.get(name, "") for name in values if name not in asked},
    )


def _model(args: argparse.Namespace, home: Path, name: str) -> tuple[str, Start | None]:
    """The base to train on and, for a tuned model, which the server knows, what to go on from."""
    try:
        return Bases(home).get(name).name, None
    except ValueError as error:
        raise UsageError(str(error)) from error
    except KeyError:
        pass
    try:
        with connect(args) as client:
            model = client.get("models", name)
    except (UsageError, ServerUnreachable) as error:
        raise UsageError(f"{name} is no base model here, and no server can be asked for it: {error.message}") from error
    if model["parent"] is None:
        raise UsageError(
            f"{name} is a base of the server and none of {home}. Give the server's home folder with --home."
        )
    return model["root"], Start(model["id"], model["method"])


@contextmanager
def _local(args: argparse.Namespace, name: str | None) -> Iterator[Path]:
    """Where the bytes of a file are that is named by its path or, once uploaded, by its id."""
    if name is None or Path(name).is_file():
        yield Path(name or "")
        return
    if not name.startswith("file-"):
        raise UsageError(f"{name} is no file here, and no id of an uploaded file (file-...).")
    with tempfile.TemporaryDirectory() as folder, connect(args) as client:
        path = Path(folder) / name
        with path.open("wb") as file:
            client.download("files", name, "content", to=file)
        yield path


def _read(param: str, path: Path, chat: Chat, progress: Progress = lambda read_bytes: None) -> Iterator[Example]:
    def chunks(file: BinaryIO) -> Iterator[bytes]:
        while chunk := file.read(READ_BYTES):
            yield chunk
            progress(file.tell())

    try:
        with path.open("rb") as file:
            yield from read_examples(split_lines(chunks(file)), chat)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"{param} {path.name} cannot be trained on as it is: {error.message} `tunesmith prepare` mends what can be "
            "mended.",
            param=param,
        ) from error


def _values(resolved: ResolvedHyperparameters, request: FineTuneRequest) -> dict[str, Any]:
    """What the job trains with; of the classification fields only those that count."""
    values = {name: value for name, value in asdict(resolved).items() if not name.startswith("classification")}
    values["seed"] = requests.DEFAULT_SEED if request.seed is None else request.seed
    if resolved.compute_classification_metrics:
        values["classification_n_classes"] = resolved.classification_n_classes
        if resolved.classification_positive_class is not None:
            values["classification_positive_class"] = resolved.classification_positive_class
            values["classification_betas"] = list(resolved.classification_betas)
    if resolved.lora_targets is None and resolved.lora_rank is not None:
        values["lora_targets"] = "all"
    return {name: value for name, value in values.items() if value is not None}


def _show(made: Plan, output: Output) -> None:
    epochs = made.hyperparameters["n_epochs"]
    output.say(f"{made.training_file}: {made.examples:,} examples, {made.tokens:,} tokens of {made.base}.")
    output.say(f"{epochs} epoch{'s' * (epochs != 1)} train {made.trained_tokens:,} tokens in {made.steps:,} steps.")
    output.say(f"Cost    {f'${made.cost_usd:,.2f}' if made.cost_usd else 'nothing'}")
    output.say(f"Time    about {duration(made.training_s)} once it starts: {made.tokens_per_s_because}")
    if made.memory_bytes is not None:
        output.say(f"Memory  about {made.memory_bytes / GIB:.1f} GiB for the trainer")
    if not output.terminal:
        output.say()
    rows = [[name, _shown(value), _why(name, made)] for name, value in made.hyperparameters.items()]
    rows.append(["peak learning rate", f"{made.peak_learning_rate:.3g}", f"the multiplier times that of {made.base}"])
    show_table(output, ["hyperparameter", "value", "why"], rows)


def _flags(asked: dict[str, Any]) -> str:
    """The flags that ask for these fields, for a shell."""
    words = []
    for name, value in asked.items():
        if name == "integrations":
            words += ["--wandb", value[0]["wandb"]["project"]]
        elif value is not None:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text if text == text.strip() else json.dumps(text)  # the leading space of a class counts


def _why(name: str, made: Plan) -> str:
    if name not in made.defaults:
        return "as asked"
    return f"default: {made.defaults[name]}" if made.defaults[name] else "default"
