"""What a run starts from: the base model, the rows of both files, what is trained before the first step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from tunesmith.adapters import checkpoint as adapter_checkpoint
from tunesmith.adapters.lora import Lora, initial
from tunesmith.data.chat import Chat
from tunesmith.data.formats import read_examples
from tunesmith.decoder import loading
from tunesmith.decoder.base import Decoder
from tunesmith.decoder.llama import Llama
from tunesmith.decoder.merging import merged
from tunesmith.errors import InvalidRequest
from tunesmith.rundir import RunDir, RunSpec, holds_all_weights
from tunesmith.tokenizer import Tokenizer
from tunesmith.training.batches import Row, encode_rows, generator
from tunesmith.training.classes import Classes
from tunesmith.training.factors import TrainableLora
from tunesmith.training.packing import PROCESSOR
from tunesmith.training.whole import TrainableWeights

ReadBase = tuple[Decoder, Tokenizer]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything read from the run folder and from the folders its spec names."""

    model: Decoder
    rows: list[Row]
    validation: list[Row]
    """Empty without a validation file."""
    classes: Classes | None
    trained: TrainableLora | TrainableWeights
    """What training changes, as it is before the first step."""


class _Rows(list[Row]):
    """Rows that can be referred to weakly. Nobody changes them: runs share them."""


class Encoded:
    """Rows of files, by the content of the file and what they were encoded with, as long as a run has them.

    So runs side by side over one file, as when rates are tried, encode it once. Between runs nothing is kept
    (docs/design/decisions/training-step.md).
    """

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[bytes, Hashable], _Rows] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._known)

    def rows(self, path: Path, using: Hashable, encode: Callable[[], list[Row]]) -> list[Row]:
        """What `encode` gave for this content before, or gives now."""
        with path.open("rb") as file:
            key = hashlib.file_digest(file, "sha256").digest(), using
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Rows(encode())
        return known


def read_inputs(
    run_dir: RunDir,
    spec: RunSpec,
    beat: Callable[[], None],
    base: Callable[[Path, torch.device], ReadBase] | None = None,
    encoded: Encoded | None = None,
) -> Inputs:
    """Reads and checks all of them. `base`, where given, is `read_base`, or gives what that gave before; `encoded` has
    what runs beside read.

    Raises InvalidRequest where the data contradict the model or the hyperparameters, and with the reason for a base
    that cannot be trained here; OSError and ValueError for a parent adapter that cannot be read.
    """
    device = torch.device(spec.device)
    model, tokenizer = (base or read_base)(Path(spec.base_dir), device)
    if spec.hyperparameters.method == "full":
        trained: TrainableLora | TrainableWeights = _whole(spec, model, device)
    else:
        trained = TrainableLora(_start(spec, model).to(device))
    if isinstance(trained, TrainableWeights):
        model = trained.model
    beat()
    context_tokens = min(spec.context_tokens, model.config.context_tokens)

    known = Encoded() if encoded is None else encoded

    def encode(path: Path, param: str) -> list[Row]:
        with path.open("rb") as lines:
            examples = read_examples(lines, Chat.of(Path(spec.base_dir)))
            return encode_rows(examples, tokenizer, context_tokens=context_tokens, param=param, beat=beat)

    def read(path: Path, param: str) -> list[Row]:
        return known.rows(path, (spec.base_dir, context_tokens), partial(encode, path, param))

    rows = read(run_dir.training_file, "training_file")
    validation = read(run_dir.validation_file, "validation_file") if run_dir.validation_file.exists() else []
    _check_tokens([*rows, *validation], model, Path(spec.base_dir).name)
    classes = Classes.find([*rows, *validation], spec.hyperparameters, tokenizer)
    return Inputs(model, rows, validation, classes, trained)


def read_base(folder: Path, device: torch.device = PROCESSOR) -> ReadBase:
    """A base model, on `device`, and its tokenizer. Raises InvalidRequest with the reason for one that cannot be
    trained here.
    """
    try:
        # A processor has memory, and several threads that would each make weights of their own.
        model = loading.load(folder, device=str(device), lean=device.type != "cpu")
        return model, Tokenizer.from_folder(folder)
    except (FileNotFoundError, ValueError) as error:
        reason = str(error).replace(str(folder), folder.name)
        raise InvalidRequest(f"The base model cannot be trained here: {reason}.", param="model") from error


def _check_tokens(rows: Sequence[Row], model: Decoder, base: str) -> None:
    """Raises InvalidRequest where the model has no row for a token of its tokenizer."""
    largest, known = max(max(row.token_ids) for row in rows), model.config.vocabulary_size
    if largest >= known:
        raise InvalidRequest(
            f"The base model cannot be trained here: its tokenizer gives token {largest}, and the weights of {base} "
            f"have rows for {known} tokens: they do not belong together. tunesmith models check tells more.",
            param="model",
        )


def _whole(spec: RunSpec, model: Decoder, device: torch.device) -> TrainableWeights:
    """All weights: the base's, or those of a tuned model, its own or the base's with its adapter in them."""
    parent = None if spec.parent_adapter_dir is None else Path(spec.parent_adapter_dir)
    if parent is not None and holds_all_weights(parent):
        model, parent = loading.load(parent, device=str(device)), None
    if not isinstance(model, Llama):
        raise InvalidRequest(
            "method 'full' is for models of the Llama family, and the base is of another. Leave it out.", param="method"
        )
    if parent is not None:
        model = merged(model, adapter_checkpoint.load(parent, model.config.layout)[0].to(device))
    return TrainableWeights(model)


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
