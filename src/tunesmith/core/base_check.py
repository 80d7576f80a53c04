"""What there is to say about a base before it is used: findings, and numbers for people. Loads no weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.core import box
from tunesmith.core.architectures import TRIED_TYPES, Architecture, ForwardPass, architecture_of, is_fourbit
from tunesmith.core.bases import BOX_NAMES, DEFAULT_LEARNING_RATE, LONGEST_EXAMPLE_TOKENS
from tunesmith.core.catalogue import Entry, read_catalogue
from tunesmith.core.checkpoint_folder import (
    CONFIG,
    INDEX,
    PICKLES,
    TOKENIZER,
    Tensor,
    context_tokens_of,
    read_config,
    read_tensors,
    sha256_of,
    shards_of,
)
from tunesmith.tokenizer import Tokenizer

FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
"""What the token embedding is called in the families of transformers."""
FOURBIT = re.compile(r"(model\.layers\..+\.weight)\.quant_state\.bitsandbytes__(nf4|fp4)")
"""What says that a weight is in 4 bits; see `decoder/fourbit.py`."""
SPARE_ROWS = 1_024
"""Matrices are padded to round numbers of rows, by some hundreds at most; more means another tokenizer's model."""
COMPUTED_BYTES = 4
"""A parameter in memory: trainer and engine compute in float32, whatever the files hold."""
PROCESS_BYTES = 400 << 20
"""Python and torch before any weights."""
CACHE_BYTES = 512 << 20
"""Keys and values that the engine keeps for each base; see `engine/runner.py`."""
MICRO_BATCH_TOKENS = 2_048
"""See `training/packing.py`; a longer example goes alone."""
MAX_LAYERS = 10_000
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a person should know about a base."""

    level: Literal["error", "note"]
    """An error keeps the base from being used, or from being trusted."""
    message: str


@dataclass(slots=True)
class Report:
    """What was found out about one base; None where it could not be."""

    name: str
    source: str
    folder: Path
    learning_rate: float
    context_tokens: int | None = None
    model_type: str | None = None
    forward_pass: ForwardPass | None = None
    parameters: int | None = None
    size_bytes: int | None = None
    """Of the weight files on disk."""
    dtypes: tuple[str, ...] = ()
    """On disk, the one with most parameters first."""
    vocabulary_size: int | None = None
    serving_bytes: int | None = None
    """An estimate of the memory of the engine process with this base alone."""
    training_bytes: int | None = None
    """An estimate of the memory of the trainer process, with examples as long as the context."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.level != "error" for finding in self.findings)

    def error(self, message: str) -> None:
        """Something is wrong."""
        self.findings.append(Finding("error", message))

    def note(self, message: str) -> None:
        """Something is worth knowing."""
        self.findings.append(Finding("note", message))


def base_names(home: Path) -> list[str]:
    """The box's names, then those of the catalogue. Raises ValueError as `read_catalogue`."""
    return list(dict.fromkeys([*BOX_NAMES, *read_catalogue(home)]))


def check_base(home: Path, name: str) -> Report:
    """Looks at everything about a base except the numbers in its weights. `name` is one of `base_names`."""
    entry = read_catalogue(home).get(name)
    if entry is None:
        packed, rate = BOX_NAMES[name]
        report = Report(name, f"in the box: {packed}", box.unpack(box.BOX / packed, home), rate)
    else:
        source = f"{entry.hub} at {str(entry.revision)[:12]}" if entry.hub else str(entry.folder)
        rate = DEFAULT_LEARNING_RATE if entry.learning_rate is None else entry.learning_rate
        report = Report(name, source, entry.folder, rate)
        if not entry.folder.is_dir():
            report.error(
                f"folder {entry.folder} is not there"
                if entry.hub is None
                else f"not pulled to this machine; to get it: {entry.pull_command}"
            )
            return report
    _check_folder(report, entry)
    return report


def _check_folder(report: Report, entry: Entry | None) -> None:
    if entry is not None and entry.hub is not None:
        _check_links(report)
    config = _config(report)
    tensors = _tensors(report, config)
    vocabulary_size = _tokenizer(report)
    _digests(report, entry)
    if config is not None:
        _context(report, config, entry)
    if config is not None and tensors:
        _check_names(report, config, tensors)
        _memory(report, config)
    if tensors and vocabulary_size is not None:
        _check_rows(report, config or {}, tensors, vocabulary_size)


def _check_links(report: Report) -> None:
    """A download writes plain files; a link in its folder was put there and may lead anywhere."""
    for path in sorted(report.folder.rglob("*")):
        if path.is_symlink():
            report.error(f"{path.relative_to(report.folder)} is a link to {path.readlink()}; a pulled model has none")


