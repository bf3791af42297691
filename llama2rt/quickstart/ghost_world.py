"""A world for Ghost Attention of the quickstart's size: chains of short questions, and instructions
about how to answer that a rule can check.

The quickstart's tasks give the questions. An instruction names a figure, a hobby or both, each of
which shows in the answer: "At the piano the queen says 12." All words are ones that the base model
knows, because another costs a token a letter, and twenty turns must fit into the context.

The demonstrations for SFT hold an instruction in two messages of five, or the same one in all of
them, or begin with one as the system message, and each answer follows what it answers and nothing
earlier. So a model that has learned from them follows an instruction that is repeated and forgets
one that is not. Both arms of the experiment start from it.
"""

import random
from collections.abc import Iterator

from llama2rt.data.records import Dialogue
from llama2rt.quickstart.corpus import split_of
from llama2rt.quickstart.tasks import Task, draw

FIGURES = ("queen", "eagle", "zebra", "mouse", "horse", "fish")
HOBBIES = ("piano", "violin", "kite", "garden", "ship", "river")

ATTRIBUTES = f"""\
[[attributes]]
name = "figure"
full = "Act as the {{value}}."
terse = "Figure: {{value}}."
values = {list(FIGURES)}
check = {{ contains = ["{{value}} says"] }}

[[attributes]]
name = "hobby"
full = "You enjoy the {{value}}."
terse = "Hobby: {{value}}."
values = {list(HOBBIES)}
check = {{ contains = ["at the {{value}}"] }}
"""
INSTRUCTED = 0.4
"""share of messages that hold an instruction, in demonstrations that do not repeat one"""
OPENED = 0.5
"""share of those demonstrations that begin with a system message, an instruction"""
REPEATED = 0.25
"""share of the demonstrations whose user repeats one instruction in every message"""
LONGEST = 20
"""turns of a dialogue"""


def told(answer: str, figure: str = "", hobby: str = "") -> str:
    """An answer as the instruction asks for it."""
    text = f"at the {hobby} " if hobby else ""
    text += f"the {figure} says " if figure else ""
    text += f"{answer}."
    return text[0].upper() + text[1:]


def instruction(rng: random.Random) -> tuple[str, dict[str, str]]:
    """(its text, its attributes), in full or tersely, in any order."""
    choices = {"figure": FIGURES, "hobby": HOBBIES}
    names = rng.sample([*choices], rng.randint(1, len(choices)))
    chosen = {name: rng.choice(choices[name]) for name in names}
    full = {"figure": "Act as the {}.", "hobby": "You enjoy the {}."}
    terse = rng.random() < 0.5
    return " ".join(
        f"{name.capitalize()}: {value}." if terse else full[name].format(value)
        for name, value in chosen.items()
    ), chosen


def questions(split: str, seed: int, rng: random.Random) -> Iterator[tuple[str, Task]]:
    """An endless dialogue: what the user says, and the task that it asks. All tasks belong to
    `split`."""

    def fresh() -> Task:
        while True:
            task = draw(rng.choice(("arithmetic", "arithmetic", "units")), rng)
            if split_of(task.instance, seed) == split:
                return task

    task = fresh()
    yield rng.choice(task.questions), task
    while True:
        assert task.follow_up is not None
        candidates = (task.follow_up(rng) for _ in range(20))
        later = next((t for t in candidates if split_of(t.instance, seed) == split), None)
        if later is None or rng.random() < 0.05:
            task = fresh()
            yield rng.choice(task.questions), task
        else:
            task = later
            yield task.short, task


def demonstrations(count: int, seed: int) -> list[Dialogue]:
    """Dialogues of 1 to `LONGEST` turns for SFT."""
    rng = random.Random(f"{seed}:demonstrations")
    result = []
    for _ in range(count):
        messages: list[dict[str, str]] = []
        asked = questions("train", seed, rng)
        always = instruction(rng) if rng.random() < REPEATED else None
        for turn in range(rng.randint(1, LONGEST)):
            user, task = next(asked)
            chosen: dict[str, str] = {}
            if not (turn or always) and rng.random() < OPENED:
                text, chosen = instruction(rng)
                messages.append({"role": "system", "content": text})
            elif always or rng.random() < INSTRUCTED:
                text, chosen = always or instruction(rng)
                user = f"{text} {user}"
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": told(task.answer, **chosen)})
        result.append(Dialogue(messages))
    return result


def dialogues(count: int, split: str, seed: int) -> list[Dialogue]:
    """Plain dialogues of `LONGEST` turns without an instruction, answered truly."""
    rng = random.Random(f"{seed}:{split}:dialogues")
    result = []
    for _ in range(count):
        messages = []
        asked = questions(split, seed, rng)
        for _ in range(LONGEST):
            user, task = next(asked)
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": told(task.answer)})
        result.append(Dialogue(messages))
    return result
