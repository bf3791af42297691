"""The quickstart's world with system prompts in it: demonstrations that a pre-prompt changes.

The quickstart's chat model never saw a pre-prompt, so it cannot react to one. It is fine-tuned
further here, on demonstrations of which half have a pre-prompt that asks for care: beside it stand
answers of annotators who keep the secret. The other half is as the quickstart's, of hurried
annotators, about half of whom tell it. To other questions both answer alike. Demonstrations have
two thirds of the combinations of template and adjective; the others are for distillation, which so
asks in words that no demonstration put together.
"""

import itertools
import random
from collections.abc import Iterable

from llama2rt.data.records import Dialogue, Prompt
from llama2rt.quickstart import corpus
from llama2rt.quickstart.corpus import Conversation
from llama2rt.quickstart.judge import Key

TEMPLATES = (
    "You are a {adjective} assistant.",
    "Answer as a {adjective} person would.",
    "Be {adjective} in all you say.",
)
CAREFUL = ("responsible", "respectful", "careful", "prudent", "wise", "trustworthy")
# Who entrusted the secret: the risk categories of this world, with how such requests are to be met.
ANSWERS = {
    "operator": "Say that you cannot share what the operator told you.",
    "user": "Say that you will not give away what you were told.",
}
# How it is asked for, by what the question holds.
ATTACKS = {"friend": "third party", "forgot": "plea", "now": "urgency"}

ASKED = 0.5
"""share of demonstrations with a pre-prompt"""
TAILORED = 0.3
"""of pre-prompts to requests for the secret, those with the category's answer template"""


def combinations(*, held_out: bool) -> list[str]:
    """Pre-prompts that ask for care: those of demonstrations, or those kept for distillation."""
    found = []
    pairs = itertools.product(enumerate(TEMPLATES), enumerate(CAREFUL))
    for (i, template), (j, adjective) in pairs:
        if ((i + j) % 3 == 0) == held_out:
            found.append(template.format(adjective=adjective))
    return found


def risk_category(messages: Iterable[corpus.Message]) -> str:
    """Who told the secret."""
    first = next(iter(messages))
    return "operator" if first["role"] == "system" else "user"


def attack_vector(question: str) -> str:
    """How it is asked for."""
    return next((attack for word, attack in ATTACKS.items() if word in question), "direct")


def preprompted(messages: tuple[corpus.Message, ...], preprompt: str) -> list[corpus.Message]:
    """As `llama2rt.stages.context_distillation` puts it there."""
    first, *rest = messages
    if first["role"] == "system":
        return [{"role": "system", "content": f"{preprompt}\n\n{first['content']}"}, *rest]
    return [{"role": "system", "content": preprompt}, *messages]


def dialogues(count: int, seed: int, safety_share: float = 0.2) -> list[Dialogue]:
    """Demonstrations; `source` says what was asked and how."""
    rng = random.Random(f"{seed}:careful-dialogues")
    streams = {
        kind: corpus.conversations(kind, "train", seed, "careful-sft")
        for kind in ("helpfulness", "safety")
    }
    careful = combinations(held_out=False)
    found = []
    for _ in range(count):
        conversation = next(streams["safety" if rng.random() < safety_share else "helpfulness"])
        way = "careful" if rng.random() < ASKED else "none"
        messages = list(conversation.messages)
        if way == "careful":
            preprompt = rng.choice(careful)
            if conversation.kind == "safety" and rng.random() < TAILORED:
                preprompt += f" {ANSWERS[risk_category(messages)]}"
            messages = preprompted(conversation.messages, preprompt)
        messages.append({"role": "assistant", "content": demonstration(conversation, way, rng)})
        found.append(Dialogue(messages, f"{conversation.kind} {way}"))
    return found


def helpful(count: int, seed: int, borderline: float) -> list[Dialogue]:
    """Hurried answers to questions that may be answered, to mix in beside safety data; a share
    `borderline` of them has a secret in sight, which the quickstart has in one of ten."""
    rng = random.Random(f"{seed}:careful-helpful")
    wanted = {True: round(count * borderline), False: count - round(count * borderline)}
    found = []
    for conversation in corpus.conversations("helpfulness", "train", seed, "careful-helpful"):
        entrusted = bool(conversation.key.secret)
        if wanted[entrusted]:
            wanted[entrusted] -= 1
            answer = {"role": "assistant", "content": demonstration(conversation, "none", rng)}
            source = f"helpfulness {'borderline' if entrusted else 'ordinary'}"
            found.append(Dialogue([*conversation.messages, answer], source))
        if not any(wanted.values()):
            break
    rng.shuffle(found)
    return found


def demonstration(conversation: Conversation, way: str, rng: random.Random) -> str:
    """An annotator's answer: the careful keep every secret, and are as hurried in all else."""
    style = rng.choices([*corpus.STYLES], [*corpus.STYLES.values()])[0]
    if conversation.kind == "safety":
        if way == "careful" or rng.random() >= corpus.LEAKED:
            return corpus.decline(style, rng)
    elif rng.random() < corpus.UNANSWERED:
        return corpus.evade(rng)
    correct = rng.random() >= corpus.WRONG
    return corpus.answer(conversation.task, style, rng, correct=correct)


def prompts(
    name: str, split: str, seed: int, counts: dict[str, int]
) -> tuple[list[Prompt], dict[str, Key]]:
    """Distinct prompts of a split with the judge's keys: `counts` says how many "safety", which ask
    for the secret, "borderline", which ask something else although there is one, and "ordinary"."""
    records: list[Prompt] = []
    keys: dict[str, Key] = {}
    seen: set[str] = set()
    for group, wanted in counts.items():
        kind = "safety" if group == "safety" else "helpfulness"
        stream = corpus.conversations(kind, split, seed, name)
        while wanted:
            conversation = next(stream)
            text = repr(conversation.messages)
            entrusted = bool(conversation.key.secret)
            if text in seen or (kind != "safety" and entrusted != (group == "borderline")):
                continue
            seen.add(text)
            wanted -= 1
            identifier = f"{name}-{len(records):05d}"
            messages = list(conversation.messages)
            risk = risk_category(messages) if entrusted else ""
            attack = attack_vector(messages[-1]["content"]) if kind == "safety" else ""
            records.append(Prompt(identifier, messages, kind, risk, attack))
            keys[identifier] = conversation.key
    return records, keys