def _config(report: Report) -> dict[str, Any] | None:
    try:
        config = read_config(report.folder)
    except ValueError as error:
        report.error(str(error))
        return None
    architecture: Architecture = architecture_of(config)
    report.model_type, report.forward_pass = architecture.model_type, architecture.forward_pass
    if architecture.reason is not None:
        report.error(architecture.reason)
    elif architecture.own_code:
        report.note(f"config.json names code of its own ({', '.join(architecture.own_code)}); it is not run")
    if architecture.forward_pass is ForwardPass.TRANSFORMERS and architecture.model_type not in TRIED_TYPES:
        report.note(
            f"{architecture.model_type} is a type of model that transformers knows and that is not tested here; "
            "whether it runs right is tried when it is first loaded, and if not it is refused with the reason"
        )
    return config


def _tensors(report: Report, config: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """All tensors of the folder by name; empty where that cannot be told."""
    files = sorted(report.folder.glob("*.safetensors"))
    try:
        indexed = shards_of(report.folder)
    except ValueError as error:
        report.error(str(error))
        indexed = []
    if missing := [name for name in indexed if not (report.folder / name).is_file()]:
        report.error(f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} named in {INDEX} and not there")
    if not files:
        pickles = sorted(path.name for path in report.folder.glob("*") if path.suffix in PICKLES)
        refused = f"; {_some(pickles)} can run code when read, and never is" if pickles else ""
        report.error(f"there is no *.safetensors{refused}")
        return {}
    if extra := [path.name for path in files if indexed and path.name not in indexed]:
        report.note(f"{_some(extra)} is not in {INDEX} and is read all the same; remove it if it is not needed")
    tensors: dict[str, Tensor] = {}
    whole = not missing
    for path in files:
        try:
            found = read_tensors(path)
        except ValueError as error:
            report.error(str(error))
            whole = False
            continue
        if twice := sorted(found.keys() & tensors.keys()):
            report.error(f"{path.name} holds {_some(twice)}, which another file holds too: which counts is chance")
        tensors |= found
    report.size_bytes = sum(path.stat().st_size for path in files if path.is_file())
    if not whole:
        return {}
    elements = Counter[str]()
    packed = _packed(config, tensors)
    for name, tensor in tensors.items():
        if name in packed:
            elements[packed[name].upper()] += 2 * tensor.elements  # a byte holds two
        elif name.rpartition(".weight.")[0] + ".weight" not in packed:
            elements[tensor.dtype] += tensor.elements
    report.dtypes = tuple(dtype for dtype, _ in elements.most_common())
    report.parameters = elements.total()
    # Old checkpoints also hold attention masks, as U8 or BOOL; those are no weights, and nobody reads them.
    weights = {name: tensor for name, tensor in tensors.items() if name.endswith("weight") and name not in packed}
    if odd := [name for name, tensor in weights.items() if tensor.dtype not in FLOATS]:
        report.error(f"{_some(odd)} is stored as {tensors[odd[0]].dtype}: quantised weights are not computed here")
    return tensors


def _packed(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The matrices of layers that are in 4 bits, and of which kind; no other is computed."""
    if config is None or not is_fourbit(config):
        return {}
    kinds = {match[1]: match[2] for name in tensors if (match := FOURBIT.fullmatch(name))}
    return {name: kind for name, kind in kinds.items() if name in tensors and tensors[name].dtype == "U8"}


def _tokenizer(report: Report) -> int | None:
    try:
        tokenizer = Tokenizer.from_folder(report.folder)
    except FileNotFoundError:
        report.error(
            f"there is no {TOKENIZER}, the one form of tokenizer that is read here; save_pretrained of transformers' "
            "AutoTokenizer makes it of most others"
        )
        return None
    except ValueError as error:
        report.error(f"{TOKENIZER} cannot be used: {error}")
        return None
    report.vocabulary_size = tokenizer.vocabulary_size
    return tokenizer.vocabulary_size


def _digests(report: Report, entry: Entry | None) -> None:
    for name, digest in ({} if entry is None else entry.sha256).items():
        path = report.folder / name
        try:
            found = sha256_of(path)
        except OSError as error:
            report.error(f"{name} has a digest in bases.toml and cannot be read: {error.strerror}")
            continue
        if found != digest:
            report.error(f"{name} has the sha256 {found}, bases.toml says {digest}")


def _context(report: Report, config: Mapping[str, Any], entry: Entry | None) -> None:
    reads = context_tokens_of(config)
    asked = None if entry is None else entry.context_tokens
    if reads is None:
        report.note(f"{CONFIG} does not say how many tokens the model reads; {LONGEST_EXAMPLE_TOKENS} are assumed")
    elif asked is not None and asked > reads:
        report.error(f"context_tokens is {asked}, and the model reads {reads}")
    report.context_tokens = asked or min(reads or LONGEST_EXAMPLE_TOKENS, LONGEST_EXAMPLE_TOKENS)


def _check_names(report: Report, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Whether our own forward pass finds every weight; transformers tells of its own accord."""
    if report.forward_pass is not ForwardPass.OWN:
        return
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:
        report.error(f"{CONFIG} has num_hidden_layers {layers!r}, which is no number of layers")
        return
    shapes = _llama_shapes(config, layers)
    if missing := [name for name in shapes if name not in tensors]:
        report.error(f"the weights lack {_some(missing)}")
    packed = _packed(config, tensors)
    for name, shape in shapes.items():
        if name in tensors and name not in packed and tensors[name].shape != shape and None not in shape:
            has = list(tensors[name].shape)
            report.error(f"{name} has the shape {has}, and {CONFIG} says {list(shape)}")
            return  # the others are as wrong, and many


def _llama_shapes(config: Mapping[str, Any], layers: int) -> dict[str, tuple[int | None, ...]]:
    """Of every weight that our own forward pass needs; None where the config does not tell."""
    kind = config["model_type"]
    width, inner, heads = (_number(config, key) for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    keys, vocabulary = _number(config, "num_key_value_heads") or heads, _number(config, "vocab_size")
    head = _number(config, "head_dim") or (width // heads if width and heads else None)
    counts = {"q": heads, "k": keys, "v": keys}
    of_heads = {part: count * head if count and head else None for part, count in counts.items()}
    parts: dict[str, tuple[int | None, ...]] = {"input_layernorm.weight": (width,)}
    parts |= {"post_attention_layernorm.weight": (width,), "self_attn.o_proj.weight": (width, of_heads["q"])}
    parts |= {f"self_attn.{part}_proj.weight": (size, width) for part, size in of_heads.items()}
    parts |= {f"mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
    parts["mlp.down_proj.weight"] = (width, inner)
    if kind == "qwen2":
        parts |= {f"self_attn.{part}_proj.bias": (size,) for part, size in of_heads.items()}
    if kind == "qwen3":
        parts |= {f"self_attn.{part}_norm.weight": (head,) for part in "qk"}
    shapes: dict[str, tuple[int | None, ...]] = {"model.norm.weight": (width,)}
    outside = ["model.embed_tokens.weight"] + ([] if config.get("tie_word_embeddings") else ["lm_head.weight"])
    shapes |= dict.fromkeys(outside, (vocabulary, width))
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{part}": shape for part, shape in parts.items()}
    return shapes


def _check_rows(report: Report, config: Mapping[str, Any], tensors: Mapping[str, Tensor], vocabulary_size: int) -> None:
    """Whether tokenizer and embedding belong together."""
    found = next((name for name in sorted(tensors) if EMBEDDINGS.search(name) and len(tensors[name].shape) == 2), None)
    rows = config.get("vocab_size") if found is None else tensors[found].shape[0]
    if not isinstance(rows, int):
        return
    if found is not None and isinstance(config.get("vocab_size"), int) and config["vocab_size"] != rows:
        report.error(f"{CONFIG} has vocab_size {config['vocab_size']:,}, and {found} has {rows:,} rows")
    if vocabulary_size > rows:
        report.error(
            f"the tokenizer has {vocabulary_size:,} tokens and the model rows for {rows:,}: they do not belong together"
        )
    elif rows - vocabulary_size > SPARE_ROWS:
        report.note(f"the model has {rows:,} rows and the tokenizer {vocabulary_size:,} tokens: is it this model's?")


def _memory(report: Report, config: Mapping[str, Any]) -> None:
    """About what the processes take, within a third or so; how it is reckoned: docs/bases.md."""
    weights = COMPUTED_BYTES * (report.parameters or 0)
    context = max(report.context_tokens or 0, MICRO_BATCH_TOKENS)
    layers = _number(config, "num_hidden_layers", "n_layer") or 0
    width = _number(config, "hidden_size", "n_embd", "d_model") or 0
    feed_forward = _number(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * width
    activations = COMPUTED_BYTES * context * layers * (16 * width + 6 * feed_forward)
    # While it is read, what is stacked is there twice.
    report.serving_bytes = PROCESS_BYTES + weights + max(CACHE_BYTES, weights * 2 // 3)
    report.training_bytes = PROCESS_BYTES + weights + max(activations, weights * 2 // 3)


def _number(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def _some(names: list[str]) -> str:
    shown = ", ".join(name if len(name) <= 80 else name[:77] + "..." for name in names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
