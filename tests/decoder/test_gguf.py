"""GGUF files: what is written, what is refused, and llama.cpp on them where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import vocabularies
from tests.decoder.test_llama import SHAPES
from tests.engine.models import make_adapter
from tunesmith.decoder import export, gguf_check, gguf_file, gguf_words, loading
from tunesmith.decoder.gguf_file import Precision
from tunesmith.decoder.llama import Llama
from tunesmith.tokenizer import Tokenizer

torch.set_num_threads(1)
ROWS = vocabularies.VOCABULARY_SIZE + 3
"""A few rows more than there are tokens, as many checkpoints have."""
needs_llama_cpp = pytest.mark.skipif(shutil.which(gguf_check.SERVER) is None, reason="llama.cpp is not installed")


@pytest.fixture(autouse=True)
def without_llama_cpp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked by the tests that are about it alone: what else they show must not depend on the machine."""
    if request.node.get_closest_marker("skipif") is None:
        monkeypatch.setattr(shutil, "which", lambda program: None)


def checkpoint(folder: Path, shape: str, *, tied: bool = True) -> Path:
    """A random model with the tokenizer of GPT-2's kind."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        shape.split()[0],
        vocab_size=ROWS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-6,
        **SHAPES[shape],
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that norms, biases and rotations all matter
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    vocabularies.gpt2(folder)
    (folder / "config.json").write_text(json.dumps(written | {"eos_token_id": 0, "bos_token_id": 0}))
    return folder


def written(folder: Path, path: Path, precision: Precision) -> Llama:
    model = loading.load(folder)
    assert isinstance(model, Llama)
    gguf_file.write(model, gguf_words.words_of(folder, ROWS), path, precision, name="x")
    return model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_is_read_back_bit_by_bit(shape: str, tied: bool, tmp_path: Path) -> None:
    model = written(checkpoint(tmp_path / "base", shape, tied=tied), tmp_path / "x.gguf", Precision.F32)
    again = gguf_file.read(tmp_path / "x.gguf", model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@needs_llama_cpp
@pytest.mark.parametrize("shape", ["llama 3", "qwen2", "qwen3"])
def test_llama_cpp_says_the_same(shape: str, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", shape, tied=shape != "qwen2")
    path = tmp_path / "x.gguf"
    found = gguf_check.check(path, written(base, path, Precision.F32), Tokenizer.from_folder(base), Precision.F32)
    assert found.read_back == 0
    assert found.by_llama_cpp is not None
    assert found.by_llama_cpp < 1e-4


@needs_llama_cpp
def test_llama_cpp_is_what_finds_a_wrong_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, path = checkpoint(tmp_path / "base", "llama"), tmp_path / "x.gguf"
    with monkeypatch.context() as wrong:
        wrong.setattr(gguf_file, "_turned", lambda name, config: None)
        model = written(base, path, Precision.F32)
        with pytest.raises(gguf_check.NotTheSame, match=r"llama\.cpp computes from the file differ"):
            gguf_check.check(path, model, Tokenizer.from_folder(base), Precision.F32)
    path.write_bytes(b"GGUF but no more")
    with (
        pytest.raises(gguf_check.NotTheSame, match="does not load the file"),
        gguf_check.asked(str(shutil.which(gguf_check.SERVER)), path),
    ):
        pass


def test_smaller_files_are_the_model_rounded(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "llama")
    sizes, tokenizer = [], Tokenizer.from_folder(base)
    for precision, worst in [(Precision.F32, 0.0), (Precision.BF16, 0.3), (Precision.Q8_0, 1.0)]:
        path = tmp_path / f"{precision}.gguf"
        found = gguf_check.check(path, model := written(base, path, precision), tokenizer, precision)
        assert found.read_back <= worst
        assert "llama.cpp was not asked" in str(found)
        kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors}
        assert kinds.pop("output_norm.weight") == kinds.pop("blk.0.attn_norm.weight") == "f32"
        assert kinds["blk.1.ffn_down.weight"] == kinds["token_embd.weight"] == precision
        sizes.append(path.stat().st_size)
        first = path.read_bytes()
        gguf_file.write(model, gguf_words.words_of(base, ROWS), path, precision, name="x")
        assert path.read_bytes() == first
    assert sizes == sorted(sizes, reverse=True)


def test_a_file_of_another_model_is_found(tmp_path: Path) -> None:
    base, path = checkpoint(tmp_path / "base", "llama"), tmp_path / "x.gguf"
    model = written(base, path, Precision.F32)
    model.layers[0].down.mul_(1.1)
    with pytest.raises(gguf_check.NotTheSame, match="read back from the file differ from the model's by 0"):
        gguf_check.check(path, model, Tokenizer.from_folder(base), Precision.F32)


def test_tokens_are_described(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "llama")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    words = gguf_words.words_of(base, ROWS)
    assert (words.split, words.ending_id, words.begins_texts, words.beginning_id) == ("gpt-2", 0, False, 0)
    assert words.chat_template == "{{ messages }}"
    assert words.spellings[0] == "<|endoftext|>"
    assert words.kinds[0] is gguf.TokenType.CONTROL
    assert words.spellings[-1] == f"[PAD{ROWS - 1}]"
    assert words.kinds[-1] is gguf.TokenType.UNUSED
    assert words.kinds.count(gguf.TokenType.NORMAL) == Tokenizer.from_folder(base).vocabulary_size - 1
    assert all(part in words.spellings for merge in words.merges for part in merge.split(" "))
    path = tmp_path / "x.gguf"
    written(base, path, Precision.F32)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert tuple(fields["tokenizer.ggml.tokens"].contents()) == words.spellings
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (vocabularies.neox, "puts a space before a text"),
        (vocabularies.llama3, r"none of llama.cpp's gpt-2, llama-bpe, qwen2, smollm"),  # its words are not Meta's
        (vocabularies.mistral, "SentencePiece's kind"),
        (vocabularies.unigram, "SentencePiece's kind"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(make: object, reason: str, tmp_path: Path) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=reason):
        gguf_words.words_of(make(tmp_path), ROWS)


def test_known_ways_to_split_have_a_name(tmp_path: Path) -> None:
    base = vocabularies.gpt2(tmp_path)
    definition = json.loads((base / "tokenizer.json").read_text())
    letters = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    for name, digits, whole_words in [("llama-bpe", r"\p{N}{1,3}", True), ("qwen2", r"\p{N}", False)]:
        words = {"Regex": f"{letters}|{digits}|{rest}"}
        split = {"type": "Split", "pattern": words, "behavior": "Isolated", "invert": False}
        definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, plain]}
        for said in (whole_words, not whole_words):
            definition["model"]["ignore_merges"] = said
            (base / "tokenizer.json").write_text(json.dumps(definition))
            if said == whole_words:
                assert gguf_words.words_of(base, ROWS).split == name
            else:
                with pytest.raises(ValueError, match=r"none of llama\.cpp's"):
                    gguf_words.words_of(base, ROWS)


def test_the_command_writes_an_adapter_into_its_base(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, path = make_adapter(tiny_base, tmp_path / "adapter", seed=3), tmp_path / "x.gguf"
    assert export.main([str(tiny_base), str(path), "--adapter", str(adapter), "--gguf", "f32", "--name", "mine"]) == 0
    assert "differ by at most 0.00000 nats" in capsys.readouterr().out
    assert export.main([str(tiny_base), str(tmp_path / "merged"), "--adapter", str(adapter)]) == 0
    merged = loading.load(tmp_path / "merged")
    assert isinstance(merged, Llama)
    again = gguf_file.read(path, merged)
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), again.parameters(), strict=True))
    assert gguf.GGUFReader(path).fields["general.name"].contents() == "mine"


def test_without_the_package_there_is_a_sentence(tiny_base: Path, tmp_path: Path) -> None:
    program = "import sys; sys.modules['gguf'] = None; from tunesmith.decoder import export; sys.exit(export.main())"
    words = [sys.executable, "-c", program, str(tiny_base), str(tmp_path / "x.gguf"), "--gguf", "f32"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "pip install 'tunesmith[gguf]'" in done.stderr
