"""A record of each kind with every key set, and ways from there to bad ones."""

from typing import Any

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
GOOD = {
    "document": {"text": "t", "source": "s"},
    "dialogue": {"messages": [USER, ANSWER], "source": "s"},
    "prompt": {"id": "p", "messages": [USER], "kind": "safety"},
    "comparison": {
        "prompt": [USER],
        "chosen": "c",
        "rejected": "r",
        "rating": "better",
        "safety": "both_safe",
        "kind": "safety",
        "source": "s",
        "votes": [{"rater": "a", "prefers": "chosen", "rating": "better", "safety": "both_safe"}],
    },
    "sample": {
        "prompt_id": "p",
        "messages": [USER],
        "response": "r",
        "scores": {"helpfulness": 0.5},
        "reward": -1,
        "policy": "v1",
        "temperature": 0.7,
        "seed": 3,
    },
}


def changed(kind: str, /, **changes: Any) -> dict[str, Any]:
    """A good record with some keys changed; ... removes a key."""
    record = {**GOOD[kind], **changes}
    return {key: value for key, value in record.items() if value is not ...}
