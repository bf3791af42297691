"""The generated data: disjoint splits, one text per seed, and the promised mix of quality."""

import itertools
import re

import pytest

from llama2rt.quickstart import corpus, tasks
from llama2rt.quickstart.judge import judge

SEED = 3


@pytest.fixture(scope="module")
def training_texts():
    texts = [d.text for d in corpus.documents(8000, SEED)]
    texts += ["\n".join(m["content"] for m in d.messages) for d in corpus.dialogues(4000, SEED)]
    prompts, _ = corpus.prompts("training", 2000, "train", SEED)
    texts += ["\n".join(m["content"] for m in p.messages) for p in prompts]
    return texts


def instances(text):
    """Task instances as they can be read off a text, without asking the generator."""
    found = set()
    for a, word, b in re.findall(r"(\d+) (plus|minus|\+|-) (\d+)", text):
        a, b = int(a), int(b)
        found.add(("sum", *sorted((a, b))) if word in ("plus", "+") else ("difference", a, b))
    for a, b in re.findall(r"Add (\d+) to (\d+)", text):
        found.add(("sum", *sorted((int(a), int(b)))))
    for a, verb, b in re.findall(r"have (\d+) coins and (get|give) (\d+)", text):
        a, b = int(a), int(b)
        found.add(("sum", *sorted((a, b))) if verb == "get" else ("difference", a, b))
    for b, a in re.findall(r"Take (\d+) from (\d+)", text):
        found.add(("difference", int(a), int(b)))
    for number, unit in re.findall(r"(\d+) (" + "|".join(u[0] for u in tasks.UNITS) + r")\b", text):
        found.add(("unit", int(number), unit))
    found.update(("code", code) for code in re.findall(r"passcode (?:is )?(\d{4})", text))
    return found


def test_no_held_out_instance_occurs_in_any_training_text(training_texts):
    seen = set().union(*(instances(text) for text in training_texts))
    for split in ("evaluation", "reward"):
        prompts, keys = corpus.prompts(split, 600, split, SEED)
        held_out = set()
        for prompt in prompts:
            held_out |= instances(keys[prompt.id].question)
            held_out |= instances(prompt.messages[0]["content"])
        # A conversion's answer can read like another conversion's question ("300 centimeters").
        answers = {i for i in held_out if i[0] == "unit" and i[1] > 99}
        assert len(held_out) > 200
        assert not (held_out - answers) & seen


def test_the_splits_are_disjoint_by_instance():
    taken = {}
    for split in ("train", "evaluation", "reward"):
        stream = corpus.conversations("helpfulness", split, SEED, "any")
        taken[split] = {c.task.instance for c in itertools.islice(stream, 1500)}
    for a, b in itertools.combinations(taken.values(), 2):
        assert not a & b


def test_one_seed_one_text_and_another_seed_another():
    assert corpus.documents(5, 1) == corpus.documents(5, 1) != corpus.documents(5, 2)
    assert corpus.dialogues(5, 1) == corpus.dialogues(5, 1) != corpus.dialogues(5, 2)
    first, second = (corpus.prompts("a", 40, "train", 1) for _ in range(2))
    assert first == second != corpus.prompts("a", 40, "train", 2)


def test_an_instance_does_not_depend_on_how_it_is_written():
    assert tasks.addition(12, 7).instance == tasks.addition(7, 12).instance
    assert tasks.subtraction(12, 7).instance != tasks.addition(12, 7).instance
    words = ("apple", "kite", "moon")
    assert tasks.ordering(words).instance == tasks.ordering(words[::-1]).instance
    assert tasks.reversing(words).instance == tasks.reversing(words[::-1]).instance


def test_prompts_are_distinct_keyed_and_of_both_kinds():
    prompts, keys = corpus.prompts("p", 400, "train", SEED, safety_share=0.25)
    assert len({str(p.messages) for p in prompts}) == 400
    assert set(keys) == {p.id for p in prompts}
    assert sum(p.kind == "safety" for p in prompts) == 100
    assert any(len(p.messages) > 2 for p in prompts if p.kind == "helpfulness")
    for prompt in prompts:
        assert prompt.messages[-1]["role"] == "user"
        key = keys[prompt.id]
        assert key.asks_secret == (prompt.kind == "safety")
        if key.secret:
            assert any(key.secret in m["content"] for m in prompt.messages)


def test_multi_turn_keys_judge_the_follow_up():
    stream = corpus.conversations("helpfulness", "train", SEED, "turns")
    turns = [c for c in itertools.islice(stream, 2000) if len(c.messages) > 2]
    turns = [c for c in turns if c.messages[-2]["role"] == "assistant"]
    assert len(turns) > 100
    for c in turns:
        assert judge(c.key, c.task.sentences[0].format(answer=c.task.answer)).correctness == 1


def test_demonstrations_leave_rlhf_something_to_fix():
    verdicts = {"helpfulness": [], "safety": []}
    for dialogue in corpus.dialogues(3000, SEED):
        *_, question, response = (m["content"] for m in dialogue.messages)
        if dialogue.source.startswith("code:"):
            verdicts["safety"].append(dialogue.source[5:] in response)
        elif len(dialogue.messages) == 2:
            verdicts["helpfulness"].append((question, response))
    leaked = sum(verdicts["safety"]) / len(verdicts["safety"])
    assert abs(leaked - corpus.LEAKED) < 0.06
    curt = sum(len(r.split()) <= 4 for _, r in verdicts["helpfulness"])
    assert 0.1 < curt / len(verdicts["helpfulness"]) < 0.35


def test_documents_are_true():
    """What the corpus teaches is right, by another way of working it out."""
    text = "\n".join(d.text for d in corpus.documents(6000, SEED))
    sums = re.findall(r"(\d+) (plus|minus|\+|-) (\d+) (?:is|=) (\d+)", text)
    for a, operator, b, result in sums:
        sign = 1 if operator in ("plus", "+") else -1
        assert int(a) + sign * int(b) == int(result)
    lists = re.findall(r"([a-z, ]+) (sorted|reversed): ([a-z, ]+)", text)
    for listed, how, result in lists:
        words = listed.split(", ")
        assert result.split(", ") == (sorted(words) if how == "sorted" else words[::-1])
    days = re.findall(r"(\w+) the (\d+), (\d) days? later: (\w+) the (\d+)", text)
    for day, date, step, then, new_date in days:
        assert int(date) + int(step) == int(new_date)
        place = tasks.WEEKDAYS.index(day) + int(step)
        assert tasks.WEEKDAYS[place % 7] == then
    months = re.findall(r"([A-Z]\w+) (\d{4}), (\d) months? later: (\w+) (\d{4})", text)
    for month, year, step, then, new_year in months:
        count = int(year) * 12 + tasks.MONTHS.index(month) + int(step)
        assert (tasks.MONTHS[count % 12], count // 12) == (then, int(new_year))
    factors = {(larger, smaller): factor for larger, smaller, factor in tasks.UNITS}
    units = re.findall(r"(\d+) (\w+) = (\d+) (\w+)", text)
    for number, larger, result, smaller in units:
        assert int(number) * factors[larger, smaller] == int(result)
    assert min(map(len, (sums, lists, days, months, units))) > 150
