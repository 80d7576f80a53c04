"""What a run starts from: the base model, the rows of both files, the factors before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.adapters import checkpoint as adapter_checkpoint
from tunesmith.adapters.lora import SITE_LAYERS, Lora, initial
from tunesmith.data.formats import read_examples
from tunesmith.decoder import llama
from tunesmith.decoder.llama import Llama, LlamaConfig
from tunesmith.rundir import RunDir, RunSpec
from tunesmith.tokenizer import Tokenizer
from tunesmith.training.batches import Row, encode_rows, generator
from tunesmith.training.classes import Classes


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything read from the run folder and from the folders its spec names."""

    model: Llama
    rows: list[Row]
    validation: list[Row]
    """Empty without a validation file."""
    classes: Classes | None
    start: Lora


def read_inputs(run_dir: RunDir, spec: RunSpec, beat: Callable[[], None]) -> Inputs:
    """Reads and checks all of them.

    Raises InvalidRequest where the data contradict the model or the hyperparameters, OSError and ValueError for a base
    model or parent adapter that cannot be read.
    """
    model = llama.load(Path(spec.base_dir))
    beat()
    tokenizer = Tokenizer.from_folder(Path(spec.base_dir))

    def read(path: Path, param: str) -> list[Row]:
        with path.open("rb") as lines:
            return encode_rows(
                read_examples(lines), tokenizer, context_tokens=spec.context_tokens, param=param, beat=beat
            )

    rows = read(run_dir.training_file, "training_file")
    validation = read(run_dir.validation_file, "validation_file") if run_dir.validation_file.exists() else []
    classes = Classes.find([*rows, *validation], spec.hyperparameters, tokenizer)
    return Inputs(model, rows, validation, classes, _start(spec, model))


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear layer that adapters cover."""
    outputs = {
        "qkv": (config.query_width, config.key_width, config.key_width),
        "o": (config.width,),
        "gate_up": (config.feed_forward_width, config.feed_forward_width),
        "down": (config.width,),
    }
    inputs = {"o": config.query_width, "down": config.feed_forward_width}
    return {
        name: (rows, inputs.get(site, config.width))
        for site, names in SITE_LAYERS.items()
        for name, rows in zip(names, outputs[site], strict=True)
    }


def _start(spec: RunSpec, model: Llama) -> Lora:
    shapes = linear_shapes(model.config)
    if spec.parent_adapter_dir is None:
        chance = generator(spec.seed, "factors")
        return initial(model.config.layers, shapes, rank=spec.lora_rank, alpha=spec.lora_alpha, generator=chance)
    # A tuned model goes on with its own rank and scale.
    parent, _ = adapter_checkpoint.load(Path(spec.parent_adapter_dir))
    found = [(layer, name, len(part.b_OR), part.a_RI.shape[1]) for layer, name, part in parent.tensors()]
    expected = [(layer, name, *shapes[name]) for layer in range(model.config.layers) for name in shapes]
    if found != expected:
        raise ValueError(f"the adapter in {spec.parent_adapter_dir} is not for the base model in {spec.base_dir}")
    return parent
