"""bases.toml: what it may say, and what a pull leaves of what a user wrote."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tunesmith.core.catalogue import Entry, hub_folder, put, read_catalogue

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = f'hub = "org/name"\nrevision = "{COMMIT}"\n'
DIGEST = "ab" * 32


def written(home: Path, text: str) -> dict[str, Entry]:
    (home / "bases.toml").write_text(text)
    return read_catalogue(home)


def test_no_file_is_no_entry(tmp_path: Path) -> None:
    assert read_catalogue(tmp_path) == {}
    assert written(tmp_path, "# nothing yet\n") == {}


def test_every_key(tmp_path: Path) -> None:
    entries = written(
        tmp_path,
        f"""
        [mine]
        folder = "models/mine"
        [far]
        folder = "/models/far"
        context_tokens = 4096
        learning_rate = 2e-3
        price_per_1k_training_tokens = 0.03
        [curie]
        {HUB}
        [curie.sha256]
        "model.safetensors" = "{DIGEST}"
        """,
    )
    assert entries == {
        "mine": Entry("mine", tmp_path / "models" / "mine"),
        "far": Entry(
            "far",
            Path("/models/far"),
            learning_rate=0.002,
            context_tokens=4096,
            price_per_1k_training_tokens=0.03,
        ),
        "curie": Entry(
            "curie",
            tmp_path / "bases" / "org--name-0123456789ab",
            hub="org/name",
            revision=COMMIT,
            sha256={"model.safetensors": DIGEST},
        ),
    }
    assert entries["curie"].pull_command == f"tunesmith models pull org/name --revision {COMMIT} --as curie"


def test_a_folder_may_be_under_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/me")
    assert written(tmp_path, '[x]\nfolder = "~/models/x"')["x"].folder == Path("/people/me/models/x")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("no TOML", "is not TOML"),
        ("[x]\nfolder = '/a'\n[x]\nfolder = '/b'", "is not TOML"),
        ("[Ada]\nfolder = '/a'", r"\[Ada\]: a name has lower-case"),
        ("['a b']\nfolder = '/a'", "a name has lower-case"),
        ("['../x']\nfolder = '/a'", "a name has lower-case"),
        ("x = '/a'", r"\[x\]: is a table"),
        ("[x]", r'give either folder = "..." or hub'),
        (f"[x]\nfolder = '/a'\n{HUB}", "and not both"),
        ("[x]\nfolder = 5", "folder is a path in quotes, not 5"),
        ("[x]\nfolder = ''", "folder is a path in quotes, not ''"),
        ("[x]\nfolder = '/a'\nlora = 3", "lora is no key of a base. Keys are folder, hub"),
        ("[x]\nfolder = '/a'\nname = 'y'", "name is no key"),
        ("[x]\nfolder = '/a'\nlearning_rate = 'fast'", "learning_rate is a number between 0 and 1, not 'fast'"),
        ("[x]\nfolder = '/a'\nlearning_rate = 2", "between 0 and 1, not 2"),
        ("[x]\nfolder = '/a'\nlearning_rate = nan", "between 0 and 1, not nan"),
        ("[x]\nfolder = '/a'\nlearning_rate = true", "between 0 and 1, not True"),
        ("[x]\nfolder = '/a'\ncontext_tokens = 0", "context_tokens is a whole number from 1 to 1048576, not 0"),
        ("[x]\nfolder = '/a'\ncontext_tokens = 2.5", "a whole number"),
        ("[x]\nfolder = '/a'\nprice_per_1k_training_tokens = -1", "an amount, 0 or more, not -1"),
        ("[x]\nfolder = '/a'\nprice_per_1k_training_tokens = inf", "an amount, 0 or more, not inf"),
        ("[x]\nfolder = '/a'\nsha256 = 'abc'", "sha256 is a table"),
        ("[x]\nfolder = '/a'\n[x.sha256]\n'../a' = 'abc'", "names '../a', which is no file directly"),
        ("[x]\nfolder = '/a'\n[x.sha256]\n'a.json' = 'ABC'", "64 hexadecimal digits in lower case, not 'ABC'"),
        ("[x]\nhub = 'gpt2'\nrevision = 'main'", "hub is a repository of the hub, \"ORG/NAME\", not 'gpt2'"),
        ("[x]\nhub = 'a/../b'\nrevision = 'main'", "hub is a repository"),
        ("[x]\nhub = 'org/name'", r"revision is missing.*`tunesmith models pull org/name --as x` looks it up"),
        ("[x]\nhub = 'org/name'\nrevision = 'main'", r"40 hexadecimal digits of a commit.*models pull.*not 'main'"),
        (f"[x]\nhub = 'org/name'\nrevision = '{COMMIT[:12]}'", "40 hexadecimal digits"),
        (f"[x]\nfolder = '/a'\nrevision = '{COMMIT}'", "revision goes with hub"),
    ],
)
def test_a_wrong_catalogue_is_told_by_entry_key_and_rule(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        written(tmp_path, text)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "bases.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bases\.toml cannot be read"):
        read_catalogue(tmp_path)


def test_two_repositories_never_share_a_folder(tmp_path: Path) -> None:
    assert hub_folder(tmp_path, "a/b-c", COMMIT) != hub_folder(tmp_path, "a-b/c", COMMIT)


BEFORE = """\
# my models

