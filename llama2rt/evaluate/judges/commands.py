"""`llama2rt judge`: versions compared by any judges, in one table and one file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise as neighbours
from pathlib import Path
from typing import Annotated, Any

import tyro

from llama2rt import atomic
from llama2rt.data import readers
from llama2rt.data.records import Prompt, Sample
from llama2rt.errors import InputError
from llama2rt.evaluate.intervals import bootstrap
from llama2rt.evaluate.judges import comparing
from llama2rt.evaluate.judges import people as annotators
from llama2rt.evaluate.judges.cache import Cache
from llama2rt.evaluate.judges.comparing import Answered, Outcome, Versions
from llama2rt.evaluate.judges.judging import Judge
from llama2rt.evaluate.judges.scorers import LetterJudge, RewardJudge
from llama2rt.evaluate.judges.speakers import AT_ONCE, Server, model_name
from llama2rt.evaluate.judges.speaking import Asking, SpeakingJudge, Template, template
from llama2rt.evaluate.samples import by_version, kinds_of, read_samples

RESULT = "judged.json"
CACHE = "said.jsonl"


def judged(
    versions: Versions,
    judges: Sequence[Judge],
    cache: Cache,
    *,
    against: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All `judges` on the same pairs: `versions` (answers and their length), `judges`, each with
    `comparing.results`, its `cost` and, with an opponent, its `progress`; and their `agreement`."""
    pairs = comparing.shown(versions, against)
    for judge in judges:
        judge.check([p.question for p in pairs] + [p.question.swapped() for p in pairs])
    rows, found = [], {}
    for judge in judges:
        before = judge.requests, cache.asked, cache.found
        said = comparing.outcomes(judge, pairs, cache)
        row = comparing.results(judge, pairs, said, seed)
        row["cost"] = {
            "requests": judge.requests - before[0],
            "asked": cache.asked - before[1],
            "from_cache": cache.found - before[2],
            **_tokens(said),
        }
        if against is not None:
            row["progress"] = comparing.progress(row["pairs"], against)
        rows.append(row)
        found[judge.name] = said
    return {
        "versions": [{"name": name, **_lengths(versions[name], seed)} for name in versions],
        "against": against,
        "judges": rows,
        "agreement": comparing.agreement(pairs, found),
    }


def _tokens(said: Sequence[Outcome]) -> dict[str, int]:
    """Read and written for all that was used, in this run or before."""
    verdicts = [verdict for outcome in said for verdict in (outcome.a_first, outcome.b_first)]
    return {
        key: sum(getattr(verdict, key) for verdict in verdicts)
        for key in ("prompt_tokens", "completion_tokens")
    }


def _lengths(answers: Any, seed: int) -> dict[str, Any]:
    texts = [answered.text for answered in answers.values()]
    return {
        "prompts": len(texts),
        "characters": bootstrap([len(text) for text in texts], seed=seed)._asdict(),
        "words": bootstrap([len(text.split()) for text in texts], seed=seed)._asdict(),
    }


def read_versions(paths: Sequence[Path], prompts: Sequence[Path] = ()) -> dict[str, Any]:
    """Versions by name, of each the first answer to every prompt. A prompt's kind is that of
    `prompts`, else what the samples say, else helpfulness."""
    asked: list[Prompt] = readers.read(list(prompts), "prompt") if prompts else []
    kinds = {prompt.id: prompt.kind for prompt in asked}
    found: dict[Path, dict[str, Answered]] = {}
    for path in paths:
        of_samples = kinds_of(path)
        answers: dict[str, Answered] = {}
        samples: list[Sample] = read_samples(path)
        for sample in samples:
            kind = kinds.get(sample.prompt_id, of_samples.get(sample.prompt_id, "helpfulness"))
            answered = Answered(sample.messages, sample.response.strip(), kind)
            answers.setdefault(sample.prompt_id, answered)
        found[path] = answers
    return by_version(found)


def describe(found: dict[str, Any]) -> str:
    """The same as lines for a terminal."""
    lines = []
    for row in found["judges"]:
        lines.append(f"judged by {row['name']} ({row['kind']})")
        for pair in row["pairs"]:
            lines.append(
                f"  {pair['a']} over {pair['b']}: {_percent(pair['rate'])}  {pair['wins']} won, "
                f"{pair['ties']} tied, {pair['losses']} lost"
            )
            for part, numbers in {**pair.get("kinds", {}), **pair.get("groups", {})}.items():
                if numbers["prompts"] < pair["prompts"]:
                    lines.append(
                        f"    {part}: {_percent(numbers['rate'])} of {numbers['prompts']} prompts"
                    )
            if unreadable := pair.get("unreadable"):
                lines.append(f"    {unreadable} replies name no side, and count as ties")
            for name, value in pair.get("agreement", {}).items():
                low, high = value["low"], value["high"]
                lines.append(f"    {name} of raters {value['mean']:.2f} ({low:.2f} to {high:.2f})")
        if (position := row.get("position")) and position["first"]:
            flipped = position["flipped"]
            opposite = f", opposite verdicts on {_percent(flipped)}" if flipped else ""
            lines.append(f"  for the first position {_percent(position['first'])}{opposite}")
        if cost := row.get("cost"):
            lines.append(
                f"  {cost['requests']} requests, {cost['asked']} asked, {cost['from_cache']} from "
                f"the cache, {cost['prompt_tokens']} tokens read, "
                f"{cost['completion_tokens']} written"
            )
    for row in found["agreement"]:
        if "same_winner" in row:
            lines.append(
                f"{' and '.join(row['judges'])} name the same winner: "
                f"{_percent(row['same_winner'])} of {row['decided']} pairs that both decide"
            )
    return "\n".join(lines)


