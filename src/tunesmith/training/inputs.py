"""What a run starts from: the base model, the rows of both files, the factors before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.adapters import checkpoint as adapter_checkpoint
from tunesmith.adapters.lora import Lora, initial
from tunesmith.data.formats import read_examples
from tunesmith.decoder import loading
from tunesmith.decoder.base import Decoder
from tunesmith.errors import InvalidRequest
from tunesmith.rundir import RunDir, RunSpec
from tunesmith.tokenizer import Tokenizer
from tunesmith.training.batches import Row, encode_rows, generator
from tunesmith.training.classes import Classes


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything read from the run folder and from the folders its spec names."""

    model: Decoder
    rows: list[Row]
    validation: list[Row]
    """Empty without a validation file."""
    classes: Classes | None
    start: Lora


def read_inputs(run_dir: RunDir, spec: RunSpec, beat: Callable[[], None]) -> Inputs:
    """Reads and checks all of them.

    Raises InvalidRequest where the data contradict the model or the hyperparameters, and with the reason for a base
    that cannot be trained here; OSError and ValueError for a parent adapter that cannot be read.
    """
    model, tokenizer = _base(Path(spec.base_dir))
    beat()
    context_tokens = min(spec.context_tokens, model.config.context_tokens)

    def read(path: Path, param: str) -> list[Row]:
        with path.open("rb") as lines:
            return encode_rows(read_examples(lines), tokenizer, context_tokens=context_tokens, param=param, beat=beat)

    rows = read(run_dir.training_file, "training_file")
    validation = read(run_dir.validation_file, "validation_file") if run_dir.validation_file.exists() else []
    classes = Classes.find([*rows, *validation], spec.hyperparameters, tokenizer)
    return Inputs(model, rows, validation, classes, _start(spec, model))


def _base(folder: Path) -> tuple[Decoder, Tokenizer]:
    try:
        return loading.load(folder), Tokenizer.from_folder(folder)
    except (FileNotFoundError, ValueError) as error:
        reason = str(error).replace(str(folder), folder.name)
        raise InvalidRequest(f"The base model cannot be trained here: {reason}.", param="model") from error


def _start(spec: RunSpec, model: Decoder) -> Lora:
    layout = model.config.layout
    if spec.parent_adapter_dir is not None:  # a tuned model goes on with its own rank and scale
        return adapter_checkpoint.load(Path(spec.parent_adapter_dir), layout)[0]
    assert spec.lora_rank is not None and spec.lora_alpha is not None  # None where there is a parent
    targets = spec.hyperparameters.lora_targets
    unknown = sorted(set(targets or ()) - set(layout.targets()))
    if unknown:
        raise InvalidRequest(
            f"lora_targets names {unknown[0]}, and the base has no such module. It has: {', '.join(layout.targets())}.",
            param="lora_targets",
        )
    chance = generator(spec.seed, "factors")
    return initial(layout, rank=spec.lora_rank, alpha=spec.lora_alpha, generator=chance, targets=targets)