[mine] # the good one
folder = "/models/mine"   # on the fast disk

# tuned by hand
[curie]
folder = "/models/old"
learning_rate = 0.002  # found out in May

# the last one
["dotted.name"]
folder = "/models/x"
"""


def test_a_new_entry_goes_to_the_end(tmp_path: Path) -> None:
    written(tmp_path, BEFORE)
    put(tmp_path, "tiny", {"hub": "org/name", "revision": COMMIT}, {"config.json": DIGEST})
    text = (tmp_path / "bases.toml").read_text()
    assert text == f'{BEFORE}\n[tiny]\n{HUB}\n[tiny.sha256]\n"config.json" = "{DIGEST}"\n'
    assert read_catalogue(tmp_path)["tiny"].sha256 == {"config.json": DIGEST}


def test_an_entry_is_changed_in_its_place_and_all_else_stays(tmp_path: Path) -> None:
    written(tmp_path, BEFORE)
    put(tmp_path, "curie", {"hub": "org/name", "revision": COMMIT}, {"config.json": DIGEST})
    changed = f'{HUB}learning_rate = 0.002  # found out in May\n\n[curie.sha256]\n"config.json" = "{DIGEST}"\n'
    text = (tmp_path / "bases.toml").read_text()
    assert text == BEFORE.replace('folder = "/models/old"\nlearning_rate = 0.002  # found out in May\n', changed)
    put(tmp_path, "curie", {"hub": "org/name", "revision": COMMIT}, {"config.json": DIGEST})
    assert (tmp_path / "bases.toml").read_text() == text


def test_digests_and_revision_follow_a_new_pull(tmp_path: Path) -> None:
    put(tmp_path, "a.b", {"hub": "org/name", "revision": COMMIT}, {"config.json": DIGEST, "old.safetensors": DIGEST})
    put(tmp_path, "c", {"hub": "org/name", "revision": COMMIT}, {})
    put(tmp_path, "a.b", {"hub": "org/name", "revision": "f" * 40}, {"config.json": DIGEST})
    entries = read_catalogue(tmp_path)
    assert (entries["a.b"].revision, entries["a.b"].sha256) == ("f" * 40, {"config.json": DIGEST})
    assert list(entries) == ["a.b", "c"]


@pytest.mark.parametrize(
    "text",
    [
        'mine.folder = "/models/mine"\n',
        'mine = { folder = "/models/mine" }\n',
        '[mine]\n"folder" = "/models/mine"\n',
        '[other]\nfolder = """\n[mine]\n/x"""\n[mine]\nfolder = "/y"\n',
    ],
)
def test_what_cannot_be_edited_is_left_alone_with_lines_to_paste(tmp_path: Path, text: str) -> None:
    (tmp_path / "bases.toml").write_text(text)
    with pytest.raises(ValueError, match=r'(?s)not edited here.*\[mine\]\nhub = "org/name"'):
        put(tmp_path, "mine", {"hub": "org/name", "revision": COMMIT}, {})
    assert (tmp_path / "bases.toml").read_text() == text
    assert tomllib.loads(text)


def test_a_link_to_the_catalogue_stays_a_link(tmp_path: Path) -> None:
    kept = tmp_path / "kept.toml"
    kept.write_text(BEFORE)
    home = tmp_path / "home"
    home.mkdir()
    (home / "bases.toml").symlink_to(kept)
    put(home, "tiny", {"hub": "org/name", "revision": COMMIT}, {})
    assert (home / "bases.toml").is_symlink()
    assert "[tiny]" in kept.read_text()
