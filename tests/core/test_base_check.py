"""What `models check` finds: nothing in sound folders, and each fault by name."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.architectures import OWN, make_base
from tests.core.test_pull import configure, drop, shard
from tunesmith.core.architectures import ForwardPass, architecture_of, is_fourbit
from tunesmith.core.base_check import Report, base_names, check_base
from tunesmith.core.bases import DEFAULT_LEARNING_RATE
from tunesmith.core.catalogue import hub_folder, put
from tunesmith.decoder import fourbit, loading
from tunesmith.decoder.llama import MODEL_TYPES, LlamaConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


FOURBIT = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
DOWN, EMBEDDING = "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"


def packed(name: str) -> dict[str, Any]:
    """What stands for a weight in 4 bits, as far as headers tell."""
    return {name: np.zeros((1024, 1), np.uint8), f"{name}.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8)}


@pytest.fixture
def home(tmp_path: Path, tiny_base: Path) -> Path:
    """A home whose only entry, `mine`, is a copy of the tiny base."""
    shutil.copytree(tiny_base, tmp_path / "mine")
    (tmp_path / "bases.toml").write_text('[mine]\nfolder = "mine"\n')
    return tmp_path


def told(report: Report) -> str:
    return "\n".join(f"{finding.level}: {finding.message}" for finding in report.findings)


def test_the_box_is_sound(tmp_path: Path) -> None:
    assert base_names(tmp_path) == ["ada", "babbage", "curie", "davinci"]
    report = check_base(tmp_path, "ada")
    assert (report.ok, report.findings) == (True, [])
    assert (report.model_type, report.forward_pass, report.dtypes) == ("llama", ForwardPass.OWN, ("F32",))
    assert (report.context_tokens, report.vocabulary_size) == (2048, 16_384)
    assert report.parameters is not None and report.serving_bytes is not None
    assert report.serving_bytes > 4 * report.parameters


def test_what_a_person_asks_for_is_counted_from_the_headers(home: Path, tiny_base: Path) -> None:
    report = check_base(home, "mine")
    arrays = load_file(tiny_base / "model.safetensors")
    assert report.findings == []
    assert report.parameters == sum(array.size for array in arrays.values())
    assert report.size_bytes == (tiny_base / "model.safetensors").stat().st_size
    assert (report.folder, report.learning_rate) == (home / "mine", DEFAULT_LEARNING_RATE)


def weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = dict(load_file(folder / "model.safetensors"))
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        definition = json.loads((folder / "tokenizer.json").read_text())
        change(definition)
        (folder / "tokenizer.json").write_text(json.dumps(definition))

    return apply


def forget_the_end(definition: dict[str, Any]) -> None:
    definition["added_tokens"] = []
    definition["model"]["vocab"].pop("<|endoftext|>")


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (shutil.rmtree, r"error: folder .*mine is not there"),
        (drop("config.json"), r"error: config\.json is not there"),
        (write("config.json", b"{"), r"error: config\.json is not JSON"),
        (drop("tokenizer.json"), r"error: there is no tokenizer\.json, the one form"),
        (write("tokenizer.json", b"{"), r"error: tokenizer\.json cannot be used: tokenizer\.json is not JSON"),
        (write("tokenizer.json", b"[" * 100_000), r"error: tokenizer\.json cannot be used"),
        (tokenizer(lambda d: d.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})), "byte-level"),
        (tokenizer(forget_the_end), r"cannot be used: no end of a text is known"),
        (drop("model.safetensors"), r"error: there is no \*\.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            r"pytorch_model\.bin can run code when read, and never is",
        ),
        (truncate, r"error: model\.safetensors is cut short: 1,000 of"),
        (write("model.safetensors", b"\xff" * 100), r"error: model\.safetensors claims a header of"),
        (lambda folder: shard(folder, without="model-00002-of-00002.safetensors"), r"model-00002-of-00002.*not there"),
        (
            lambda folder: shutil.copy(folder / "model.safetensors", folder / "copy.safetensors"),
            "another file holds too",
        ),
        (weights(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), r"lack model\.layers\.1\.mlp\.up_proj\.weight"),
        (
            weights(lambda t: t.update({"model.embed_tokens.weight": np.zeros((9, 32), np.float32)})),
            "for 9: they do not",
        ),
        (
            weights(lambda t: t.update({"model.embed_tokens.weight": np.zeros((9, 32), np.float32)})),
            "vocab_size 16,384",
        ),
        (
            weights(lambda t: t.update({"model.norm.weight": np.zeros((32,), np.int8)})),
            r"norm\.weight is stored as I8: quant",
        ),
        (
            lambda folder: [
                weights(lambda t: t.update({"model.embed_tokens.weight": np.zeros((40_000, 32), np.float32)}))(folder),
                configure(vocab_size=40_000)(folder),
            ],
            "note: the model has 40,000 rows and the tokenizer 16,384",
        ),
        (configure(num_hidden_layers=10**15), "num_hidden_layers 1000000000000000, which is no number of layers"),
        (configure(num_hidden_layers="2"), "num_hidden_layers '2'"),
        (configure(model_type=None), "error: config.json names no model_type"),
        (configure(model_type="no-such-model"), "error: no forward pass for model_type 'no-such-model'"),
        (configure(model_type="x/../y"), "error: no forward pass"),
        (
            configure(model_type="tiny", auto_map={"AutoModel": "org/x--modeling_x.X"}),
            r"modeling_x\.py.*never run here",
        ),
        (configure(quantization_config={"bits": 4}), "error: the weights are quantised"),
        (
            weights(lambda t: t.update({DOWN: np.zeros((64, 32), np.float32)})),
            r"error: model\.layers\.1\.mlp\.down_proj\.weight has the shape \[64, 32\], and config",
        ),
        (
            weights(lambda t: t.update(packed(DOWN))),
            r"error: model\.layers\.1\.mlp\.down_proj\.weight is stored as U8: quant",
        ),
        (
            lambda folder: [configure(**FOURBIT)(folder), weights(lambda t: t.update(packed(EMBEDDING)))(folder)],
            r"error: model\.embed_tokens\.weight is stored as U8: quant",
        ),
        (
            configure(model_type="gemma2", attn_logit_softcapping=50.0),
            r"error: its scores are soft-capped \(attn_logit",
        ),
        (configure(max_position_embeddings=None), "note: config.json does not say how many tokens"),
    ],
)
def test_each_fault_is_found(home: Path, change: Callable[[Path], object], finding: str) -> None:
    change(home / "mine")
    report = check_base(home, "mine")
    assert re.search(finding, told(report)), told(report)
    assert report.ok == ("error:" not in told(report))


def test_shards_add_up(home: Path, tiny_base: Path) -> None:
    one = check_base(home, "mine")
    shard(home / "mine")
    two = check_base(home, "mine")
    assert (two.findings, two.parameters) == ([], one.parameters)
    shutil.copy(tiny_base / "model.safetensors", home / "mine" / "extra.safetensors")
    assert "extra.safetensors is not in model.safetensors.index.json and is read" in told(check_base(home, "mine"))


def test_keys_of_the_entry_count(home: Path) -> None:
    digest = hashlib.sha256((home / "mine" / "config.json").read_bytes()).hexdigest()
    entry = '[mine]\nfolder = "mine"\ncontext_tokens = 512\nlearning_rate = 0.01\n[mine.sha256]\n'
    entry += f'"config.json" = "{digest}"\n'
    (home / "bases.toml").write_text(entry)
    report = check_base(home, "mine")
    assert (report.findings, report.context_tokens, report.learning_rate) == ([], 512, 0.01)
    (home / "bases.toml").write_text(
        entry.replace(digest, "0" * 64).replace("512", "4096") + '"gone.json" = "' + digest + '"'
    )
    findings = told(check_base(home, "mine"))
    assert f"config.json has the sha256 {digest}, bases.toml says 000" in findings
    assert "gone.json has a digest in bases.toml and cannot be read" in findings
    assert "context_tokens is 4096, and the model reads 2048" in findings


def test_a_hub_model_that_is_not_here_and_one_with_links(home: Path, tiny_base: Path) -> None:
    put(home, "far", {"hub": "org/name", "revision": COMMIT}, {})
    assert f"error: not pulled to this machine; to get it: tunesmith models pull org/name --revision {COMMIT}" in told(
        check_base(home, "far")
    )
    folder = hub_folder(home, "org/name", COMMIT)
    shutil.copytree(tiny_base, folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tiny_base / "model.safetensors")
    assert told(check_base(home, "far")).startswith("error: model.safetensors is a link to /")
    # A folder of one's own may be made of links: the cache of the hub's library is.
    (home / "bases.toml").write_text(f'[own]\nfolder = "{folder}"\n')
    assert check_base(home, "own").findings == []


LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
    "rms_norm_eps": 1e-5,
}
STRETCHED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    "fields",
    [
        *({"model_type": kind} for kind in (*MODEL_TYPES, "gpt2", "gemma", "olmo2")),
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"rope_type": "llama3"} | STRETCHED},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    ],
    ids=json.dumps,
)
def test_the_forward_pass_is_the_one_that_the_decoder_takes(fields: dict[str, Any]) -> None:
    config = LLAMA | fields
    try:
        LlamaConfig.from_json(config)
        own = True
    except ValueError:
        own = False
    assert (architecture_of(config).forward_pass is ForwardPass.OWN) == own


def test_other_types_go_through_transformers_where_it_is_installed() -> None:
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    for kind in ("gpt2", "gpt_neox", "opt", "gemma", "olmo2", "phi"):
        assert architecture_of({"model_type": kind}).forward_pass is ForwardPass.TRANSFORMERS


def test_what_transformers_has_and_no_test_here_is_not_called_sound(home: Path) -> None:
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    for kind, noted in (("gemma", False), ("olmo2", True)):
        configure(model_type=kind)(home / "mine")
        report = check_base(home, "mine")
        assert report.forward_pass is ForwardPass.TRANSFORMERS
        assert ("tried when it is first loaded" in told(report)) == noted


def test_without_transformers_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.core.architectures._transformers", lambda: None)
    found = architecture_of({"model_type": "gpt2"})
    assert found.forward_pass is ForwardPass.NONE
    assert found.reason is not None and found.reason.endswith("pip install 'tunesmith[transformers]'")


@pytest.mark.parametrize(("kind", "tied"), [*((kind, True) for kind in OWN), ("llama", False)])
def test_shapes_are_those_that_loading_holds_weights_to(tmp_path: Path, kind: str, tied: bool) -> None:
    base = make_base(tmp_path / "base", OWN[kind] | {"tie_word_embeddings": tied})
    (tmp_path / "bases.toml").write_text('[mine]\nfolder = "base"\n')
    assert check_base(tmp_path, "mine").findings == []
    state = load_file(base / "model.safetensors")
    for name in state:
        if name.startswith("model.layers.0."):  # the other layer stands for any
            continue
        save_file(state | {name: np.zeros((3, *state[name].shape[1:]), np.float32)}, base / "model.safetensors")
        assert f"error: {name} has the shape" in told(check_base(tmp_path, "mine"))
        with pytest.raises(ValueError, match=f"^{name} has the shape"):
            loading.load(base)


def test_4_bits_need_a_library_and_a_forward_pass_of_our_own(
    home: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((tiny_base / "config.json").read_text()) | FOURBIT
    assert architecture_of(config).forward_pass == ForwardPass.OWN
    assert "only those of the Llama family" in str(architecture_of(config | {"model_type": "gpt2"}).reason)
    eight = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    assert "4 bits of bitsandbytes" in str(architecture_of(config | eight).reason)
    for quantised in (FOURBIT, eight, {}, {"quantization_config": {"quant_method": "gptq", "load_in_4bit": True}}):
        try:
            known = fourbit.declared(quantised)
        except ValueError:
            known = False
        assert is_fourbit(quantised) == known  # both say the same
    monkeypatch.setattr("tunesmith.core.architectures.find_spec", lambda name: None)
    assert "pip install 'tunesmith[bitsandbytes]'" in str(architecture_of(config).reason)
