"""A scored sample with its tokens, as a record and as a line of a file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama2rt import atomic
from llama2rt.data.packing import Example
from llama2rt.data.records import Prompt, Sample
from llama2rt.errors import InputError


@dataclass(frozen=True)
class Response:
    """A scored sample with what training needs and a Sample record does not hold: its tokens."""

    prompt: Prompt
    text: str
    prompt_tokens: list[int]
    tokens: list[int]
    finished: bool
    """False where the length limit cut it: its tokens then end without an EOS"""
    reward: float
    scores: dict[str, float]
    policy: str
    temperature: float
    seed: int

    def to_json(self) -> dict[str, Any]:
        """A Sample record with further keys, which readers of records ignore."""
        record = Sample(
            self.prompt.id,
            self.prompt.messages,
            self.text,
            self.scores,
            self.reward,
            self.policy,
            self.temperature,
            self.seed,
        )
        said = {"risk_category": self.prompt.risk_category}
        said |= {"attack_vector": self.prompt.attack_vector}
        return record.to_json() | {
            "kind": self.prompt.kind,
            **{key: value for key, value in said.items() if value},
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "finished": self.finished,
        }

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "Response":
        for key in ("prompt_tokens", "tokens"):
            if not line[key] or not all(type(token) is int and token >= 0 for token in line[key]):
                raise ValueError(f"{key}: expected token ids")
        if not isinstance(line["response"], str):
            raise ValueError("response: expected text")
        if not isinstance(line["finished"], bool):
            raise ValueError("finished: expected true or false")
        return cls(
            prompt=Prompt(
                line["prompt_id"],
                line["messages"],
                line["kind"],
                line.get("risk_category", ""),
                line.get("attack_vector", ""),
            ),
            text=line["response"],
            prompt_tokens=line["prompt_tokens"],
            tokens=line["tokens"],
            finished=line["finished"],
            reward=line["reward"],
            scores=line["scores"],
            policy=line["policy"],
            temperature=line["temperature"],
            seed=line["seed"],
        )


def response_example(response: Response) -> Example:
    """Prompt and response as sampled; the response's tokens are the targets."""
    tokens = [*response.prompt_tokens, *response.tokens]
    trainable = np.arange(len(tokens)) >= len(response.prompt_tokens)
    return Example.of(tokens, trainable)


def write_responses(path: Path, responses: Sequence[Response]) -> None:
    """JSON lines, visible only when complete."""
    lines = (json.dumps(response.to_json(), ensure_ascii=False) for response in responses)
    atomic.write(path, "".join(f"{line}\n" for line in lines))


def read_responses(path: Path) -> list[Response]:
    """What `write_responses` wrote; InputError naming the file and line otherwise."""
    try:
        # Not splitlines(): a response may hold any of Unicode's other line ends.
        text = path.read_text(encoding="utf-8").removesuffix("\n")
        lines = text.split("\n") if text else []
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    responses = []
    for number, line in enumerate(lines, start=1):
        try:
            responses.append(Response.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: not a sample of this stage ({error!r})") from None
    return responses
