"""Weights on their way out and in, with the engine that serves them."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.engine.models import make_adapter, plain_logprobs
from tests.tiny import make_tiny_base
from tests.wire.harness import client_of, create_job, error_of, finish, parts_of, settings_for
from tunesmith.decoder import gguf_file
from tunesmith.decoder.llama import load
from tunesmith.server import Parts
from tunesmith.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio
PROMPT = [17, 300, 4_000, 5, 6, 7]
NATS = 1e-4


@pytest.fixture
async def served(tmp_path: Path, tiny_base: Path) -> AsyncIterator[Parts]:
    """A server with the real engine."""
    settings = settings_for(tmp_path / "home", tiny_base, engine="embedded", engine_threads=1)
    async with parts_of(settings) as built:
        yield built


@pytest.fixture
async def client(served: Parts) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(served) as opened:
        yield opened


def package(folder: Path) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as opened:
        for path in folder.iterdir():
            opened.write(path, path.name)
    return out.getvalue()


async def bring(client: httpx.AsyncClient, content: bytes, **fields: str) -> httpx.Response:
    files = {"file": ("model.zip", content)}
    return await client.post("/v1/models", data={"model": "ada", **fields}, files=files)


async def numbers(client: httpx.AsyncClient, model: str) -> list[float]:
    """Log-probabilities of PROMPT's tokens after the first."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = (await client.post("/v1/completions", json=body)).json()
    found: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
    return found


def expected(base: Path, adapter: Path | None) -> list[float]:
    table = plain_logprobs(base, adapter, PROMPT)
    return [float(table[place, token]) for place, token in enumerate(PROMPT[1:])]


@torch.inference_mode()
def plain_transformers(model: torch.nn.Module) -> list[float]:
    """Log-probabilities of PROMPT's tokens after the first."""
    ids = torch.tensor([PROMPT])
    table = model.eval()(input_ids=ids).logits[0].float().log_softmax(-1)
    return [float(table[place, token]) for place, token in enumerate(PROMPT[1:])]


async def test_out_and_in_again_in_every_form_says_the_same(
    client: httpx.AsyncClient, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", seed=3)  # one that covers the embedding
    answer = await bring(client, package(adapter), suffix="From Elsewhere")
    assert answer.status_code == 200, answer.text
    model = answer.json()
    assert model["id"].startswith("ada:ft-personal:from-elsewhere-")
    assert (model["root"], model["parent"]) == ("ada", "ada")
    said = expected(tiny_base, adapter)
    assert await numbers(client, model["id"]) == pytest.approx(said, abs=NATS)

    for kind in ("adapter", "merged"):
        got = await client.get(f"/v1/models/{model['id']}/weights", params={"format": kind})
        assert got.status_code == 200
        assert got.headers["content-type"] == "application/zip"
        assert int(got.headers["content-length"]) == len(got.content)
        assert "from-elsewhere" in got.headers["content-disposition"]
        with zipfile.ZipFile(io.BytesIO(got.content)) as opened:
            opened.extractall(tmp_path / kind)
        again = (await bring(client, got.content)).json()["id"]
        assert await numbers(client, again) == pytest.approx(said, abs=NATS)
        whole = await client.get(f"/v1/models/{again}/weights")
        assert whole.content == got.content  # what was brought is what is kept, to the byte
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == (
        adapter / "adapter_model.safetensors"
    ).read_bytes()
    assert expected(tmp_path / "merged", None) == pytest.approx(said, abs=NATS)
    base = await client.get("/v1/models/ada/weights")
    assert sorted(zipfile.ZipFile(io.BytesIO(base.content)).namelist()) == sorted(
        path.name for path in tiny_base.iterdir()
    )
    refused = await client.get("/v1/models/ada/weights", params={"format": "adapter"})
    assert "`ada` has no adapter" in error_of(refused)["message"]
    assert (await client.delete(f"/v1/models/{model['id']}")).json()["deleted"] is True
    assert (await client.get(f"/v1/models/{model['id']}/weights")).status_code == 404


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
async def test_peft_and_transformers_on_the_other_side(
    client: httpx.AsyncClient, tiny_base: Path, tmp_path: Path
) -> None:
    """An adapter that PEFT saved comes in; what goes out, PEFT and transformers load and say the same."""
    options = LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_base), options)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:  # zeros, as they are made
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    said = plain_transformers(theirs)
    assert said != pytest.approx(expected(tiny_base, None), abs=0.1)
    name = (await bring(client, package(tmp_path / "theirs"))).json()["id"]
    assert await numbers(client, name) == pytest.approx(said, abs=NATS)
    for kind in ("adapter", "merged"):
        got = await client.get(f"/v1/models/{name}/weights", params={"format": kind})
        with zipfile.ZipFile(io.BytesIO(got.content)) as opened:
            opened.extractall(tmp_path / kind)
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_base), str(tmp_path / "adapter"))
    assert plain_transformers(again) == pytest.approx(said, abs=NATS)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert plain_transformers(merged) == pytest.approx(said, abs=NATS)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("yes") == Tokenizer.from_folder(tiny_base).encode(
        "yes"
    )


