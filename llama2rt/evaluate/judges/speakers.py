"""Who answers messages: a server of OpenAI's API, or a model in this process."""

import concurrent.futures
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llama2rt.data.records import Messages
from llama2rt.errors import InputError
from llama2rt.evaluate.judges.cache import Cache, key_of
from llama2rt.generate.commands import Opening
from llama2rt.generate.engine import Completion
from llama2rt.generate.remote.client import Client
from llama2rt.run.manifest import hash_path

AT_ONCE = 8
"""requests at a time"""


@dataclass(frozen=True)
class Options:
    """How an answer is drawn."""

    temperature: float = 0.0
    max_tokens: int = 1024
    seed: int = 0
    alternatives: int = 0
    """likeliest first tokens that are asked for with their log-probabilities"""


@dataclass(frozen=True)
class Reply:
    """An answer, and what it took."""

    text: str
    finished: bool = True
    """False where the length limit cut it"""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first: Mapping[str, float] = field(default_factory=dict)
    """log-probabilities of the likeliest first tokens, by their text"""


Told = Callable[[int, Reply], None]


class Speaker(Protocol):
    """Answers messages; the same ones with the same options alike."""

    @property
    def name(self) -> str: ...
    @property
    def requests(self) -> int:
        """Sent so far, those that were sent again too."""
        ...

    def identity(self) -> Any:
        """What its answers depend on, as JSON has it."""
        ...

    def answer(self, prompts: Sequence[Messages], options: Options, tell: Told) -> None:
        """Tell each answer as it comes, in any order. InputError for what is refused, OSError where
        some are not answered, after all that could be were told."""
        ...


def replies(
    speaker: Speaker, prompts: Sequence[Messages], options: Options, cache: Cache
) -> list[Reply]:
    """Its answers to `prompts`, those that the cache lacks asked for."""
    who = speaker.identity()
    keys = [key_of("reply", who, asdict(options), messages) for messages in prompts]

    def ask(lacking: Sequence[int], tell: Callable[[int, dict[str, Any]], None]) -> None:
        speaker.answer(
            [prompts[i] for i in lacking], options, lambda j, reply: tell(lacking[j], asdict(reply))
        )

    return [Reply(**said) for said in cache.complete(keys, ask)]


