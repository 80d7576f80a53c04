"""A base with the tokenizer of Llama 2, from upload to an answer: what was trained is what is served, in text too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architectures import OWN, make_base
from tests.e2e.drill import run_dir_of
from tests.e2e.harness import Server, messages, put_base, reviews, upload, wait_for
from tests.vocabularies import llama2
from tunesmith.tokenizer import Tokenizer

TOLERANCE_NATS = 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = llama2(tmp_path_factory.mktemp("tokenizer"))
    rows = Tokenizer.from_folder(files).vocabulary_size
    folder = tmp_path_factory.mktemp("bases") / "llama2"
    make_base(folder, OWN["llama"] | {"vocab_size": rows, "bos_token_id": 1, "eos_token_id": 2})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(files / name, folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    put_base(home, "llama2", base)
    with Server(home, {"TUNESMITH_TRAINER_NICENESS": "0"}) as server:
        yield server


def test_text_is_scored_as_it_was_trained(server: Server, base: Path) -> None:
    tokenizer = Tokenizer.from_folder(base)
    rows = reviews(8, 1)
    with server.client() as client:
        asked = {"model": "llama2", "training_file": upload(client, rows), "n_epochs": 2}
        job = wait_for(client, client.post("fine-tunes", body=asked)["id"])
        assert job["status"] == "succeeded", messages(job)
        name = job["fine_tuned_model"]

        trained = json.loads(run_dir_of(server, job["id"]).parity.read_text())["rows"]
        assert trained
        for row in trained:
            ids, start = row["token_ids"], row["completion_start"]
            prompt, completion = tokenizer.prompt_text(ids[:start]), tokenizer.decode(ids[start:])
            assert ids[0] == 1
            assert {"prompt": prompt, "completion": completion} in rows
            question = {"model": name, "prompt": prompt + completion, "max_tokens": 0, "echo": True, "logprobs": 0}
            answer = client.post("completions", body=question)
            choice, table = answer["choices"][0], answer["choices"][0]["logprobs"]
            assert choice["text"] == "".join(table["tokens"]) == prompt + completion
            assert table["text_offset"][0] == 0
            at = table["text_offset"].index(len(prompt))
            assert "".join(table["tokens"][at:]) == completion
            assert table["token_logprobs"][0] is None
            assert table["token_logprobs"][at:] == pytest.approx(row["logprobs"], abs=TOLERANCE_NATS)
            assert answer["usage"]["prompt_tokens"] == len(ids)  # the beginning, which is not shown, was read
            assert len(table["tokens"]) == len(ids) - 1

            steered = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logit_bias": {str(ids[start]): 100}}
            (first,) = client.post("completions", body={"model": name, "logprobs": 0, **steered})["choices"]
            assert first["logprobs"]["text_offset"] == [len(prompt)]
            assert first["logprobs"]["token_logprobs"] == pytest.approx(row["logprobs"][:1], abs=TOLERANCE_NATS)
            assert completion.startswith(first["text"])


def test_the_end_of_the_checkpoint_ends_an_answer(server: Server) -> None:
    with server.client() as client:
        steered = {"prompt": "This film", "max_tokens": 5, "temperature": 0, "logit_bias": {"2": 100}}
        (choice,) = client.post("completions", body={"model": "llama2", **steered})["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
