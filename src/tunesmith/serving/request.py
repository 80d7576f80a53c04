"""What may be asked of a completion, and every rule that needs no model to be checked. Knows no HTTP and no engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from tunesmith.chat_template import Conversation
from tunesmith.core.models import ModelRef
from tunesmith.engine.base import Capabilities
from tunesmith.errors import InvalidRequest

MAX_N = 128
MAX_BEST_OF = 20
MAX_STOPS = 4

Prompt = str | tuple[int, ...] | Conversation
"""Text, token ids, or messages."""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A request with its defaults filled in. `check` tells whether the values keep the rules."""

    model: ModelRef
    prompts: tuple[Prompt, ...]
    """At least one. An empty one is the start of a document."""
    max_tokens: int | None = 16
    """None: as many as the context has room for after the longest prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    best_of: int | None = None
    """How many samples are drawn for each prompt; None: `n`."""
    echo: bool = False
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """None: no table; otherwise how many alternatives it shows at each position."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    payer: str = ""
    """Whose request it is: where there is not room for all, payers take turns."""

    @property
    def samples(self) -> int:
        """Sequences generated for each prompt."""
        return self.n if self.best_of is None else self.best_of

    @property
    def ranked(self) -> bool:
        """Whether more is generated than shown, so that nothing can be shown before all has ended."""
        return self.samples > self.n

    def check(self, capabilities: Capabilities, vocabulary_size: int) -> None:
        """Raises InvalidRequest naming the field, its rule and the value given."""
        if not self.prompts:
            raise InvalidRequest(
                "'prompt' must not be an empty list; leave it out to start a document.", param="prompt"
            )
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 0, None)
        _within("temperature", self.temperature, 0, 2)
        _within("top_p", self.top_p, 0, 1)
        _within("n", self.n, 1, MAX_N)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.best_of is not None:
            _within("best_of", self.best_of, 1, MAX_BEST_OF)
            if self.n > self.best_of:
                raise InvalidRequest(
                    "You requested that the server return more choices than it will generate (HINT: you must set 'n' "
                    f"(currently {self.n}) to be at most 'best_of' (currently {self.best_of}), or omit either "
                    "parameter if you don't specifically want to use them.)",
                    param="best_of",
                )
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, capabilities.max_top_logprobs)
        if len(self.stop) > MAX_STOPS:
            raise InvalidRequest(
                f"'stop' takes at most {MAX_STOPS} sequences; {len(self.stop)} were given. Leave some out.",
                param="stop",
            )
        if "" in self.stop:
            raise InvalidRequest(
                "'stop' holds an empty string, which would stop before the first character. Leave it out.", param="stop"
            )
        for token_id, bias in self.logit_bias.items():
            if not 0 <= token_id < vocabulary_size:
                raise InvalidRequest(
                    f"'logit_bias' names token {token_id}; this model's tokens are 0 to {vocabulary_size - 1}.",
                    param="logit_bias",
                )
            _within("logit_bias", bias, -100, 100)
        self._check_capabilities(capabilities)

    def _check_capabilities(self, capabilities: Capabilities) -> None:
        penalties = "presence_penalty" if self.presence_penalty else "frequency_penalty"
        refused = {
            "logit_bias": bool(self.logit_bias) and not capabilities.logit_bias,
            penalties: bool(self.presence_penalty or self.frequency_penalty) and not capabilities.penalties,
            "seed": self.seed is not None and not capabilities.seed,
            "echo": self.echo and self.logprobs is not None and not capabilities.prompt_logprobs,
        }
        for param, unable in refused.items():
            if unable:
                raise InvalidRequest(
                    f"The engine that serves this model cannot honour '{param}'. Leave it out.", param=param
                )


def _within(param: str, value: float, least: float, most: float | None) -> None:
    # `not (a <= b)` rather than `a > b`: NaN keeps no rule
    if not (least <= value and (most is None or value <= most)):
        rule = f"at least {least}" if most is None else f"between {least} and {most}"
        raise InvalidRequest(f"'{param}' must be {rule}; {value} was given.", param=param)
