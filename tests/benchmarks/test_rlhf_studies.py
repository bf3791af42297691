"""What the studies of RLHF stages are made of: their worlds, and how seeds are put together."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import quickstart_runs

from llama2rt.quickstart import careful_world, ghost_world


def test_seeds_of_one_folder_count_each_prompt_once():
    rows = [
        {"new": np.array([1.0, 0.0]), "old": np.array([0.0, 0.0])},
        {"new": np.array([1.0, 1.0]), "old": np.array([0.0, 0.0])},
    ]
    one = quickstart_runs.over_seeds(rows, [Path("a"), Path("a")], "new", "old")
    two = quickstart_runs.over_seeds(rows, [Path("a"), Path("b")], "new", "old")
    assert (one["prompts"], two["prompts"]) == (2, 4)
    assert one["mean"] == two["mean"] == pytest.approx(0.75)
    assert one["seeds"] == two["seeds"] == [0.5, 1.0]
    # The means of the two prompts over seeds are 1 and 0.5, and no resample of them lies below.
    assert one["low"] == pytest.approx(0.5)
    assert two["low"] < 0.5


def test_ghost_demonstrations_follow_what_they_answer_and_nothing_earlier():
    shown = ghost_world.demonstrations(60, seed=0)
    assert any(dialogue.messages[0]["role"] == "system" for dialogue in shown)
    obeyed = 0
    for dialogue in shown:
        told = dialogue.messages[0]["content"] if dialogue.messages[0]["role"] == "system" else ""
        for user, answer in itertools.pairwise(dialogue.messages):
            if user["role"] != "user":
                continue
            said, told = f"{told} {user['content']}", ""
            for value, form in itertools.chain(
                ((figure, f"the {figure} says") for figure in ghost_world.FIGURES),
                ((hobby, f"at the {hobby}") for hobby in ghost_world.HOBBIES),
            ):
                follows = form in answer["content"].lower()
                assert follows == (value in said.lower()), (said, answer["content"])
                obeyed += follows
    assert obeyed > 60


def test_dialogues_mixed_in_have_a_secret_in_sight_as_often_as_asked():
    found = careful_world.helpful(40, 0, 0.5)
    with_secret = [d for d in found if "passcode" in d.messages[0]["content"]]
    assert (len(found), len(with_secret)) == (40, 20)
    assert all(d.source == "helpfulness borderline" for d in with_secret)
