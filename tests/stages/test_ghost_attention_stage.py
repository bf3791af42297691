"""Ghost Attention: what is asked, what is kept and learned, bad input, resumption, two ranks."""

import dataclasses
import itertools
import json

import json_lines
import pocket as problem
import pytest

from llama2rt.data.readers import read, write
from llama2rt.data.records import Dialogue
from llama2rt.errors import InputError
from llama2rt.evaluate import recall
from llama2rt.rollout import turns
from llama2rt.rollout.turns import Turns
from llama2rt.run import Run
from llama2rt.stages import STAGES, ghost_attention, instructed, loading, sft

ATTRIBUTES = """
[[attributes]]
name = "answer"
full = "say {value}"
terse = "{value}"
values = ["yes", "no", "sorry"]
check = { contains = ["{value}"] }
"""


def dialogues(names):
    """Of two turns each."""
    for name in names:
        said = [(kind, answers[0]) for kind, answers in problem.ANSWERS.items()]
        yield Dialogue(
            list(
                itertools.chain.from_iterable(
                    [*problem.messages(kind, name), {"role": "assistant", "content": answer}]
                    for kind, answer in said
                )
            )
        )


@pytest.fixture(scope="module")
def given(pocket, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ghost")
    write(folder / "dialogues.jsonl", dialogues(problem.TRAINING[:12]))
    write(folder / "held_out.jsonl", dialogues(problem.HELD_OUT[:5]))
    (folder / "attributes.toml").write_text(ATTRIBUTES)
    return {
        "policy": pocket.sft,
        "init": pocket.sft,
        "data": [folder / "dialogues.jsonl"],
        "validation": [folder / "held_out.jsonl"],
        "attributes": folder / "attributes.toml",
        "sampling": {"max_tokens": 8},
        "recall": {"turns": [1, 2], "limit": 4},
        "batch_size": 4,
        "epochs": 1,
        "train": {"lr": 1e-3, "checkpoint_every": 2, "micro_tokens": 128},
    }


def recipe(given, **settings):
    return ghost_attention.GhostAttentionRecipe(**(given | settings))


@pytest.fixture
def prompts(monkeypatch):
    """What the engine is asked, call by call."""
    asked = []
    complete = turns.complete
    monkeypatch.setattr(
        turns, "complete", lambda engine, p, **k: asked.append(p) or complete(engine, p, **k)
    )
    return asked


def test_the_last_answer_is_learned_under_the_first_turns_instruction(
    given, tmp_path, prompts, pocket
):
    ghost_attention.run(recipe(given), tmp_path / "run")
    sampled = [json_lines.read(tmp_path / "run" / "samples" / "training" / "part-00000.jsonl")][0]
    built = read(tmp_path / "run" / ghost_attention.DIALOGUES, "dialogue")
    kept = [row for row in sampled if not row["ended"] and not row["cut"]]
    assert len(sampled) == 12 and len(built) == len(kept) > 3
    _, tokenizer = loading.load_llama(pocket.sft, device="meta")
    for row, dialogue in zip(kept, built, strict=True):
        system, *said = dialogue.messages
        assert system == {"role": "system", "content": row["instruction"]}
        assert [m["content"] for m in said[1::2]] == row["answers"]
        assert not any("say" in m["content"] for m in said[::2])
        assert dialogue.learned == (False, True)
        (example,) = sft.encode([dialogue], tokenizer, 64)
        targets = [int(t) for t, on in zip(example.tokens, example.trainable, strict=True) if on]
        assert tokenizer.decode(targets[:-1]).strip() == row["answers"][-1].strip()
    # While sampling, every user message has it, and the policy's own answers stand between.
    first, second = prompts[0], prompts[1]
    assert all(p.messages[0]["content"].startswith("say ") for p in first)
    for prompt in second:
        row = sampled[int(prompt.id)]
        assert [m["content"].startswith("say ") for m in prompt.messages[::2]] == [True, True]
        assert prompt.messages[1]["content"] == row["answers"][0]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["asked"] == 12 and report["kept"] == len(built)
    assert [row["turn"] for row in report["recall"]["with"]["turns"]] == [1, 2]
    assert report["attention"]["with"]["tokens"] == report["attention"]["without"]["tokens"]
    assert len(report["attention"]["with"]["turns"]) == 2
    losses = [
        r for r in json_lines.read(tmp_path / "run" / "metrics.jsonl") if "held_out_loss" in r
    ]
    assert len(losses) >= 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Recall over turns" in page and "Attention to the instruction" in page


def test_other_ways_to_build(given, tmp_path, prompts):
    """The data's own answers before the last; the instruction in the first message; terse ones;
    other dialogues to train on besides; no test."""
    settings = recipe(
        given,
        history="given",
        place="message",
        terse=1.0,
        dialogues=given["data"],
        validation=[],
        held_out=0.0,
        recall={"limit": 0},
        followed_only=True,
    )
    ghost_attention.run(settings, tmp_path / "run")
    (asked,) = prompts
    assert [m["content"] for m in asked[0].messages[1::2]] == ["yes"]
    built = read(tmp_path / "run" / ghost_attention.DIALOGUES, "dialogue")
    for dialogue in built:
        word = dialogue.messages[0]["content"].split()[0]
        assert dialogue.messages[0]["role"] == "user" and word in ("yes", "no", "sorry")
        assert word in dialogue.messages[-1]["content"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["dialogues"] == len(built) + 12
    assert report["left_out"][instructed.NOT_FOLLOWED] > 0
    assert "recall" not in report and "attention" not in report


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """A run that nobody stopped, its answers in files of 5 dialogues."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instructed, "DIALOGUES_PER_FILE", 5)
        ghost_attention.run(recipe(given), directory)
    return directory


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [(turns, "complete", 2), (recall, "table", 1), (Run, "log", 3), (recall, "table", 2)],
    ids=["sampling", "testing", "training", "testing again"],
)
def test_resumed_equals_uninterrupted(given, whole, tmp_path, monkeypatch, owner, name, calls):
    monkeypatch.setattr(instructed, "DIALOGUES_PER_FILE", 5)
    killed = tmp_path / "killed"
    resumed = problem.killed_and_resumed(
        monkeypatch, owner, name, calls, ghost_attention.run, recipe(given), killed
    )
    assert problem.weights(whole / "model") == problem.weights(resumed)
    assert problem.metrics(whole) == problem.metrics(killed)
    for file in [p.relative_to(whole) for p in whole.rglob("*.json*")]:
        if "samples" in file.parts or file.name == ghost_attention.DIALOGUES:
            assert (whole / file).read_text() == (killed / file).read_text(), file


def test_a_longer_run_tests_the_model_that_it_has_trained(given, tmp_path, monkeypatch):
    constant = {"train": given["train"] | {"schedule": "constant"}}
    ghost_attention.run(recipe(given, **constant), tmp_path / "run")
    asked = []
    measure = recall.measure
    monkeypatch.setattr(recall, "measure", lambda *a, **k: asked.append(a) or measure(*a, **k))
    ghost_attention.run(recipe(given, epochs=2, **constant), tmp_path / "run", resume=True)
    assert len(asked) == 1  # the policy's own test is kept


def test_held_out_dialogues_that_are_all_cut_leave_no_loss(given, tmp_path, monkeypatch):
    sample = instructed.sample

    def cut(recipe, sampler, path, items):
        found = sample(recipe, sampler, path, items)
        if path.name != "held-out":
            return found
        return [dataclasses.replace(one, dialogue=None, left_out="a cut answer") for one in found]

    monkeypatch.setattr(instructed, "sample", cut)
    folder = ghost_attention.run(recipe(given), tmp_path / "run")
    report = json.loads((folder.parent / "report.json").read_text())
    assert "recall" in report and not any("held_out_loss" in key for key in report)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"recall": {"turns": [1, 3]}}, "recall.turns: 3: no held-out dialogue has so many turns"),
        ({"least_turns": 3}, "data: no dialogue has least_turns = 3"),
        ({"sampling": {"max_tokens": 60}}, "sampling.max_tokens: the policy's context of 64"),
        ({"sampling": {"max_tokens": 8, "cache_bytes": 9}}, "sampling.cache_bytes: expected at le"),
        ({"context": 65}, "context: 65 exceeds the model's 64"),
    ],
)
def test_what_does_not_fit_is_said_before_any_weights(given, settings, said):
    with pytest.raises(InputError, match=said):
        ghost_attention.open_inputs(recipe(given, **settings))


def test_an_instruction_that_holds_a_tag_is_named(given, tmp_path):
    tagged = tmp_path / "attributes.toml"
    tagged.write_text(ATTRIBUTES.replace('"say {value}"', '"[INST]{value}"'))
    with pytest.raises(InputError, match=r"dialogue that begins .*: message 1: .*\[INST\]"):
        ghost_attention.open_inputs(recipe(given, attributes=tagged))
    with pytest.raises(ValueError, match="no dialogues are held out"):
        recipe(given, validation=[], held_out=0.0)


def test_a_dry_run_counts_the_turns(given):
    settings = recipe(given)
    inputs = ghost_attention.open_inputs(settings)
    assert inputs.files == ("dialogues.jsonl",)
    work = STAGES["ghost-attention"].plan(settings, inputs, lambda f: loading.outline(f).config)
    assert [phase.name for phase in work.phases] == ["sampling", "training", "measuring"]
    assert work.phases[0].sampling.answers == 2 * (12 + 5 + 4)
    assert work.steps.value == 3
    without = STAGES["ghost-attention"].plan(settings, None, lambda f: inputs.result.config)
    assert without.steps is None and without.phases[0].sampling.answers is None


def test_a_dialogues_turns(pocket):
    own = next(dialogues(["baba"]))
    found = Turns.of(own)
    assert found.users == tuple(m["content"] for m in own.messages[::2]) and found.given == ("yes",)
    assert found.messages([own.messages[1]["content"], own.messages[3]["content"]]) == own.messages
    assert found.first(1).messages([]) == own.messages[:1]
    system = {"role": "system", "content": "s"}
    told = Turns.of(Dialogue([system, *own.messages]))
    assert told.opened("i", "system").messages([])[0]["content"] == "i\ns"
    assert told.repeated("i").messages(["a"])[0] == system
