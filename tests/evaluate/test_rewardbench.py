"""RewardBench: its weighting, its files, and three kinds of models on the same pairs."""

import json
import logging

import json_lines
import numpy as np
import pytest
import torch

from llama2rt import cli
from llama2rt.checkpoint import native
from llama2rt.errors import InputError
from llama2rt.evaluate.rewardbench import commands, models, records, weighting
from llama2rt.evaluate.rewardbench.records import read_pairs, read_results
from llama2rt.generate import Engine
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.rollout import judge
from llama2rt.rollout.pairwise import PairwiseModel
from llama2rt.rollout.scoring import score

# What rewardbench 0.1.4's own functions give for these accuracies
# (benchmarks/preferences/rewardbench_weighting.py).
ACCURACY = {
    name: (37 * i % 101) / 101
    for i, name in enumerate([*sorted(weighting.CORE), *weighting.PRIOR], start=1)
}
PACKAGE = {
    "Chat": 0.44814425576635875,
    "Chat Hard": 0.3183081466041341,
    "Safety": 0.3795290339844795,
    "Reasoning": 0.7211221122112211,
    "score": 0.4806434728386921,
}


def test_the_weighting_is_the_packages():
    assert weighting.section_scores(ACCURACY) == pytest.approx(
        {name: value for name, value in PACKAGE.items() if name != "score"}, abs=1e-12
    )
    assert weighting.overall_score(ACCURACY) == pytest.approx(PACKAGE["score"], abs=1e-12)


def test_mathematics_weighs_as_much_as_code_and_prior_sets_half():
    code = [name for name in weighting.SECTIONS["Reasoning"] if name != "math-prm"]
    found = weighting.section_scores({"math-prm": 1.0, **dict.fromkeys(code, 0.0)})
    assert found == {"Reasoning": 0.5}
    assert weighting.overall_score({"math-prm": 1.0}) is None  # other sections are missing
    every = dict.fromkeys(weighting.CORE, 1.0)
    assert weighting.overall_score(every) == 1.0
    assert weighting.overall_score({**every, "shp": 0.1}) == pytest.approx((4 + 0.05) / 4.5)
    assert weighting.overall_score({**every, "mtbench_human": 0.0}) == 1.0
    right = {"hep-go": 8.0, "math-prm": 3.0}
    (interval,) = weighting.section_intervals(right, {"hep-go": 10, "math-prm": 4}).values()
    assert interval.mean == pytest.approx((164 * 0.8 + 984 * 0.75) / (164 + 984))
    assert 0 < interval.low < interval.mean < interval.high <= 1


def row(i: int, subset: str = "hep-go", **more):
    return {
        "id": i,
        "prompt": f"count {i} sheep",
        "chosen": f"{i} quick sheep",
        "rejected": "lazy dogs" + " and dogs" * (i % 3),
        "chosen_model": "a",
        "rejected_model": "b",
        "subset": subset,
    } | more