async def test_out_as_gguf_the_file_says_the_same(client: httpx.AsyncClient, tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", seed=3)
    name = (await bring(client, package(adapter))).json()["id"]
    merged = await client.get(f"/v1/models/{name}/weights", params={"format": "merged"})
    whole = (await bring(client, merged.content)).json()["id"]
    files = []
    for model in (name, whole):  # an adapter on its base, and one that is all weights
        got = await client.get(f"/v1/models/{model}/weights", params={"format": "gguf", "precision": "q8_0"})
        assert got.headers["content-disposition"].endswith(".gguf")
        assert got.headers["tunesmith-checked"].startswith(
            "Read back, the file's log-probabilities differ by at most 0."
        )
        files.append(tmp_path / f"{len(files)}.gguf")
        files[-1].write_bytes(got.content)
    like = load(tiny_base)
    one, other = (gguf_file.read(path, replace(like, config=replace(like.config, tied=False))) for path in files)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.embedding_VD, one.head_VD)  # the adapter covers what is read, not what is predicted
    assert list((tmp_path / "home" / "uploads").iterdir()) == []


async def test_what_cannot_be_written_as_gguf_is_refused_with_the_reason(tmp_path: Path, tiny_base: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    definition = json.loads((base / "tokenizer.json").read_text())
    definition["pre_tokenizer"]["use_regex"] = False
    (base / "tokenizer.json").write_text(json.dumps(definition))
    settings = settings_for(tmp_path / "home", base, engine="scripted")
    async with parts_of(settings) as parts, client_of(parts) as client:
        refused = await client.get("/v1/models/ada/weights", params={"format": "gguf"})
    assert refused.status_code == 400
    assert "`ada` cannot be written as GGUF: its tokenizer splits texts in a way" in error_of(refused)["message"]


async def test_what_does_not_fit_is_refused_and_leaves_nothing(
    client: httpx.AsyncClient, served: Parts, tiny_base: Path, tmp_path: Path
) -> None:
    other = make_tiny_base(tmp_path / "other", layers=3)
    too_deep = make_adapter(other, tmp_path / "deep", seed=1)
    endless = make_adapter(tiny_base, tmp_path / "endless", seed=1)
    state = load_file(endless / "adapter_model.safetensors")
    first = next(iter(state))
    save_file(state | {first: torch.full_like(state[first], torch.inf)}, endless / "adapter_model.safetensors")
    prefix = make_adapter(tiny_base, tmp_path / "prefix", seed=1)
    config = json.loads((prefix / "adapter_config.json").read_text())
    (prefix / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "PREFIX_TUNING"}))
    for folder, reason in [
        (too_deep, "does not fit its base"),
        (other, "another shape than its base"),
        (endless, "says no numbers"),
        (prefix, "PREFIX_TUNING"),
    ]:
        answer = await bring(client, package(folder))
        error = error_of(answer)
        assert answer.status_code == 400
        assert reason in error["message"]
        assert str(tmp_path) not in error["message"]
        assert error["param"] == "file"
    assert len((await client.get("/v1/models")).json()["data"]) == 4
    assert list((tmp_path / "home" / "uploads").iterdir()) == []
    assert not (tmp_path / "home" / "adapters").exists() or list((tmp_path / "home" / "adapters").iterdir()) == []
    assert (await client.post("/v1/completions", json={"model": "ada", "prompt": "x"})).status_code == 200


async def test_the_form_is_checked(client: httpx.AsyncClient, tiny_base: Path, tmp_path: Path) -> None:
    content = package(make_adapter(tiny_base, tmp_path / "adapter", seed=2))
    for fields, param in [
        ({"model": ""}, "model"),
        ({"name": "x"}, "name"),
        ({"suffix": "..."}, "suffix"),
        ({"suffix": "x" * 41}, "suffix"),
    ]:
        assert error_of(await bring(client, content, **fields))["param"] == param
    assert (await bring(client, content, model="nope")).status_code == 404
    tuned = (await bring(client, content)).json()["id"]
    assert "is a tuned model" in error_of(await bring(client, content, model=tuned))["message"]
    for params, param in [
        ({"format": "onnx"}, "format"),
        ({"format": "gguf", "precision": "q4"}, "precision"),
        ({"format": "merged", "precision": "bf16"}, "precision"),
        ({"precision": "f32"}, "precision"),
    ]:
        refused = await client.get("/v1/models/ada/weights", params=params)
        assert (refused.status_code, error_of(refused)["param"]) == (400, param)


async def test_weights_are_the_organisations_own(
    parts: Parts, stranger: httpx.AsyncClient, member: httpx.AsyncClient, tmp_path: Path
) -> None:
    async with client_of(parts) as owner:
        await create_job(owner)
        parts.services.jobs.enqueue()
        claim = parts.services.jobs.claim("here", 60.0)
        assert claim is not None
        finish(parts, claim, tmp_path)
        name = (await owner.get(f"/v1/fine-tunes/{claim.job.id}")).json()["fine_tuned_model"]
    assert (await stranger.get(f"/v1/models/{name}/weights")).status_code == 404
    got = await member.get(f"/v1/models/{name}/weights")
    assert zipfile.ZipFile(io.BytesIO(got.content)).read("adapter_model.safetensors") == b"weights"
