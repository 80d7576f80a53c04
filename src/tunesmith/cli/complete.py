"""`tunesmith complete`: what a model adds to a prompt, and with --show-probs how sure it was of each token."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from tunesmith.cli.connection import connect
from tunesmith.cli.output import Output, UsageError, takes_colour
from tunesmith.cli.tables import show_table

LIKELY = 5
"""How many tokens are shown for each place: the most that the API gives."""
LEVELS = ((0.9, "green"), (0.5, "cyan"), (0.2, "yellow"), (0.05, "magenta"), (0.0, "red"))
"""(from this probability on, colour), the surest first."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a completion."""

    token: str
    probability: float
    instead: dict[str, float]
    """The other tokens that were likely in its place, the likeliest first."""

    @property
    def colour(self) -> str:
        """The surer, the greener."""
        return next(colour for least, colour in LEVELS if self.probability >= least)


def complete(args: argparse.Namespace, output: Output) -> int:
    """Streams what is generated; with --show-probs or --json it comes whole."""
    body = {
        name: getattr(args, name)
        for name in ("model", "max_tokens", "temperature", "top_p", "stop", "seed")
        if getattr(args, name) is not None
    }
    body["prompt"] = _prompt(args)
    with connect(args) as client:
        if args.show_probs:
            answer = client.post("completions", body=body | {"logprobs": LIKELY})
            tokens = tokens_of(answer["choices"][0]["logprobs"])
            if output.machine:
                output.show(answer | {"tokens": [asdict(token) for token in tokens]})
            else:
                show_tokens(body["prompt"], tokens, output)
        elif output.machine:
            output.show(client.post("completions", body=body))
        else:
            for chunk in client.stream("completions", body=body | {"stream": True}):
                sys.stdout.write(chunk["choices"][0]["text"])
                sys.stdout.flush()
            sys.stdout.write("\n")
    return 0


def tokens_of(logprobs: dict[str, Any]) -> list[Token]:
    """The tokens of a choice with their probabilities, in order."""
    columns = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    return [
        Token(
            token,
            math.exp(logprob),
            {
                other: math.exp(value)
                for other, value in sorted(likely.items(), key=lambda item: -item[1])
                if other != token
            },
        )
        for token, logprob, likely in columns
    ]


def show_tokens(prompt: str, tokens: list[Token], output: Output) -> None:
    """The text in colours with a legend, where there are colours; then a line for each token, readable without."""
    if output.terminal and takes_colour(sys.stdout):
        console = Console(highlight=False)
        coloured = ((token.token, f"reverse {token.colour}") for token in tokens)
        console.print(Text.assemble((prompt, "dim"), *coloured), soft_wrap=True)
        legend = Text("\nprobability  ")
        for least, colour in LEVELS:
            legend.append(f" {least:.0%}+ " if least else f" under {LEVELS[-2][0]:.0%} ", f"reverse {colour}")
            legend.append(" ")
        console.print(legend)
    else:
        output.say(prompt + "".join(token.token for token in tokens) + "\n")
    rows = [
        [
            shown(token.token),
            f"{token.probability:.1%}",
            "  ".join(f"{shown(other)} {probability:.1%}" for other, probability in token.instead.items()),
        ]
        for token in tokens
    ]
    show_table(output, ["token", "probability", "likely instead"], rows, numbers=frozenset({"probability"}))


def shown(token: str) -> str:
    """A token on one line, its spaces seen."""
    return token.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t").replace(" ", "␣")


def _prompt(args: argparse.Namespace) -> str:
    """The argument, else standard input. Raises UsageError where a person would be waited for without being asked."""
    if args.prompt is not None:
        prompt: str = args.prompt
        return prompt
    if sys.stdin.isatty():
        raise UsageError("There is no prompt: give it as an argument, or on standard input.")
    return sys.stdin.read()
