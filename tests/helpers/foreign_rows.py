"""A good row of every format that readers know, as its publisher writes it."""

from typing import Any

USER = {"role": "user", "content": "u"}
CHOSEN = {"role": "assistant", "content": "c"}
REJECTED = {"role": "assistant", "content": "r"}
_ANSWERS = {"chosen": "c", "rejected": "r"}
_RATED = {"annotations": {"honesty": {"Rating": "2"}, "helpfulness": {"Rating": "3"}}}

# (format's name, kind of record) -> row
ROWS: dict[tuple[str, str], dict[str, Any]] = {
    ("Anthropic HH transcripts", "comparison"): {
        "chosen": "\n\nHuman: u\n\nAssistant: c",
        "rejected": "\n\nHuman: u\n\nAssistant: r",
    },
    ("TRL, explicit prompt", "comparison"): {"prompt": "u", **_ANSWERS},
    ("TRL, implicit prompt", "comparison"): {
        "chosen": [USER, CHOSEN],
        "rejected": [USER, REJECTED],
    },
    ("UltraInteract", "comparison"): {
        "trajectory": [{"from": "user", "value": "u"}],
        **_ANSWERS,
        "task": "Coding",
    },
    ("Orca pairs", "comparison"): {"system": "s", "question": "u", **_ANSWERS},
    ("Distilabel-Orca", "comparison"): {
        "system": "s",
        "input": "u",
        **_ANSWERS,
        "rating": [9.0, 3.0],
    },
    ("GSM8K model solutions", "comparison"): {
        "question": "u",
        "ground_truth": "g",
        "6B": {"is_correct": True, "solution": "c"},
        "175B": {"is_correct": False, "solution": "r"},
    },
    ("UltraFeedback", "comparison"): {
        "instruction": "u",
        "completions": [
            {"response": "c", "fine-grained_score": 4.5},
            {"response": "r", **_RATED},
        ],
        "models": ["a", "b"],
    },
    ("SHP", "comparison"): {
        "post_id": "p",
        "history": "u",
        "human_ref_A": "c",
        "human_ref_B": "r",
        "labels": 1,
        "score_ratio": 3.0,
        "domain": "askculinary",
    },
    ("TRL prompt and completion", "dialogue"): {"prompt": "u", "completion": "c"},
    ("ShareGPT conversations", "dialogue"): {
        "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "c"}],
        "id": "x",
    },
    ("GSM8K", "dialogue"): {"question": "u", "answer": "c"},
    ("TRL prompt only", "prompt"): {"prompt": "u"},
    ("GSM8K questions", "prompt"): {"question": "u", "answer": "c"},
    ("UltraFeedback binarized", "prompt"): {
        "prompt": "u",
        "prompt_id": "x",
        "messages": [USER, CHOSEN],
        "chosen": [USER, CHOSEN],
        "rejected": [USER, REJECTED],
        "score_chosen": 8.0,
        "score_rejected": 5.0,
    },
    ("RLHFlow prompts", "prompt"): {"context": "u", "context_messages": [USER]},
}

# Formats that one row does not make a record of by itself, or that give two.
PKU = {
    "prompt": "u",
    "response_0": "c",
    "response_1": "r",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
    "prompt_source": "alpaca",
}
HELPSTEER = [
    {"prompt": "u", "response": "c", "helpfulness": 4, "correctness": 4, "coherence": 4},
    {"prompt": "u", "response": "r", "helpfulness": 1, "correctness": 2, "coherence": 4},
]
