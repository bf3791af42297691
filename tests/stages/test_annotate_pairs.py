"""Which two answers an annotator is shown."""

import pytest

from llama2rt.data.records import Prompt
from llama2rt.generate import Completion
from llama2rt.rollout.sampling import SamplingOptions
from llama2rt.stages import annotate, loading


class Scripted:
    """An engine that answers its first call with the first texts, its second with the second."""

    model = None  # that ranks could share

    def __init__(self, answers):
        self.answers = iter(answers)

    def generate(self, messages, *, n, temperature, max_tokens, seed, indices):
        assert n == 1 and list(indices) == list(range(len(messages)))
        texts = next(self.answers) if messages else []
        assert len(messages) == len(texts)
        return [
            Completion(i, [1], text.removesuffix("..."), [2], [-1.0], reason(text))
            for i, text in enumerate(texts)
        ]


def reason(text):
    return "length" if text.endswith("...") else "stop"


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        ("19", " 20 ", ("19", "20")),
        ("19", " 19 ", None),
        ("19", "", None),
        (" \n", "19", None),
        ("19", "20...", None),
        ("19...", "20", None),
        ("19", "1\x009", None),
    ],
    ids=["different", "same", "empty", "blank", "second cut", "first cut", "null character"],
)
def test_two_different_finished_answers_are_shown(monkeypatch, first, second, shown):
    """Beside a prompt whose answers always can be, so that what is left out is one pair only."""
    engine = Scripted([["yes", first], ["no", second]])
    monkeypatch.setattr(loading, "load_llama", lambda folder, tokenizer: (None, None))
    monkeypatch.setattr(SamplingOptions, "engine", lambda options, model, tokenizer: engine)
    recipe = annotate.AnnotateRecipe(policy="p", data=["d"], annotator={"files": ["f"]})
    prompts = [Prompt(name, [{"role": "user", "content": name}]) for name in ("a", "b")]
    inputs = annotate.AnnotateInputs(None, {"training": prompts, "held_out": []})
    sampled = annotate.sample(recipe, inputs)
    assert sampled["held_out"] == []
    pairs = sampled["training"]
    assert pairs[0].id.startswith("training:a:")
    assert (pairs[0].first, pairs[0].second) == ("yes", "no")
    assert [(pair.first, pair.second) for pair in pairs[1:]] == ([shown] if shown else [])


def test_other_answers_to_a_prompt_are_another_pair():
    """Judgements of one batch's answers must not be taken for those of the next."""
    prompts = [Prompt("a", [{"role": "user", "content": "a"}])]

    def shown(first, second):
        sides = ([Completion(0, [1], text, [2], [-1.0], "stop")] for text in (first, second))
        return annotate.pairs("training", prompts, *sides)[0].id

    assert shown("yes", "no") == shown("yes", "no")
    assert len({shown("yes", "no"), shown("no", "yes"), shown("yes", "never")}) == 3