def test_pairs_as_published(tmp_path, caplog):
    core, prior = tmp_path / "filtered.jsonl", tmp_path / "shp-00000-of-00001.jsonl"
    json_lines.write(core, [row(1), row(2, "math-prm"), row(2), row(3, weight=2.0)])
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    json_lines.write(prior, [{"prompt": turns, "chosen": "x", "rejected": "y", "subset": "askx"}])
    with caplog.at_level(logging.WARNING):
        pairs = read_pairs([core, prior])
    assert [(p.id, p.subset) for p in pairs] == [
        ("1", "hep-go"),
        ("2", "math-prm"),
        ("2", "hep-go"),
        ("3", "hep-go"),
        ("shp-00000-of-00001.jsonl:1", "shp"),
    ]
    assert pairs[-1].comparison.prompt == turns
    assert pairs[0].comparison.prompt == [{"role": "user", "content": "count 1 sheep"}]
    assert "key not used: weight (1 rows)" in caplog.text


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row(1, "hep-golang"), 'subset: expected one of RewardBench\'s, got "hep-golang"'),
        ({k: v for k, v in row(1).items() if k != "subset"}, "subset: .* got null"),
        ({k: v for k, v in row(1).items() if k != "chosen"}, "missing key 'chosen'"),
        (row(1, chosen=None), "missing key 'chosen'"),
        (row(1, prompt=["x"]), "expected an object with role and content"),
        (row(1, rejected="1 quick sheep"), "chosen and rejected are equal"),
        (row(0), "id: 0 of hep-go is that of .*:1 too"),
        (row(1, id=True), "id: expected a number or text"),
        ([1], "expected a JSON object"),
    ],
)
def test_a_bad_pair_is_named(tmp_path, bad, said):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (row(0), bad)))
    with pytest.raises(InputError, match=rf"pairs.jsonl:2: .*{said}"):
        read_pairs([path])
    assert len(read_pairs([path], skip_invalid=1)) == 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_tokenizer):
    """A reward model and a language model, with opinions."""
    folder = tmp_path_factory.mktemp("models")
    config = LlamaConfig(32, 1, 2, 2, 64, vocab_size=small_tokenizer.vocab_size, context=256)
    for kind, seed in ((ScalarModel, 1), (Llama, 2)):
        model = kind(config).initialize(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(6 if weight.dim() > 1 else 1)
        native.save(model, small_tokenizer, folder / kind.__name__ / "model")
    return folder / "ScalarModel" / "model", folder / "Llama" / "model"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    subsets = ["hep-go", "math-prm", "alpacaeval-easy", "mt-bench-hard", "donotanswer"]
    json_lines.write(folder / "core.jsonl", [row(i, subsets[i % 5]) for i in range(20)])
    json_lines.write(folder / "summarize.jsonl", [row(i) for i in range(3)])
    return folder / "core.jsonl", folder / "summarize.jsonl"


def test_three_kinds_on_the_same_pairs_in_one_table(
    folders, files, tmp_path, small_tokenizer, capsys
):
    reward, language = folders
    theirs = tmp_path / "published.json"
    theirs.write_text(json.dumps({"model": "org/rm", "model_type": "DPO", **ACCURACY}))
    out = tmp_path / "out"
    arguments = ["rewardbench", *map(str, files), "--reward", str(reward)]
    arguments += ["--preference", str(language), "--judge", str(language)]
    arguments += ["--results", str(theirs), "--out", str(out)]
    cli.main(arguments)
    text = capsys.readouterr().out
    table = json.loads((out / commands.TABLE).read_text())
    assert [(m["name"], m["kind"]) for m in table["models"]] == [
        ("ScalarModel", "reward"),
        ("Llama", "preference"),
        ("Llama-2", "judge"),
        ("org/rm", "published"),
    ]
    assert "23 pairs of 6 subsets" in text and "no pairs of: alpacaeval-hard" in text
    pairs = read_pairs(files)
    asked = [(p.comparison.prompt, p.comparison.chosen, p.comparison.rejected) for p in pairs]
    scalar, llama = (models.load(folder)[0].eval() for folder in folders)
    items = [(m, t) for m, a, b in asked for t in (a, b)]
    scores = score(scalar, small_tokenizer, items)
    both = PairwiseModel(llama, small_tokenizer).probabilities(asked)
    by_judge = judge.votes(Engine(llama, small_tokenizer), asked)
    expected = [scores[::2] > scores[1::2], both.mean(1) > 0.5]
    votes = by_judge.mean(1)
    expected.append(np.where(votes == 0.5, 0.5, votes > 0.5))
    for found, right in zip(table["models"], expected, strict=False):
        assert found["all"]["mean"] == pytest.approx(np.mean(right))
        by_subset = {
            subset: np.mean([r for r, p in zip(right, pairs, strict=True) if p.subset == subset])
            for subset in found["subsets"]
        }
        assert found["subsets"] == pytest.approx(by_subset)
        sections = {name: value["mean"] for name, value in found["sections"].items()}
        assert sections == pytest.approx(weighting.section_scores(by_subset))
        assert found["score"] == pytest.approx(weighting.overall_score(by_subset))
        # What is written reads back, as a result file of the package's.
        name, accuracy = read_results(out / "eval-set" / f"{found['name']}.json")
        _, prior = read_results(out / "pref-sets" / f"{found['name']}.json")
        assert name == found["name"] and {**accuracy, **prior} == pytest.approx(by_subset)
        kept = json.loads((out / "eval-set-scores" / f"{found['name']}.json").read_text())
        assert kept["id"] == [str(i) for i in range(20)] and len(kept["scores_chosen"]) == 20
        assert kept["results"] == pytest.approx([float(r) for r in right[:20]])
        assert kept["text_chosen"][3][-1] == {"role": "assistant", "content": "3 quick sheep"}
    assert "position_bias" in table["models"][1] and "position_bias" not in table["models"][0]
    assert table["models"][3]["sections"]["Chat"]["low"] is None
    assert table["models"][3]["score"] == pytest.approx(PACKAGE["score"])


def test_a_long_pair_is_left_out_for_all_or_refused_before_weights(
    folders, files, tmp_path, monkeypatch, capsys
):
    long = tmp_path / "long.jsonl"
    json_lines.write(long, [row(50, chosen="sheep " * 300), row(51)])
    given = models.contenders([folders[0]], [folders[1]], [])
    pairs = read_pairs([*files, long])
    found = commands.measure(given, pairs, skip_long=True)
    assert found["left_out"] == {"hep-go": 1} and sum(found["pairs"].values()) == 24
    assert "1 pairs too long for some model left out for all" in commands.describe(found)
    monkeypatch.setattr(commands, "ranked", None)
    with pytest.raises(InputError, match=r"hep-go pair 50 has .* tokens, the model's context is 2"):
        commands.measure(given, pairs)
    for wrong, said in (
        (models.contenders([folders[1]], [], []), "expected a reward model, found a language"),
        (models.contenders([], [], [folders[0]]), "expected a language model, found a reward"),
    ):
        with pytest.raises(InputError, match=said):
            commands.measure(wrong, pairs)
    for arguments, said in (
        ([str(files[0])], "nothing to rank by"),
        (["--reward", str(folders[0])], "give files of pairs too"),
        ([str(files[0]), "--results", str(tmp_path / "x.json")], "give --reward"),
        ([str(files[0]), "--reward", str(folders[0]), "--micro-tokens", "0"], "micro_tokens"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(["rewardbench", *arguments])
        assert left.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "expected a JSON object"),
        ("{", "invalid JSON"),
        ('{"model": "m"}', "holds no accuracy"),
        ('{"hep-go": 1.5}', "hep-go: expected a share in"),
        ('{"hep-go": true}', "hep-go: expected a share in"),
        ('{"extra_results": [1]}', "extra_results: expected an object"),
        ('{"hep-go": 0.5, "model": 3}', "model: expected text"),
    ],
)
def test_result_files_that_are_none(tmp_path, content, said):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"results.json: {said}"):
        read_results(path)


def test_result_files_of_the_command(tmp_path, caplog):
    path = tmp_path / "m.json"
    own = {"accuracy": 0.7, "num_prompts": 3, "model": "m", "extra_results": {"hep-go": 0.5}}
    path.write_text(json.dumps(own))
    assert read_results(path) == ("m", {"hep-go": 0.5})
    path.write_text(json.dumps({"hep-go": 1, "xstest": 0.5}))
    assert read_results(path) == ("m", {"hep-go": 1.0})
    assert "keys not used: xstest" in caplog.text
    assert records.KNOWN > weighting.CORE


REPLIES = {"A": 1, " b.": 0, "**A**": 1, "The answer is B": 0, "Answer: A": 1}
REPLIES |= dict.fromkeys(["A fox", "", "AB", "neither"], 0.5)


@pytest.mark.parametrize("reply", REPLIES)
def test_a_judges_reply_is_a_letter_or_none(reply):
    assert judge.vote(reply) == REPLIES[reply]
