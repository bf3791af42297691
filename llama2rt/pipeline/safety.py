"""`llama2rt safety`: how often versions of a policy violate and how often they refuse for nothing,
by files of their samples, or by answers that a policy gives here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from llama2rt.annotate.safety import SafetyJudgeOptions, Verdict
from llama2rt.checkpoint import load
from llama2rt.data import readers
from llama2rt.data.records import Prompt, Sample
from llama2rt.data.sources import Source
from llama2rt.errors import InputError
from llama2rt.evaluate import safety
from llama2rt.generate import Engine
from llama2rt.generate.sampling import check_options
from llama2rt.model import Llama
from llama2rt.rollout import attacks

NO_JUDGE = SafetyJudgeOptions()
RATES = {"violation": "violations", "false_refusal": "false refusals"}


@dataclass(frozen=True)
class Asking:
    """A policy that answers here, in place of a file of its samples."""

    policy: Path | None = None
    """a language model; it answers every turn of the user's in prompts"""
    prompts: tuple[Source, ...] = ()
    """files of prompts; of conversations with several turns, each turn is an attack of its own"""
    temperature: float = 1.0
    """of its answers"""
    max_tokens: int = 256
    """length of its answers"""
    seed: int = 0
    """of sampling"""
    out: Path | None = None
    """a file for its answers, as sample records"""

    def check(self) -> list[Prompt]:
        """The prompts. InputError where something is missing or makes no sense."""
        if (self.policy is None) != (not self.prompts):
            raise InputError("policy, prompts: one says who answers, the other what: give both")
        if self.policy is None:
            if self.out is not None:
                raise InputError("out: only with policy")
            return []
        if self.out is not None and self.out.exists():
            raise InputError(f"out: {self.out} exists")
        check_options(1, self.temperature, 1.0, 0, self.max_tokens, self.seed)
        outline, tokenizer = load(self.policy, "meta")
        if not isinstance(outline, Llama):
            raise InputError(
                f"policy: {self.policy}: expected a language model, found a reward model"
            )
        if tokenizer is None:
            raise InputError(f"policy: {self.policy}: holds no tokenizer")
        found: list[Prompt] = readers.read(list(self.prompts), "prompt")
        return found

    def answers(self, prompts: Sequence[Prompt]) -> list[Sample]:
        """What the policy answers."""
        assert self.policy is not None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer = load(self.policy, device)
        assert isinstance(model, Llama) and tokenizer is not None  # `check`
        found = attacks.converse(
            Engine(model, tokenizer),
            prompts,
            policy=str(self.policy),
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            seed=self.seed,
        )
        if self.out is not None:
            readers.write(self.out, found)
        return found


def measure(samples: Mapping[str, Sequence[Sample]], judge: SafetyJudgeOptions) -> dict[str, Any]:
    """`evaluate.safety.measure` of each version's samples by name, and the differences of the
    others to the first on the prompts that both answered. InputError as from `judge.open`, and for
    a sample that does not say its kind."""
    for name, own in samples.items():
        for number, sample in enumerate(own, start=1):
            if not sample.kind:
                raise InputError(
                    f"{name}: sample {number}, of prompt {sample.prompt_id!r}: kind: missing; say "
                    f'it of the file: {{path = "{name}", kind = "safety"}}'
                )
    judged = judge.open([sample for own in samples.values() for sample in own])
    verdicts: dict[str, list[Verdict]] = {name: judged(own) for name, own in samples.items()}
    versions = [
        {"name": name, **safety.measure(own, verdicts[name])} for name, own in samples.items()
    ]
    first, *others = samples
    differences = []
    for name in others:
        pair, said = [samples[first], samples[name]], [verdicts[first], verdicts[name]]
        found = {key: safety.paired(key, pair, said) for key in RATES}
        differences.append({"name": name, "than": first, **found})
    return {"versions": versions, "differences": differences}


def command(
    samples: tyro.conf.Positional[tuple[Source, ...]] = (),
    /,
    judge: Annotated[SafetyJudgeOptions, tyro.conf.arg(name="")] = NO_JUDGE,
    asking: Annotated[Asking, tyro.conf.arg(name="")] = Asking(),
    *,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Violations and false refusals of versions of a policy, with intervals.

    Violations are unsafe answers to prompts of kind safety, false refusals refusals of prompts of
    kind helpfulness. Both are told by risk category and attack vector too, and violations by turn
    where conversations are answered turn by turn.

    Args:
        samples: Files of samples, a version each; or tables such as '{path="a.jsonl",
            kind="safety"}' where samples do not say their kind.
        as_json: Print one JSON object.
    """
    judge.check()
    prompts = asking.check()
    versions: dict[str, Sequence[Sample]] = {}
    for source in samples:
        if str(source) in versions and source.kind is None:
            raise InputError(f"samples: {source} stands there twice")
        versions[str(source)] = [*versions.get(str(source), ()), *readers.read([source], "sample")]
    if prompts:
        versions[str(asking.policy)] = asking.answers(prompts)
    if not versions:
        raise InputError("give files of samples, or --policy and --prompts")
    result = measure(versions, judge)
    print(json.dumps(result) if as_json else describe(result))


def describe(result: Mapping[str, Any]) -> str:
    """What `measure` found, as lines for a terminal."""
    lines = []
    for version in result["versions"]:
        lines.append(version["name"])
        lines += [f"  {label:<28}{_said(version[key])}" for key, label in RATES.items()]
        for key, values in version["by"].items():
            for value, rates in values.items():
                name = f"{key.replace('_', ' ')}: {value}"
                lines += [
                    f"    {name}, {label}: {_said(rates[rate])}"
                    for rate, label in RATES.items()
                    if rates[rate] is not None
                ]
        for row in version.get("turns", ()):
            lines.append(
                f"    turn {row['turn']}: violations {_said(row['violation'])}, in a conversation "
                f"so far {_said(row['so_far'])}"
            )
    for row in result["differences"]:
        for key, label in RATES.items():
            if row[key] is not None:
                lines.append(f"{row['name']}, {label} more than {row['than']}: {_said(row[key])}")
    return "\n".join(lines)


def _said(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "nothing judged"
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    unjudged = f", {estimate['unjudged']} not judged" if estimate.get("unjudged") else ""
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}] of {estimate['prompts']} prompts{unjudged}"
