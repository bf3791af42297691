"""A good row of every format that readers know, as its publisher writes it."""

from typing import Any

USER = {"role": "user", "content": "u"}
CHOSEN = {"role": "assistant", "content": "c"}
REJECTED = {"role": "assistant", "content": "r"}
_ANSWERS = {"chosen": "c", "rejected": "r"}
_RATED = {"annotations": {"honesty": {"Rating": "2"}, "helpfulness": {"Rating": "3"}}}


def _of_author(number: int, text: str, **scored: Any) -> dict[str, Any]:
    """An answer as Stack Exchange preferences have it."""
    author = {"author": "a", "author_id": number, "author_profile": "https://example.org/a"}
    return {"answer_id": number, **author, **scored, "text": text}


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
    ("WebGPT comparisons", "comparison"): {
        "question": {"dataset": "eli5", "id": "x", "full_text": "u"},
        "quotes_0": {"title": ["t (example.org)"], "extract": ["e"]},
        "answer_0": "c",
        "tokens_0": {"prefix": [1, 2], "completion": [3]},
        "score_0": 0.5,
        "quotes_1": {"title": [], "extract": []},
        "answer_1": "r",
        "tokens_1": {"prefix": [1], "completion": [3]},
        "score_1": -0.5,
    },
    ("Stack Exchange preferences", "comparison"): {
        "qid": 7,
        "question": "u",
        "answers": [
            _of_author(1, "r", pm_score=-1, selected=False),
            _of_author(2, "c", pm_score=3, selected=True),
        ],
        "date": "2020/01/31",
        "metadata": ["https://example.org/questions/7"],
    },
    ("Nectar", "comparison"): {
        "prompt": "\n\nHuman: u\n\nAssistant: ",
        "answers": [
            {"answer": "r", "model": "m", "rank": 2.0},
            {"answer": "c", "model": "n", "rank": 1.0},
        ],
        "turns": 1,
        "num_responses": 2,
        "source": ["lmsys-chat-1m"],
        "good_natured": True,
    },
    ("HelpSteer3", "comparison"): {
        "domain": "general",
        "language": "english",
        "context": [USER],
        "response1": "c",
        "response2": "r",
        "overall_preference": -2,
        "individual_preference": [
            {"score": score, "reasoning": "w", "feedback1": "f", "feedback2": "f"}
            for score in (-3, -1, 1, 0)
        ],
    },
    ("Alpaca", "dialogue"): {"instruction": "u", "input": "", "output": "c", "text": "laid out"},
    ("Alpaca instructions", "prompt"): {"instruction": "u", "input": "", "output": "c"},
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
SUMMARY = {  # its prompt is more than the post
    "info": {"id": "t3_1", "post": "p", "title": "t", "subreddit": "AskReddit"},
    "summaries": [
        {"text": " r", "policy": "sup4", "note": "n"},
        {"text": " c", "policy": "ref", "note": None},
    ],
    "choice": 1,
    "worker": "w1",
    "batch": "batch9",
    "split": "train",
    "extra": {"confidence": 8},
}
HELPSTEER = [
    {"prompt": "u", "response": "c", "helpfulness": 4, "correctness": 4, "coherence": 4},
    {"prompt": "u", "response": "r", "helpfulness": 1, "correctness": 2, "coherence": 4},
]
