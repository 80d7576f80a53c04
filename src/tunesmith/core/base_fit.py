"""Whether a job can be trained on its base, as far as files tell: its tokenizer, the modules it names. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from pathlib import Path

from tunesmith.core.architectures import OWN_MODEL_TYPES, OWN_TARGETS, ForwardPass, architecture_of
from tunesmith.core.checkpoint_folder import read_config
from tunesmith.core.requests import FineTuneRequest
from tunesmith.data.chat import Chat
from tunesmith.data.doctor import Codec
from tunesmith.data.formats import Example
from tunesmith.errors import InvalidRequest
from tunesmith.tokenizer import Tokenizer

COUNTED_AT_ONCE = 1_000


def check_base(request: FineTuneRequest, base_name: str, folder: Path) -> None:
    """Raises InvalidRequest for what the trainer would say too, but after a long wait."""
    try:
        _tokenizer(folder)
    except (OSError, ValueError) as error:
        reason = str(error).replace(str(folder), folder.name)
        raise InvalidRequest(
            f"The base `{base_name}` cannot be used on this server: {reason}.", param="model"
        ) from error
    if request.method == "full" or request.lora_targets is not None:
        _check_modules(request, base_name, folder)


def count_tokens(folder: Path, example: Example) -> int:
    """Tokens of prompt and completion, as they are trained on."""
    return count_all_tokens(folder, [example])


def count_all_tokens(folder: Path, examples: Iterable[Example]) -> int:
    """The sum of `count_tokens`, several times faster."""
    tokenizer, left, count = _tokenizer(folder), iter(examples), 0
    while block := list(islice(left, COUNTED_AT_ONCE)):
        prompts = tokenizer.prompt_ids_many([one.prompt for one in block], [one.marked for one in block])
        completions = tokenizer.encode_many([one.completion for one in block])
        count += sum(map(len, prompts)) + sum(map(len, completions))
    return count


@lru_cache(maxsize=8)
def chat(folder: Path) -> Chat:
    """How the base reads conversations."""
    try:
        return Chat.of(folder)
    except ValueError as error:
        raise InvalidRequest(
            f"Conversations cannot be put to the base {folder.name}: {error}.", param="model"
        ) from error


def codec(folder: Path) -> Codec:
    """How a base reads and writes text, for the doctor."""
    tokenizer = _tokenizer(folder)
    return Codec(tokenizer.encode_many, tokenizer.decode, tuple(map(tokenizer.token_text, tokenizer.ending_ids)))


def _check_modules(request: FineTuneRequest, base_name: str, folder: Path) -> None:
    # Modules of other architectures are known once they are loaded: the trainer checks those.
    if architecture_of(read_config(folder)).forward_pass is ForwardPass.OWN:
        unknown = [name for name in request.lora_targets or () if name not in OWN_TARGETS]
        if unknown:
            raise InvalidRequest(
                f"lora_targets names {unknown[0]}, and `{base_name}` has no such module. It has: "
                f"{', '.join(OWN_TARGETS)}.",
                param="lora_targets",
            )
    elif request.method == "full":
        raise InvalidRequest(
            f"method 'full' is for models of type {', '.join(OWN_MODEL_TYPES)}; `{base_name}` is of another and is "
            "tuned by an adapter. Leave method out.",
            param="method",
        )


@lru_cache(maxsize=8)
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)