def _percent(estimate: dict[str, Any]) -> str:
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Who judges."""

    reward: tuple[Path, ...] = ()
    """Folders of reward models."""
    safety: tuple[Path, ...] = ()
    """Reward models for safety prompts, one for each of --reward."""
    preference: tuple[Path, ...] = ()
    """Folders of pairwise preference models."""
    model: tuple[Path, ...] = ()
    """Folders of language models, whose probability of the letters A and B counts."""
    server: tuple[str, ...] = ()
    """URLs of servers of OpenAI's API; their key in LLAMA2RT_API_KEY."""
    server_model: tuple[str, ...] = ()
    """The model's name at each server; none for the only one that it lists."""
    ask: Path | None = None
    """TOML file with what a server is asked and how its reply is read."""
    graded: bool = False
    """Take the server's probability of A against B in place of its letter."""
    max_tokens: int | None = None
    """Longest reply of a server."""
    at_once: int = AT_ONCE
    """Requests to a server at a time."""

    def __bool__(self) -> bool:
        return bool(self.reward or self.preference or self.model or self.server)

    def check(self) -> None:
        """InputError for options that do not go together."""
        if self.safety and len(self.safety) != len(self.reward):
            raise InputError(
                f"safety: give one for each of the {len(self.reward)} reward models, or none"
            )
        if self.server_model and len(self.server_model) != len(self.server):
            raise InputError(
                f"server_model: give one for each of the {len(self.server)} servers, or none"
            )
        if self.at_once < 1:
            raise InputError(f"at_once: expected at least 1, got {self.at_once}")

    def made(self, seed: int) -> list[Judge]:
        """All of them. InputError where two have one name, OSError for a server that is gone."""
        asked = template(self.ask) if self.ask is not None else Template()
        made: list[Judge] = []
        for number, folder in enumerate(self.reward):
            models = {"helpfulness": folder}
            if self.safety:
                models["safety"] = self.safety[number]
            made.append(RewardJudge(model_name(folder), models))
        made += [LetterJudge(model_name(f), f, preference=True) for f in self.preference]
        made += [LetterJudge(model_name(f), f, preference=False) for f in self.model]
        for number, url in enumerate(self.server):
            name = self.server_model[number] if self.server_model else None
            options = Asking(self.max_tokens, self.graded, seed)
            made.append(SpeakingJudge(Server(url, name, at_once=self.at_once), asked, options))
        for one, other in neighbours(sorted(judge.name for judge in made)):
            if one == other:
                raise InputError(f"two judges are called {one!r}")
        return made


def command(
    samples: tyro.conf.Positional[tuple[Path, ...]] = (),
    /,
    judges: Annotated[Judges, tyro.conf.arg(name="")] = Judges(),
    *,
    out: Path,
    against: str | None = None,
    prompts: tuple[Path, ...] = (),
    people: tuple[Path, ...] = (),
    cache: Path | None = None,
    seed: int = 0,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Compare versions by judges that see two answers side by side.

    Args:
        samples: Files of samples, or folders of a run's samples, one a version, first to last; the
            first answer to each prompt counts.
        out: Folder for judged.json and for what judges have said, which is not asked again.
        against: The fixed opponent; without it every two versions meet.
        prompts: Files of prompts, which say the kind of each.
        people: Judgements that `llama2rt people export` wrote of an evaluation.
        cache: File of what judges have said; by default said.jsonl in OUT.
        seed: Of the bootstrap, and of requests.
        as_json: Print one JSON object.
    """
    if samples and len({path.resolve() for path in samples}) < max(2, len(samples)):
        raise InputError("samples: expected two versions or more")
    if bool(samples) != bool(judges) or not (samples or people):
        raise InputError(
            "give samples of two versions or more and who judges them (--reward, --preference, "
            "--model, --server), or what people said (--people)"
        )
    judges.check()
    by_people = [annotators.results(people, seed)] if people else []
    found: dict[str, Any] = {"versions": [], "against": against, "judges": [], "agreement": []}
    if samples:
        versions = read_versions(samples, prompts)
        _require(versions, against)
        made = judges.made(seed)
        with Cache(cache or out / CACHE) as kept:
            found = judged(versions, made, kept, against=against, seed=seed)
    found["judges"] += by_people
    text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
    atomic.write(out / RESULT, text + "\n")
    print(text if as_json else describe(found))


def _require(versions: Versions, against: str | None) -> None:
    try:
        comparing.shown(versions, against)
    except ValueError as error:
        raise InputError(f"samples: {error}") from None
