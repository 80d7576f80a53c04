"""Whether a job can be trained on its base, as far as files tell: its tokenizer, the modules it names. No torch."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tunesmith.core.architectures import OWN_MODEL_TYPES, OWN_TARGETS, ForwardPass, architecture_of
from tunesmith.core.checkpoint_folder import read_config
from tunesmith.core.requests import FineTuneRequest
from tunesmith.data.doctor import Codec
from tunesmith.data.formats import Example
from tunesmith.errors import InvalidRequest
from tunesmith.tokenizer import Tokenizer


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
    tokenizer = _tokenizer(folder)
    return len(tokenizer.prompt_ids(example.prompt)) + len(tokenizer.encode(example.completion))


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
