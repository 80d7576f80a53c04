"""The pure parts of `benchmarks.quality`: measures, reading of sets and answers, the file and the page of results."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import f1_score

from benchmarks.quality import baselines, measures, results, sets
from benchmarks.quality.methods import class_ids
from benchmarks.quality.results import Key
from benchmarks.quality.sets import Row
from tunesmith.core.box import BOX
from tunesmith.tokenizer import Tokenizer


def test_weighted_f1_is_that_of_scikit_learn() -> None:
    chance = random.Random(3)
    truth = [chance.choice("abcd") for _ in range(200)]
    given = [chance.choice([answer, *"abcde"]) for answer in truth]

    assert measures.weighted_f1(truth, given) == pytest.approx(
        f1_score(truth, given, average="weighted", zero_division=0.0)
    )
    assert measures.accuracy("aabb", "abbb") == 0.75


def test_bleu_by_hand() -> None:
    # 1-grams: the second "the" is clipped, 5 of 6; 2-grams 4 of 5, 3-grams 3 of 4, 4-grams 2 of 3.
    given, reference = "the cat sat on the mat", "a cat sat on the mat"
    expected = (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert measures.bleu([given], [[reference]]) == pytest.approx(expected)
    # A second reference has the rest.
    assert measures.bleu([given], [[reference, "The cat sat on the sofa"]]) == pytest.approx(1.0)
    # Five words of which all match, against eight: brevity costs exp(1 - 8/5).
    short = measures.bleu(["a b c d e"], [["a b c d e f g h"]])
    assert short == pytest.approx(math.exp(1 - 8 / 5))
    assert measures.bleu(["x y"], [["a b"]]) == 0.0


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence "police the gunman"; three of four words on either side.
    assert measures.rouge_l(["police kill the gunman"], [["police killed the gunman"]]) == pytest.approx(0.75)
    assert measures.rouge_l(["a b"], [["c", "a x y b"]]) == pytest.approx(2 * 2 / (2 + 4))  # the better reference
    assert measures.rouge_l(["", "a"], [["a"], ["a"]]) == pytest.approx(0.5)


def test_entities_count_one_by_one() -> None:
    truth = [["Leeds", "ESB"], [], ["Trump"]]
    given = [["ESB", "Leeds"], [], ["trump", "Trump", "Trump"]]

    found = measures.entity_scores(truth, given)

    assert found["exact_match"] == pytest.approx(1 / 3)  # the order of a list counts
    assert found["precision"] == pytest.approx(3 / 5)
    assert found["recall"] == pytest.approx(3 / 3)
    assert found["f1"] == pytest.approx(2 * 3 / (3 + 5))
    assert measures.entity_scores([[]], [[]])["f1"] == 0.0


def test_slots_are_found_as_whole_words() -> None:
    values = [["The Mill", "less than £20", "high"], ["Café Rouge"]]
    texts = ["The mill costs less than £20 and is highly rated.", "Near Café Rouge."]
    assert measures.slot_coverage(values, texts) == pytest.approx(3 / 4)


def test_shots_are_short_and_of_different_classes() -> None:
    train = [Row(f"{'long ' * 9 if i % 2 else ''}text {i} ->", f" class{i % 3}") for i in range(60)]

    text = sets.shots(train, "\n")

    lines = text.splitlines()
    assert len(lines) == sets.SHOTS
    assert not any("long" in line for line in lines)
    assert {line.rpartition("-> ")[2] for line in lines} == {"class0", "class1", "class2"}
    assert sets.shots(train, "\n") == text
    ends = sets.shots([Row("a ->", " b END")] * 4, " END\n\n")
    assert ends == "a -> b END\n\n" * 4


def test_chosen_rows_are_always_the_same() -> None:
    rows = [Row(str(i), "") for i in range(50)]
    assert sets.choose(rows, 5) == sets.choose(rows, 5)
    assert len(set(sets.choose(rows, 5))) == 5
    assert sets.choose(rows, None) == sets.choose(rows, 50) == rows


def test_prompts_shared_by_rows_have_several_references() -> None:
    rows = [Row("p ->", " one END"), Row("q ->", " two END"), Row("p ->", " three END")]
    assert sets.references(rows, " END") == {"p ->": ["one", "three"], "q ->": ["two"]}


def test_answers_and_attributes_are_read() -> None:
    assert sets.entities(" Empire State Building\n ESB\n") == ["Empire State Building", "ESB"]
    assert sets.entities(" none") == sets.entities("") == []
    prompt = "name=The Mill, priceRange=less than £20, familyFriendly=yes ->"
    assert sets.attributes(prompt) == ["The Mill", "less than £20"]


def test_classes_are_single_tokens() -> None:
    tokenizer = Tokenizer.from_folder(BOX)
    ids = class_ids([Row("", " 7"), Row("", " 149"), Row("", " 7")], tokenizer)
    assert [tokenizer.decode([each]) for each in ids] == [" 149", " 7"]
    with pytest.raises(ValueError, match="single token"):
        class_ids([Row("", " no such class of one token")], tokenizer)


def test_the_majority_is_that_of_the_training_rows() -> None:
    train = [Row("", " a"), Row("", " b"), Row("", " b")]
    assert baselines.majority(train, [Row("", " a")] * 2) == [" b", " b"]


def test_tfidf_learns_a_word() -> None:
    train = [
        Row(f"{word} film number {i}", label) for i in range(20) for word, label in (("good", " y"), ("bad", " n"))
    ]
    given, chosen = baselines.tfidf(train, [Row("a bad film", ""), Row("good film", "")])
    assert given == [" n", " y"]
    assert chosen in baselines.CHOICES


def _line(set_name: str, method: str, base: str | None, **more: Any) -> dict[str, Any]:
    return {"set": set_name, "method": method, "base": base, "base_digest": base and f"{base}-digest", **more}


def test_lines_are_kept_and_known_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert results.read_lines(path) == []
    line = _line("banking77", "tuned", "ada", scores={"accuracy": 0.5}, note="£ é")

    results.append(path, line)
    results.append(path, line | {"method": "few-shot"})

    assert results.read_lines(path) == [line, line | {"method": "few-shot"}]
    assert results.key_of(line) == Key("banking77", "tuned", "ada-digest")
    assert json.loads(path.read_text().splitlines()[0]) == line


def test_the_page_shows_what_is_there() -> None:
    scores = {"accuracy": 0.9, "weighted_f1": 0.89}
    took = {"trained_tokens": 12_345, "job_seconds": 61.0}
    took["hyperparameters"] = {"batch_size": 16, "learning_rate_multiplier": 0.2}
    samples = [{"prompt": "x | y\n###", "reference": "r", "given": "g"}]
    written = {"scores": {"rouge_l": 0.25, "loss": 1.5}, "prompts": 200, "samples": samples}
    lines = [
        _line("banking77", "tuned", "ada", scores={"accuracy": 0.1, "weighted_f1": 0.1}, rows=3079, **took),
        _line("banking77", "majority", None, scores={"accuracy": 0.013, "weighted_f1": 0.0}, rows=3079),
        _line("banking77", "tuned", "ada", scores=scores, rows=3079, **took),  # of later weights
        _line("support_chat", "few-shot", "ada", **written),
        _line("support_chat", "tuned", "ada", **written, **took),
    ]

    page = results.page(lines, "# Title\n")

    assert page.startswith("# Title\n\n## Classification")
    assert "| set | rows | measure | always the largest class | **ada tuned** |" in page
    assert "| banking77 | 3,079 | accuracy | 0.013 | 0.900 |" in page
    assert "| banking77 | ada | ada-digest | 12,345 | 61 | 16 | 0.2 |" in page
    assert "| **ada tuned** | 200 | 0.250 | 1.500 |" in page
    assert "| x \\| y ⏎ \\#\\#\\# | r | g | g |" in page
    assert "wnut17" not in page
