"""What is trained: the models, the rows, the least arithmetic they need. Knows no torch and neither competitor.

Rows are made once, as text, and encoded once: every competitor gets the same token ids.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

VOCABULARY_SIZE = 16_384
CONTEXT_TOKENS = 2_048
RANK = 16
ALPHA = 32
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What the adapters cover, whoever trains them."""
_SPREAD = 0.4
"""Standard deviation of the logarithm of a length."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama with tied embeddings."""

    name: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward_width: int

    @property
    def layer_weights(self) -> int:
        """Of the linear layers of one decoder layer."""
        keys = self.width // self.heads * self.kv_heads
        return self.width * (2 * self.width + 2 * keys + 3 * self.feed_forward_width)

    @property
    def adapter_weights(self) -> int:
        """Of the adapters of one decoder layer: a rank's worth of inputs and outputs for each linear layer."""
        keys = self.width // self.heads * self.kv_heads
        attention = 4 * self.width + 2 * (self.width + keys)
        return RANK * (attention + 3 * (self.width + self.feed_forward_width))

    @property
    def parameters(self) -> int:
        """Of the whole model, norms aside."""
        return self.layers * self.layer_weights + VOCABULARY_SIZE * self.width

    def config(self) -> dict[str, object]:
        """`config.json` of an ordinary checkpoint."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.width // self.heads,
            "intermediate_size": self.feed_forward_width,
            "max_position_embeddings": CONTEXT_TOKENS,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "attention_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }


@dataclass(frozen=True, slots=True)
class RowKind:
    """Lengths in tokens, on average; a completion of one token is always one."""

    name: str
    prompt: int
    completion: int


@dataclass(frozen=True, slots=True)
class Shape:
    """One cell of the comparison."""

    model: ModelShape
    rows: RowKind
    batch: int

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.model.name} {self.rows.name} x{self.batch}"


MODELS = {
    model.name: model
    for model in (
        ModelShape("10M", width=256, layers=8, heads=8, kv_heads=4, feed_forward_width=704),
        ModelShape("31M", width=512, layers=8, heads=8, kv_heads=4, feed_forward_width=1_408),
        ModelShape("126M", width=768, layers=16, heads=12, kv_heads=12, feed_forward_width=2_048),
        ModelShape("1B", width=2_048, layers=16, heads=32, kv_heads=8, feed_forward_width=8_192),
    )
}
ROWS = {kind.name: kind for kind in (RowKind("short", 34, 1), RowKind("long", 290, 8), RowKind("generation", 50, 120))}


@dataclass(frozen=True, slots=True)
class Text:
    """A row as a user would upload it."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """The same row as every competitor trains on it."""

    token_ids: list[int]
    completion_start: int


def make_texts(kind: RowKind, words: Sequence[str], n: int, seed: int = 1) -> list[Text]:
    """`n` rows of words drawn as words are, the k-th most frequent with a chance of about 1/k."""
    chance = random.Random(f"{kind.name}/{seed}")
    weights = [1 / rank for rank in range(1, len(words) + 1)]

    def text(mean: int) -> str:
        length = 1 if mean == 1 else max(1, round(mean * chance.lognormvariate(-(_SPREAD**2) / 2, _SPREAD)))
        return "".join(f" {word}" for word in chance.choices(words, weights, k=min(length, CONTEXT_TOKENS // 3)))

    return [Text(text(kind.prompt).strip(), text(kind.completion)) for _ in range(n)]


def write_tokens(path: Path, rows: Sequence[Tokens]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def read_tokens(path: Path) -> list[Tokens]:
    """What `write_tokens` wrote."""
    return [Tokens(**json.loads(line)) for line in path.read_text().splitlines()]


def useful_flops(model: ModelShape, rows: Sequence[Tokens]) -> float:
    """The arithmetic that a pass over `rows`, forward and backward, asks of whoever trains: model FLOPs utilisation.

    2 FLOPs a weight and token forward and 2 for the gradient of what it is given; frozen weights have no gradient of
    their own, adapters, counted at their rank, 2 more. Causal attention 4 forward and 8 backward for a pair of tokens
    and width, of which half are in the past. The head for predictions that carry loss alone. Padding, of rows or of
    ranks, and what is computed a second time to save memory do not count; nor do norms, gates and softmaxes.
    """
    total = 0.0
    for row in rows:
        n = len(row.token_ids)
        total += model.layers * ((4 * model.layer_weights + 6 * model.adapter_weights) * n + 6 * model.width * n * n)
        total += 4 * VOCABULARY_SIZE * model.width * (n - row.completion_start)
    return total
