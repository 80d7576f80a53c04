"""Pulling from a hub that speaks real HTTP: what comes, what is refused, and what an interruption leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.core import hub as local
from tunesmith.core import pull as pulling_module
from tunesmith.core.base_check import check_base
from tunesmith.core.bases import Bases
from tunesmith.core.catalogue import hub_folder, read_catalogue
from tunesmith.core.hub import Hub, PullFailed, RemoteFile
from tunesmith.core.pull import Pulled, pull, pulling

COMMIT = local.COMMIT


class Heard:
    """What a pull told."""

    def __init__(self) -> None:
        self.began_at: list[tuple[str, int]] = []
        self.moved_bytes = 0
        self.stalls: list[str] = []

    def began(self, file: RemoteFile, have_bytes: int) -> None:
        self.began_at.append((file.name, have_bytes))

    def moved(self, change_bytes: int) -> None:
        self.moved_bytes += change_bytes

    def stalled(self, reason: str) -> None:
        self.stalls.append(reason)

    def ended(self, file: RemoteFile, sha256: str) -> None:
        pass


@pytest.fixture
def repository(tiny_base: Path, tmp_path: Path) -> Path:
    """A folder as a hub has it: a model, and much that nobody needs."""
    folder = tmp_path / "repository"
    shutil.copytree(tiny_base, folder)
    (folder / "README.md").write_text("# tiny")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    (folder / "consolidated.safetensors").write_bytes(b"the same again")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def remote(repository: Path) -> Iterator[local.Hub]:
    with local.serving(local.Hub(repository)) as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def get(
    home: Path,
    remote: local.Hub,
    revision: str | None = None,
    alias: str | None = None,
    *,
    name: str = "someone/tiny",
    token: str | None = None,
    heard: Heard | None = None,
    pauses_s: list[float] | None = None,
) -> Pulled:
    pauses_s = [] if pauses_s is None else pauses_s
    with pulling(home), Hub(remote.url, token, sleep=pauses_s.append) as hub:
        return pull(home, hub, name, revision, alias, heard or Heard())


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_model_comes_verified_pinned_and_usable(home: Path, remote: local.Hub, tiny_base: Path) -> None:
    pulled = get(home, remote)
    assert pulled.folder == hub_folder(home, "someone/tiny", COMMIT)
    assert names(pulled.folder) == {"config.json", "tokenizer.json", "model.safetensors"}
    for path in pulled.folder.iterdir():
        assert path.read_bytes() == (tiny_base / path.name).read_bytes()
        assert pulled.sha256[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
    entry = read_catalogue(home)["tiny"]
    assert (entry.hub, entry.revision, entry.sha256) == ("someone/tiny", COMMIT, pulled.sha256)
    assert (pulled.repository.licence, pulled.was) == ("apache-2.0", None)
    bases = Bases(home)
    assert bases.folder("tiny") == pulled.folder
    assert bases.get("tiny").note == "someone/tiny at 0123456789ab"
    assert check_base(home, "tiny").findings == []


def test_pulling_again_fetches_nothing_and_mends_what_is_damaged(home: Path, remote: local.Hub) -> None:
    folder = get(home, remote).folder
    before = len(remote.files())
    assert get(home, remote).fetched_bytes == 0
    assert len(remote.files()) == before
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/etc/hostname")
    get(home, remote)
    assert [one.path.rpartition("/")[2] for one in remote.files()[before:]] == ["config.json", "model.safetensors"]
    assert check_base(home, "tiny").findings == []


def test_a_cut_connection_is_taken_up_again(home: Path, remote: local.Hub, tiny_base: Path) -> None:
    size = (tiny_base / "model.safetensors").stat().st_size
    remote.cut_after = [100_000, 0, 50_000]
    heard, pauses_s = Heard(), list[float]()
    pulled = get(home, remote, heard=heard, pauses_s=pauses_s)
    ranges = [one.range for one in remote.asked if one.path == "/storage/model.safetensors"]
    assert ranges == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-"]
    assert pauses_s == [1, 2, 1]  # longer while nothing comes
    assert len(heard.stalls) == 3
    assert heard.moved_bytes == sum(path.stat().st_size for path in pulled.folder.iterdir())
    assert (pulled.folder / "model.safetensors").stat().st_size == size


def test_a_pull_that_gave_up_is_gone_on_with_by_the_next(home: Path, remote: local.Hub) -> None:
    remote.cut_after = [100_000, 0, 0, 0, 0]
    with pytest.raises(PullFailed, match=r"stopped coming after 100,000 of [\d,]+ bytes.*goes on from there"):
        get(home, remote)
    assert read_catalogue(home) == {}
    assert not hub_folder(home, "someone/tiny", COMMIT).exists()
    heard = Heard()
    before = len(remote.asked)
    get(home, remote, heard=heard)
    assert heard.began_at == [("model.safetensors", 100_000)]
    assert [one.range for one in remote.asked[before + 1 :]] == ["bytes=100000-"] * 2  # the hub, then its storage
    assert check_base(home, "tiny").findings == []
    assert names(home / "bases") >= {hub_folder(home, "someone/tiny", COMMIT).name, ".pull.lock"}
    assert not any(name.endswith(".part") for name in names(home))


def test_a_server_that_knows_no_ranges_sends_it_all_again(home: Path, remote: local.Hub) -> None:
    remote.cut_after, remote.ignores_ranges = [100_000], True
    heard = Heard()
    pulled = get(home, remote, heard=heard)
    assert heard.moved_bytes == sum(path.stat().st_size for path in pulled.folder.iterdir())
    assert check_base(home, "tiny").findings == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_other_content_than_listed_is_thrown_away(home: Path, remote: local.Hub, name: str) -> None:
    remote.corrupt = {name}
    with pytest.raises(PullFailed, match=f"{name} came with another digest"):
        get(home, remote)
    assert read_catalogue(home) == {}
    assert not any(path.startswith(f"bases/someone--tiny-0123456789ab.part/{name}") for path in names(home))
    remote.corrupt = set()
    assert get(home, remote).name == "tiny"


def test_more_bytes_than_listed_are_not_written(home: Path, remote: local.Hub, repository: Path) -> None:
    listing = remote.describe()
    next(one for one in listing["siblings"] if one["rfilename"] == "config.json")["size"] = 10
    remote.listing = {"siblings": listing["siblings"]}
    with pytest.raises(PullFailed, match=r"more bytes of config\.json than it said"):
        get(home, remote)
    assert max(path.stat().st_size for path in home.rglob("*.part") if path.is_file()) <= 10


def test_digests_that_the_user_pinned_count_for_more(home: Path, remote: local.Hub) -> None:
    home.mkdir()
    wrong = "ab" * 32
    (home / "bases.toml").write_text(
        f'[tiny]\nhub = "someone/tiny"\nrevision = "{COMMIT}"\nsha256 = {{ "config.json" = "{wrong}" }}\n'
    )
    with pytest.raises(PullFailed, match=rf"bases\.toml pins {wrong}"):
        get(home, remote)
    assert not hub_folder(home, "someone/tiny", COMMIT).exists()


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT])
def test_any_revision_is_pinned_by_its_commit(home: Path, remote: local.Hub, revision: str | None) -> None:
    get(home, remote, revision)
    assert read_catalogue(home)["tiny"].revision == COMMIT
    assert all(f"/resolve/{COMMIT}/" in one.path for one in remote.files())


def test_a_commit_is_not_exchanged_for_another(home: Path, remote: local.Hub) -> None:
    remote.listing = {"sha": "f" * 40}
    with pytest.raises(PullFailed, match="the hub answers with ffff"):
        get(home, remote, COMMIT)


def shard(repository: Path, *, without: str = "") -> None:
    """Cuts the weights in two, and leaves one of the files out."""
    tensors = load_file(repository / "model.safetensors")
    (repository / "model.safetensors").unlink()
    weight_map = {}
    for number, names_ in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names_}, repository / file)
        weight_map |= dict.fromkeys(names_, file)
    (repository / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (repository / without).unlink() if without else None


def test_shards_come_as_their_index_names_them(home: Path, remote: local.Hub, repository: Path) -> None:
    shard(repository)
    pulled = get(home, remote)
    assert names(pulled.folder) == {
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert check_base(home, "tiny").findings == []


def drop(*names_: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names_] and None


def configure(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def index(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(content) and None


AUTO_MAP = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyModel"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop("config.json"), r"has no config\.json"),
        (drop("tokenizer.json"), r"has no tokenizer\.json.*AutoTokenizer"),
        (
            drop("model.safetensors", "consolidated.safetensors"),
            r"only as pytorch_model\.bin.*can run code.*--revision",
        ),
        (
            drop("model.safetensors", "consolidated.safetensors", "pytorch_model.bin"),
            r"has no \*\.safetensors, the one form",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors"),
            r"has consolidated\.safetensors, weights\.safetensors and neither model\.safetensors",
        ),
        (configure(model_type="tiny", auto_map=AUTO_MAP), r"refused: .*configuration_tiny\.py, modeling_tiny\.py"),
        (lambda folder: (folder / "config.json").write_text("{'not': json}"), r"config\.json is not JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"{" + b" " * (1 << 20)), "no honest one"),
        (lambda folder: shard(folder, without="model-00002-of-00002.safetensors"), r"lacks model-00002-of-00002\."),
        (index('{"weight_map": {"a": "../../escape.safetensors"}}'), r"names '../../escape\.safetensors'"),
        (index('{"weight_map": {"a": "x\\u0000.safetensors"}}'), "lacks x"),
        (index("[]"), "holds no JSON object but a list"),
    ],
)
def test_what_is_refused(
    home: Path, remote: local.Hub, repository: Path, change: Callable[[Path], None], reason: str
) -> None:
    change(repository)
    with pytest.raises(PullFailed, match=reason):
        get(home, remote)
    assert read_catalogue(home) == {}
    assert remote.files(".safetensors") == []  # known before anything large is fetched


def test_code_of_a_known_architecture_is_left_where_it_is(home: Path, remote: local.Hub, repository: Path) -> None:
    configure(auto_map=AUTO_MAP)(repository)
    pulled = get(home, remote)
    assert not any(name.endswith(".py") for name in names(home))
    assert "it is not run" in check_base(home, pulled.name).findings[0].message
    assert check_base(home, pulled.name).ok


def test_a_full_disk_is_seen_before_the_weights_are_fetched(
    home: Path, remote: local.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling_module, "SPARE_BYTES", 1 << 60)
    with pytest.raises(PullFailed, match=r"Make room, or use another home"):
        get(home, remote)
    assert remote.files(".safetensors") == []


def test_gated_private_and_unknown(home: Path, remote: local.Hub) -> None:
    remote.gated = True
    with pytest.raises(PullFailed, match=r"is gated: accept its terms at http://127.*HF_TOKEN"):
        get(home, remote)
    remote.gated, remote.token = False, "hf_secret"
    with pytest.raises(PullFailed, match=r"shows no repository someone/tiny \(status 401\).*set HF_TOKEN"):
        get(home, remote)
    with pytest.raises(PullFailed, match="does not suffice"):
        get(home, remote, token="hf_other")
    with pytest.raises(PullFailed, match=r"shows no repository someone/else \(status 404\)"):
        get(home, remote, name="someone/else", token="hf_secret")
    with pytest.raises(PullFailed, match="no revision 'v9'"):
        get(home, remote, "v9", token="hf_secret")
    assert get(home, remote, token="hf_secret").name == "tiny"


def test_the_token_stays_with_the_hub(home: Path, remote: local.Hub) -> None:
    remote.token = "hf_secret"
    get(home, remote, token="hf_secret")
    assert {one.authorization for one in remote.asked if one.host == remote.url} == {"Bearer hf_secret"}
    assert {one.authorization for one in remote.asked if one.host == remote.storage_url} == {None}


def test_a_busy_hub_is_asked_again(home: Path, remote: local.Hub) -> None:
    remote.busy = 2
    pauses_s = list[float]()
    assert get(home, remote, pauses_s=pauses_s).name == "tiny"
    assert pauses_s == [1, 2]
    remote.busy = 3
    with pytest.raises(PullFailed, match="cannot be reached: the hub answers with status 503"):
        get(home, remote)


def test_an_address_that_is_no_hub(home: Path, remote: local.Hub) -> None:
    remote.listing = {"sha": "main"}
    with pytest.raises(PullFailed, match=r"names no commit\. HF_ENDPOINT"):
        get(home, remote)
    with pytest.raises(PullFailed, match="does not start with https://"):
        Hub("huggingface.co", None)


def test_names(home: Path, remote: local.Hub) -> None:
    assert get(home, remote, alias="curie").was is None
    assert get(home, remote).name == "tiny"
    for repository, alias, reason in [
        ("gpt2", None, "is no repository of the hub"),
        ("../etc/passwd", None, "is no repository of the hub"),
        ("someone/tiny", "Curie", "cannot name a base"),
        ("else/tiny", None, "tiny is someone/tiny in this home.*--as tiny"),
    ]:
        with pytest.raises(PullFailed, match=reason):
            get(home, remote, alias=alias, name=repository)
    (home / "bases.toml").write_text("[ada]\nfolder = '/models/mine'\nlearning_rate = 0.01\n")
    assert get(home, remote, alias="ada").was == "/models/mine"
    assert Bases(home).get("ada").learning_rate == 0.01


def test_two_pulls_at_once(home: Path, remote: local.Hub) -> None:
    with pulling(home), pytest.raises(PullFailed, match="Another base is being added"):
        get(home, remote)


def test_a_link_put_in_the_way_is_not_written_through(home: Path, remote: local.Hub, tmp_path: Path) -> None:
    part = hub_folder(home, "someone/tiny", COMMIT)
    part = part.with_name(part.name + ".part")
    part.mkdir(parents=True)
    (tmp_path / "precious").write_text("")
    (part / "config.json.part").symlink_to(tmp_path / "precious")
    with pytest.raises(PullFailed, match=r"config\.json\.part cannot be written"):
        get(home, remote)
    assert (tmp_path / "precious").read_text() == ""


def test_a_base_that_appears_is_used_without_a_new_start(home: Path, remote: local.Hub) -> None:
    home.mkdir()
    (home / "bases.toml").write_text(f'[curie]\nhub = "someone/tiny"\nrevision = "{COMMIT}"\n')
    bases = Bases(home)
    assert [base.name for base in bases.list()] == ["ada", "babbage", "davinci"]
    get(home, remote, COMMIT, "curie")
    assert bases.folder("curie") == hub_folder(home, "someone/tiny", COMMIT)
    assert [base.name for base in bases.list()] == ["ada", "babbage", "curie", "davinci"]
