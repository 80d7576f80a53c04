"""Public data sets as they were published, prepared and trained on with no hand editing.

They are looked for in the folder that TUNESMITH_TEST_DATASETS names, or in `shared/datasets` beside the checkout.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
from pathlib import Path
from random import Random

import pytest

from tests.cli.conftest import Live
from tests.core.conftest import World, open_world
from tunesmith.cli.main import main
from tunesmith.core.jobs import FineTuneRequest

DATASETS = Path(os.environ.get("TUNESMITH_TEST_DATASETS", Path(__file__).parents[3] / "shared" / "datasets"))
RAW = [
    ("banking77/train.csv", "text", "category"),
    ("banking77/test.csv", "text", "category"),
    ("clinc150/clinc150.csv", "text", "intent"),
    ("e2e_descriptions/devset.csv", "mr", "ref"),
    ("e2e_descriptions/testset_w_refs.csv", "mr", "ref"),
    ("tweet_sentiment/tweets.tsv", "text", "sentiment"),
]
READY = ["support_chat/train.jsonl", "wnut17_entities/train.jsonl", "tweet_sentiment/train.jsonl"]
FEW_ROWS = 48

pytestmark = pytest.mark.skipif(not DATASETS.is_dir(), reason="the data sets are not here")


@pytest.mark.parametrize(("name", "prompt", "completion"), [*RAW, *((name, "prompt", "completion") for name in READY)])
def test_whole_sets_are_prepared_and_accepted(
    name: str,
    prompt: str,
    completion: str,
    tmp_path: Path,
    prepare_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quick_tokenizer: None,
) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(prepare_home))
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / Path(name).name
    raw.write_bytes((DATASETS / name).read_bytes())
    columns = ["--prompt-column", prompt, "--completion-column", completion]
    assert main(["prepare", raw.name, "-q", "--json", *columns]) == 0
    told = json.loads(capsys.readouterr().out)
    world = open_world(tmp_path / "home", f"sqlite:///{tmp_path / 'tunesmith.db'}")
    try:
        request = accepted(world, told["command"])
    finally:
        world.store.close()
    assert request.training_examples == told["files"][0]["rows"] > 1_000


def accepted(world: World, command: str):  # type: ignore[no-untyped-def]
    """The job that the recommended command would create."""
    words = iter(shlex.split(command)[3:])
    asked: dict[str, object] = {"model": "ada"}
    for word in words:
        match word:
            case "-t" | "-v":
                content = Path(next(words)).read_bytes()
                asked["training_file" if word == "-t" else "validation_file"] = world.upload(content).id
            case "--compute_classification_metrics":
                asked["compute_classification_metrics"] = True
            case "--classification_n_classes":
                asked["classification_n_classes"] = int(next(words))
            case _:
                asked[word.removeprefix("--")] = next(words)
    return world.jobs.create(world.owner, FineTuneRequest(**asked))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "prompt", "completion"), [RAW[0], RAW[3], RAW[5]])
def test_a_few_raw_rows_are_prepared_and_trained(live: Live, name: str, prompt: str, completion: str) -> None:
    separator = "\t" if name.endswith("tsv") else ","
    with (DATASETS / name).open(newline="", encoding="utf-8") as file:
        heading, *rows = csv.reader(file, delimiter=separator)
    place = heading.index(completion)
    classes = list(dict.fromkeys(row[place] for row in rows))[:3]
    some = (
        [row for row in rows if row[place] in classes]
        if len(classes) * 10 < len(rows) and "ref" not in heading
        else rows
    )
    raw = live.folder / Path(name).name
    with raw.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([heading, *Random(1).sample(some, FEW_ROWS)])
    columns = ["--prompt-column", prompt, "--completion-column", completion]
    told = live.json("prepare", raw.name, "-q", *columns, "--home", str(live.server.home))
    words = shlex.split(told["command"])[1:]
    done = live.quick(*words, "-m", "ada", "--n_epochs", "1", "--batch_size", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Job complete! Status: succeeded" in done.stdout