class Server:
    """A server of OpenAI's API, asked in the chat format. Its key is in LLAMA2RT_API_KEY."""

    def __init__(
        self, url: str, model: str | None = None, *, at_once: int = AT_ONCE, attempts: int = 6
    ) -> None:
        """`model`: its name there; None for the only one that is listed. `attempts` of a request
        before it waits for the others. InputError for a server that has no such model."""
        self._client = Client(url, api_key=os.environ.get("LLAMA2RT_API_KEY"), attempts=attempts)
        self._at_once = at_once
        self.name = model or self._listed()

    @property
    def requests(self) -> int:
        return self._client.requests

    def identity(self) -> Any:
        return {"server": self._client.url, "model": self.name}

    def answer(self, prompts: Sequence[Messages], options: Options, tell: Told) -> None:
        """See `Speaker`. What failed is asked again once the others were, as long as any of a round
        is answered."""
        lacking = list(range(len(prompts)))
        while lacking:
            failed, reason = self._round(prompts, lacking, options, tell)
            if len(failed) == len(lacking):
                raise ConnectionError(
                    f"{len(failed)} of {len(prompts)} requests were not answered: {reason}"
                )
            lacking = failed

    def _round(
        self, prompts: Sequence[Messages], which: Sequence[int], options: Options, tell: Told
    ) -> tuple[list[int], OSError | None]:
        failed: list[int] = []
        reason: OSError | None = None
        refused: BaseException | None = None
        with concurrent.futures.ThreadPoolExecutor(self._at_once) as pool:
            asked = {pool.submit(self._ask, prompts[i], options): i for i in which}
            try:
                for future in concurrent.futures.as_completed(asked):
                    if future.cancelled():
                        continue
                    if (error := future.exception()) is None:
                        tell(asked[future], future.result())
                    elif isinstance(error, OSError):
                        failed.append(asked[future])
                        reason = error
                    else:  # what is under way is paid for, and told
                        refused = refused or error
                        for other in asked:
                            other.cancel()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if refused is not None:
            raise refused
        return sorted(failed), reason

    def _listed(self) -> str:
        listed = self._client.get("/v1/models")
        try:
            names = [str(entry["id"]) for entry in listed["data"]]
        except (KeyError, TypeError):
            raise InputError(f"{self._client.url}/v1/models: not OpenAI's list of models") from None
        if len(names) != 1:
            known = ", ".join(names) or "none"
            raise InputError(f"server_model: {self._client.url} has {known}; name one")
        return names[0]

    def _ask(self, messages: Messages, options: Options) -> Reply:
        asked: dict[str, Any] = {
            "model": self.name,
            "messages": messages,
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
            "seed": options.seed,
        }
        if options.alternatives:
            asked |= {"logprobs": True, "top_logprobs": options.alternatives}
        reply = self._client.post("/v1/chat/completions", asked)
        try:
            choice, used = reply["choices"][0], reply.get("usage") or {}
            text = choice["message"]["content"] or ""
            if not isinstance(text, str):
                raise TypeError("content")
            # JSON may hold half of a surrogate pair, which no file does.
            text = text.encode(errors="replace").decode()
            first: dict[str, float] = {}
            if options.alternatives:
                for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
                    token = entry["token"].encode(errors="replace").decode()
                    first[token] = float(entry["logprob"])
            return Reply(
                text.strip(),
                choice["finish_reason"] == "stop",
                int(used.get("prompt_tokens", 0)),
                int(used.get("completion_tokens", 0)),
                first,
            )
        except (KeyError, IndexError, TypeError, ValueError):
            wanted = " with top_logprobs" if options.alternatives else ""
            found = json.dumps(reply)[:200]
            raise InputError(
                f"{self._client.url}: expected a chat completion{wanted}, got {found}"
            ) from None


class Local:
    """A model's folder or a GGUF file, loaded when it is first asked."""

    requests = 0

    def __init__(
        self, model: Path, name: str | None = None, opening: Opening | None = None
    ) -> None:
        self._model, self._opening = model, opening or Opening()
        self.name = name or model_name(model)
        self._hash: str | None = None

    def identity(self) -> Any:
        if self._hash is None:
            self._hash = hash_path(self._model)
        return {"weights": self._hash, "dtype": self._opening.dtype, "as": self._opening.weights}

    def answer(self, prompts: Sequence[Messages], options: Options, tell: Told) -> None:
        """See `Speaker`."""
        if options.alternatives:
            raise InputError("graded: only a server gives its likeliest first tokens")
        engine = self._opening.engine(self._model)
        numbers: dict[int, int] = {}
        for i, messages in enumerate(prompts):
            # A sample depends on its prompt's index: it shall depend on the prompt, whichever of
            # its fellows are in the cache.
            number = int(key_of(messages)[:8], 16) >> 1
            while number in numbers:
                number += 1
            numbers[number] = i

        def finished(done: Completion) -> None:
            used = len(done.prompt_tokens), len(done.tokens)
            whole = done.finish_reason == "stop"
            tell(numbers[done.prompt_index], Reply(done.text.strip(), whole, *used))

        engine.generate(
            prompts,
            temperature=options.temperature,
            max_tokens=options.max_tokens,
            seed=options.seed,
            indices=list(numbers),
            on_finish=finished,
        )


def model_name(folder: Path) -> str:
    """A model's name by its folder: of its run's directory, where it is a run's model."""
    whole = folder.resolve()
    return whole.parent.name if whole.name == "model" else whole.name.removesuffix(".gguf")
