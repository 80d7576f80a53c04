"""`tunesmith models pull` and `check` as a person and a program see them, against a hub on this machine."""

from __future__ import annotations

import errno
import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core import hub as local
from tunesmith.cli.main import main
from tunesmith.core.catalogue import hub_folder, read_catalogue
from tunesmith.core.pull import pulling

COMMIT = local.COMMIT


@pytest.fixture
def remote(tiny_base: Path) -> Iterator[local.Hub]:
    with local.serving(local.Hub(tiny_base)) as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path, remote: local.Hub, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TUNESMITH_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", remote.url)
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path))
    return tmp_path


def test_pull_then_check(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "pull", "someone/tiny", "--as", "curie"]) == 0
    told = capsys.readouterr().out
    assert f"curie is someone/tiny at {COMMIT}, in {hub_folder(home, 'someone/tiny', COMMIT)}." in told
    assert re.search(r"^config\.json: \d+ bytes, sha256 [0-9a-f]{12}\.\.\.$", told, re.MULTILINE)
    assert "licence apache-2.0" in told
    assert main(["models", "check", "curie", "ada"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.sub(" +", " ", lines[0]) == "base type weights on disk context serve / tune rate findings"
    assert re.fullmatch(r"curie +llama +0\.5 M F32 +2\.\d MB +2,048 +0\.9 / 0\.\d GiB +0\.\d+  none", lines[1])
    (hub_folder(home, "someone/tiny", COMMIT) / "config.json").write_text("{")
    assert main(["models", "check"]) == 1
    told = capsys.readouterr().out
    assert "curie: error: config.json is not JSON" in told
    assert "curie: error: config.json has the sha256" in told


def test_machines_get_json(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "pull", "someone/tiny", "--json"]) == 0
    pulled = json.loads(capsys.readouterr().out)
    assert (pulled["name"], pulled["hub"], pulled["revision"]) == ("tiny", "someone/tiny", COMMIT)
    assert set(pulled["sha256"]) == {"config.json", "tokenizer.json", "model.safetensors"}
    shutil.rmtree(pulled["folder"])
    assert main(["models", "check", "tiny", "--json"]) == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["name"], report["ok"], report["parameters"]) == ("tiny", False, None)
    assert [finding["level"] for finding in report["findings"]] == ["error"]


def test_everything_that_is_not_here_is_pulled_at_its_commit(
    home: Path, remote: local.Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "pull"]) == 0
    assert "is here" in capsys.readouterr().out
    assert remote.asked == []
    (home / "bases.toml").write_text(f'[a]\nhub = "someone/tiny"\nrevision = "{COMMIT}"\n[b]\nfolder = "gone"\n')
    assert main(["models", "pull"]) == 0
    assert read_catalogue(home)["a"].folder.is_dir()
    assert main(["models", "pull", "--as", "x"]) == 2
    assert "go with a repository" in capsys.readouterr().err


