"""A server that answers in bf16 or int8, or whose base is in 4 bits: what is tuned passes the gate, and answers as it
was trained but for rounding.
"""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.architectures import OWN, make_base
from tests.e2e.drill import run_dir_of
from tests.e2e.harness import Server, messages, put_base, reviews, upload, wait_for
from tests.engine.test_rounded import WIDE
from tunesmith.cli.main import main
from tunesmith.tokenizer import Tokenizer


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 0.1), ("int8", 0.4)])
def test_a_tuned_model_answers_as_it_was_trained(tmp_path: Path, precision: str, bound: float) -> None:
    home = tmp_path / "home"
    put_base(home, "ada", make_base(tmp_path / "base", OWN["llama"] | WIDE))
    with Server(home, {"TUNESMITH_ENGINE_PRECISION": precision}) as server, server.client() as client:
        asked = {"model": "ada", "training_file": upload(client, reviews(16, 1)), "n_epochs": 2}
        job = wait_for(client, client.post("fine-tunes", body=asked)["id"])
        assert job["status"] == "succeeded", messages(job)
        assert client.get("models", job["fine_tuned_model"])["state"] == "resident"  # before anybody asked for it

        differences = []
        for row in json.loads(run_dir_of(server, job["id"]).parity.read_text())["rows"]:
            question = {"model": job["fine_tuned_model"], "prompt": row["token_ids"], "max_tokens": 0, "echo": True}
            (choice,) = client.post("completions", body=question | {"logprobs": 0})["choices"]
            served = choice["logprobs"]["token_logprobs"][row["completion_start"] :]
            differences += [abs(a - b) for a, b in zip(served, row["logprobs"], strict=True)]

    assert max(differences) < bound
    assert max(differences) > 1e-5  # else it was fp32 that answered


def test_a_base_in_4_bits_is_tuned_served_and_exported(tmp_path: Path) -> None:
    home = tmp_path / "home"
    put_base(home, "ada", make_base(tmp_path / "base", OWN["llama"]))
    assert main(["models", "quantize", "ada", "--as", "small", "--home", str(home)]) == 0
    with Server(home) as server, server.client() as client:
        asked = {"model": "small", "training_file": upload(client, reviews(16, 1)), "n_epochs": 2}
        job = wait_for(client, client.post("fine-tunes", body=asked)["id"])
        assert job["status"] == "succeeded", messages(job)  # so it passed the gate

        scored = []
        for model in (job["fine_tuned_model"], "small", "ada"):
            question = {"model": model, "prompt": "a fine day ->", "max_tokens": 0, "echo": True, "logprobs": 0}
            (choice,) = client.post("completions", body=question)["choices"]
            scored.append(choice["logprobs"]["token_logprobs"][1:])
        assert scored[0] != scored[1] != scored[2]

        with (tmp_path / "merged.zip").open("wb") as file:
            client.download("models", job["fine_tuned_model"], "weights", to=file, format="merged")
    with ZipFile(tmp_path / "merged.zip") as package:
        package.extractall(tmp_path / "merged")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)  # plain: no 4 bits in it
    ids = torch.tensor(Tokenizer.from_folder(tmp_path / "merged").encode("a fine day ->"))
    with torch.no_grad():
        logprobs_TV = network(ids[None]).logits[0].log_softmax(-1)
    assert logprobs_TV[range(len(ids) - 1), ids[1:]].tolist() == pytest.approx(scored[0], abs=1e-4)
