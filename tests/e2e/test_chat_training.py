"""Jobs on conversations: trained on the tokens that a request for an answer becomes, for bases of both kinds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

from tests.e2e.harness import Server, put_base, wait_for

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ bos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""Its mark ends a turn, and a text."""
QUESTIONS = {"Is it open?": "yes", "Is it late?": "no"}
HARD = {"n_epochs": 50, "batch_size": 4, "learning_rate_multiplier": 1.0}
"""The base is a small one of random weights, which has to learn to write at all."""


@pytest.fixture(scope="module")
def server(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home, templated = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("bases") / "templated"
    shutil.copytree(tiny_base, templated)
    (templated / "chat_template.jinja").write_text(TEMPLATE)
    (templated / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>"}))
    put_base(home, "ada", tiny_base)
    put_base(home, "babbage", templated)
    with Server(home) as server:
        yield server


@pytest.mark.parametrize("base", ["ada", "babbage"])
def test_a_model_learns_its_answers(server: Server, base: str) -> None:
    talks = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in QUESTIONS.items()
    ]
    content = "".join(json.dumps({"messages": talk}) + "\n" for talk in talks * 8).encode()
    with server.client() as client:
        file_id = client.upload("talks.jsonl", BytesIO(content), "fine-tune")["id"]
        body = {"model": base, "training_file": file_id, "hyperparameters": HARD}
        job = client.post("fine_tuning", "jobs", body=body)
        ended = wait_for(client, job["id"])
        # The gate has held the trained tokens against those of a request.
        assert ended["status"] == "succeeded", [event["message"] for event in ended["events"]]
        for question, answer in QUESTIONS.items():
            asked = {"model": ended["fine_tuned_model"], "messages": [{"role": "user", "content": question}]}
            told = client.post("chat", "completions", body=asked | {"temperature": 0, "max_tokens": 20})
            (choice,) = told["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == (answer, "stop")