def test_refusals_are_sentences(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, code, reason in [
        (["pull", "gpt2"], 1, "openai-community/gpt2 say"),
        (["pull", "someone/else"], 1, "shows no repository someone/else"),
        (["pull", "someone/tiny", "--revision", "v9"], 1, "no revision 'v9'"),
        (["check", "nothing"], 2, "nothing is no base of"),
    ]:
        assert main(["models", *words]) == code
        assert reason in capsys.readouterr().err
    (home / "bases.toml").write_text("[x]\nhub = 'a/b'\nrevision = 'main'\n")
    for words, code in [(["pull", "someone/tiny"], 1), (["pull"], 2), (["check"], 2)]:
        assert main(["models", *words]) == code
        assert "40 hexadecimal digits" in capsys.readouterr().err


def test_a_token_is_taken_from_the_environment(
    home: Path, remote: local.Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remote.token = "hf_secret"
    assert main(["models", "pull", "someone/tiny"]) == 1
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["models", "pull", "someone/tiny"]) == 0
    told = capsys.readouterr()
    assert "hf_secret" not in told.out + told.err + (home / "bases.toml").read_text()


@pytest.mark.parametrize("variable", ["TUNESMITH_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_no_connection_is_made(
    home: Path,
    remote: local.Hub,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, "1")
    assert main(["models", "pull", "someone/tiny"]) == 1
    assert "Offline mode is on" in capsys.readouterr().err
    assert remote.asked == []
    assert not (home / "bases").exists()
    monkeypatch.setenv(variable, "perhaps")
    assert main(["models", "pull", "someone/tiny"]) == 2
    assert f"{variable}='perhaps'" in capsys.readouterr().err


def test_checking_makes_no_connection_at_all(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was made")

    main(["models", "pull", "someone/tiny"])
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert main(["models", "check"]) == 0
    with pytest.raises(AssertionError, match="a connection was made"):  # the guard works
        main(["models", "pull", "someone/tiny"])


def test_a_log_hears_where_a_large_file_is(
    home: Path, remote: local.Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tunesmith.cli.pull.LARGE_BYTES", 0)
    remote.cut_after = [500_000, 0, 0, 0, 0]
    monkeypatch.setattr("tunesmith.core.hub.TRIES", 1)
    assert main(["models", "pull", "someone/tiny"]) == 1
    told = capsys.readouterr()
    assert re.search(r"model\.safetensors: 1\d% of 2,\d+,\d+ bytes", told.out)
    assert "the same command goes on from there" in told.err
    remote.cut_after = []
    assert main(["models", "pull", "someone/tiny"]) == 0
    assert "model.safetensors: going on after 500,000 of 2," in capsys.readouterr().out


def test_quantize_makes_a_base_of_its_own(tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = f'[mine]\nfolder = "{tiny_base}"\nlearning_rate = 0.001\ncontext_tokens = 512\n'
    (tmp_path / "bases.toml").write_text(entry + "price_per_1k_training_tokens = 2\n")
    home = ["--home", str(tmp_path)]
    assert main(["models", "quantize", "mine", *home]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^model\.safetensors: [\d,]+ bytes -> [\d,]+$", told, re.MULTILINE)
    assert f"mine-4bit is mine in 4 bits, in {tmp_path / 'bases' / 'mine-4bit'}." in told
    made = read_catalogue(tmp_path)["mine-4bit"]
    assert (made.learning_rate, made.context_tokens, made.price_per_1k_training_tokens) == (0.001, 512, 2)
    assert set(made.sha256) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert main(["models", "check", "mine", "mine-4bit", *home]) == 0
    lines = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert [line[2] for line in lines[1:]] == ["0.5 M F32", "0.5 M F32,NF4"]  # most of it is the embedding

    assert main(["models", "quantize", "mine", "--as", "other", "--json", *home]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {
        "name": "other",
        "base": "mine",
        "folder": str(tmp_path / "bases" / "other"),
        "sha256": made.sha256,
    }
    files = [tmp_path / "bases" / name / "model.safetensors" for name in ("mine-4bit", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (["nobody"], "nobody is no base of "),
        (["away"], "It is not on this machine yet: tunesmith models pull org/away"),
        (["gone"], "/nowhere is not there."),
        (["mine", "--as", "UPPER"], "'UPPER' cannot name a base"),
        (["mine", "--as", "curie"], "curie is a base of "),
        (["mine", "--as", "gone"], "gone is a base of "),
        (["mine", "--as", "taken"], "taken is there already"),
        (["odd"], "odd cannot be brought to 4 bits: model_type 'gpt2' is not one of"),
    ],
)
def test_what_is_not_quantized_is_said_and_nothing_left(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], asked: list[str], reason: str
) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "bases" / "taken").mkdir(parents=True)
    (tmp_path / "bases" / "mine-4bit.part").mkdir()  # the name of another base
    entries = f'[mine]\nfolder = "{tiny_base}"\n[odd]\nfolder = "odd"\n[gone]\nfolder = "/nowhere"\n'
    entries += f'[away]\nhub = "org/away"\nrevision = "{COMMIT}"\n'
    (tmp_path / "bases.toml").write_text(entries)
    assert main(["models", "quantize", *asked, "--home", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err
    assert (tmp_path / "bases.toml").read_text() == entries
    assert {path.name for path in (tmp_path / "bases").iterdir()} - {".pull.lock"} == {"taken", "mine-4bit.part"}


def test_one_base_is_added_at_a_time(tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bases.toml").write_text(f'[mine]\nfolder = "{tiny_base}"\n')
    with pulling(tmp_path):
        assert main(["models", "quantize", "mine", "--home", str(tmp_path)]) == 1
    assert "Another base is being added" in capsys.readouterr().err


def test_a_base_that_cannot_be_named_is_not_left_in_the_way(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bases.toml").write_text(f'[mine]\nfolder = "{tiny_base}"\n')

    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("tunesmith.core.catalogue.write_bytes", refuse)
        assert main(["models", "quantize", "mine", "--home", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "mine-4bit was not added." in told
    assert "bases.toml cannot be written: Permission denied." in told
    assert main(["models", "quantize", "mine", "--home", str(tmp_path)]) == 0
