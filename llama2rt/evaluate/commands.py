"""`llama2rt evaluate`: what a reward model says about comparison files and sample files, or, with
`--tasks`, what a language model does on lm-eval's tasks (`harness`)."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from llama2rt.checkpoint import load
from llama2rt.data.readers import read
from llama2rt.data.records import KINDS, Comparison, Sample
from llama2rt.data.sources import Source
from llama2rt.errors import InputError, naming
from llama2rt.evaluate import best_of, length, preference
from llama2rt.evaluate.intervals import bootstrap
from llama2rt.evaluate.samples import by_version, read_samples
from llama2rt.evaluate.win_rates import win_rate
from llama2rt.model import ScalarModel
from llama2rt.rollout.scoring import score
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

_MOST_TOKENS = 2**31 - 1  # of a packed batch, whose offsets are int32


def evaluate(
    reward_model: Path,
    comparisons: Sequence[Path | Source] = (),
    samples: Sequence[Path] = (),
    *,
    skip_invalid: int = 0,
    micro_tokens: int = 16384,
) -> dict[str, Any]:
    """Measure a reward model on comparisons, or compare versions by its scores.

    Comparison files give accuracy by kind and rating. The kinds stand apart because helpfulness and
    safety may rank the same two answers the other way round. Sample files, or folders of a run's
    samples, one a version, give each version's mean reward and, for every two versions, the win
    rate on the prompts that both answered. Where all prompts of a version have the same number of
    samples, they also give the expected max and median reward among N samples (from two on) and the
    reward-length correlation (from three on). Intervals are of 95 %, over prompts.

    Args:
        reward_model: folder of a reward model, with its tokenizer.
        comparisons: files of comparisons; a Source says what a file itself does not.
        samples: files of samples, or folders whose parts are one version's, one a version.
        skip_invalid: invalid records to tolerate in each file.
        micro_tokens: tokens scored at once.
    """
    if not (comparisons or samples):
        raise InputError("evaluate: nothing to do; give --comparisons or --samples")
    if skip_invalid < 0:
        raise InputError(f"skip_invalid: expected at least 0, got {skip_invalid}")
    if not 1 <= micro_tokens <= _MOST_TOKENS:
        raise InputError(f"micro_tokens: expected 1 to {_MOST_TOKENS}, got {micro_tokens}")
    for path in comparisons:
        if Source.of(path).held_out is not None:
            raise InputError(f"{path}: held_out: means nothing here, where nothing is trained on")
    # Read and check everything before the weights: bad input should cost no scoring.
    pairs = [(str(path), read(path, "comparison", skip_invalid)) for path in comparisons]
    versions = by_version({path: read_samples(path, skip_invalid) for path in samples})
    _require_shared_prompts(versions)
    tokenizer = _tokenizer(reward_model, pairs, versions)
    model, _ = load(reward_model, "cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(model, ScalarModel)

    result: dict[str, Any] = {"reward_model": str(reward_model)}
    if pairs:
        result["comparisons"] = [
            {
                "file": file,
                "kind": kind,
                "accuracy": _accuracy(model, tokenizer, same, micro_tokens),
            }
            for file, records in pairs
            for kind in KINDS
            if (same := [record for record in records if record.kind == kind])
        ]
    if versions:
        rewards = {
            name: _rewards(model, tokenizer, records, micro_tokens)
            for name, records in versions.items()
        }
        result["versions"] = [
            {"name": name, **_version(versions[name], rewards[name])} for name in versions
        ]
        result["win_rates"] = [
            _win_rate(a, b, rewards[a], rewards[b]) for a, b in combinations(versions, 2)
        ]
    return result


def _tokenizer(
    reward_model: Path,
    pairs: Sequence[tuple[str, list[Comparison]]],
    versions: dict[str, list[Sample]],
) -> Tokenizer:
    """The reward model's; InputError for another kind of model and for an answer beyond its
    context."""
    outline, tokenizer = load(reward_model, "meta")
    if not isinstance(outline, ScalarModel):
        raise InputError(f"{reward_model}: expected a reward model, found a language model")
    if tokenizer is None:
        raise InputError(f"{reward_model}: holds no tokenizer")
    context = outline.config.context
    for name, comparisons in pairs:
        texts = ((r.prompt, text) for r in comparisons for text in (r.chosen, r.rejected))
        _require_fit(name, tokenizer, texts, context)
    for name, samples in versions.items():
        _require_fit(name, tokenizer, ((r.messages, r.response) for r in samples), context)
    return tokenizer


def describe(result: dict[str, Any]) -> str:
    """What `evaluate` found, as lines for a terminal."""
    lines = []
    for file in result.get("comparisons", []):
        lines.append(f"{file['file']}: {file['kind']} pairs ranked as annotated")
        for row in file["accuracy"]:
            lines.append(
                f"  {row['rating'].replace('_', ' '):<22}{_percent(row)}"
                f"  of {row['pairs']} pairs, {row['ties']} ties counted half"
            )
    if "versions" in result:
        lines.append("mean reward")
    for version in result.get("versions", []):
        reward = version["reward"]
        lines.append(
            f"  {version['name']:<22}{reward['mean']:.3f} [{reward['low']:.3f}, "
            f"{reward['high']:.3f}]  {version['samples']} samples of {version['prompts']} prompts"
        )
        correlation = version.get("length_correlation")
        if correlation and correlation["mean"] is not None:
            lines.append(
                f"    reward-length correlation {correlation['mean']:+.2f} "
                f"[{correlation['low']:+.2f}, {correlation['high']:+.2f}], "
                f"undefined on {correlation['undefined']} prompts"
            )
    if result.get("win_rates"):
        lines.append("win rates, ties counted half")
    for pair in result.get("win_rates", []):
        lines.append(
            f"  {pair['a']} over {pair['b']}: {_percent(pair)}  {pair['wins']} won, "
            f"{pair['ties']} tied, {pair['losses']} lost"
        )
    return "\n".join(lines)


def _require_shared_prompts(versions: dict[str, list[Sample]]) -> None:
    prompts = {name: {r.prompt_id for r in records} for name, records in versions.items()}
    for a, b in combinations(versions, 2):
        if not prompts[a] & prompts[b]:
            raise InputError(f"samples: {a} and {b} share no prompt_id")


def _require_fit(
    name: str, tokenizer: Tokenizer, items: Iterable[tuple[chat.Messages, str]], context: int
) -> None:
    for number, (messages, text) in enumerate(items, start=1):
        with naming(f"{name}: answer {number}"):
            length = len(chat.encode_response(tokenizer, messages, text)[0])
        if length > context:
            raise InputError(
                f"{name}: answer {number} has {length} tokens with its prompt, the reward model's "
                f"context is {context}"
            )


def _accuracy(
    model: ScalarModel, tokenizer: Tokenizer, records: Sequence[Comparison], micro_tokens: int
) -> list[dict[str, Any]]:
    items = [(r.prompt, text) for r in records for text in (r.chosen, r.rejected)]
    scores = score(model, tokenizer, items, micro_tokens=micro_tokens)
    return preference.accuracy_table(scores[::2], scores[1::2], [r.rating for r in records])


def _rewards(
    model: ScalarModel, tokenizer: Tokenizer, records: Sequence[Sample], micro_tokens: int
) -> dict[str, list[float]]:
    """Rewards by prompt id, samples in the order of the file."""
    scores = score(
        model, tokenizer, [(r.messages, r.response) for r in records], micro_tokens=micro_tokens
    )
    rewards = model.normalization.of(torch.from_numpy(scores))
    by_prompt: dict[str, list[float]] = {}
    for record, value in zip(records, rewards.tolist(), strict=True):
        by_prompt.setdefault(record.prompt_id, []).append(value)
    return by_prompt


def _version(records: Sequence[Sample], rewards: dict[str, list[float]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prompts": len(rewards),
        "samples": len(records),
        "reward": bootstrap([np.mean(values) for values in rewards.values()])._asdict(),
    }
    sizes = {len(values) for values in rewards.values()}
    if len(sizes) == 1 and sizes != {1}:
        lengths: dict[str, list[int]] = {}
        for record in records:
            lengths.setdefault(record.prompt_id, []).append(len(record.response))
        table = list(rewards.values())
        found["best_of"] = best_of.curves(table)
        if min(sizes) > 2:  # two samples correlate perfectly or not at all
            correlation = length.correlation(table, [lengths[prompt] for prompt in rewards])
            interval = correlation.mean._asdict() if correlation.mean else {"mean": None}
            found["length_correlation"] = {**interval, "undefined": correlation.undefined}
    return found


def _win_rate(
    a: str, b: str, ours: dict[str, list[float]], theirs: dict[str, list[float]]
) -> dict[str, Any]:
    shared = [prompt for prompt in ours if prompt in theirs]
    found = win_rate([ours[prompt] for prompt in shared], [theirs[prompt] for prompt in shared])
    return {
        "a": a,
        "b": b,
        **found.rate._asdict(),
        "wins": found.wins,
        "ties": found.ties,
        "losses": found.losses,
    }


def _percent(estimate: dict[str, Any]) -> str:
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:5.1f} % [{low:.1f}, {high:.1f}]"


@dataclass(frozen=True)
class TaskOptions:
    """Of --tasks alone."""

    shots: int | None = None
    """Examples before each question, where neither the task nor a paper's list fixes them."""
    limit: int | None = None
    """Documents of each task, the first ones."""
    chat: bool = False
    """Ask in the model's chat format, shots as earlier turns."""
    system: str | None = None
    """System message of these chats."""
    no_bos_token: bool = False
    """Contexts without BOS, as lm-eval's add_bos_token=False."""
    run_unsafe_code: bool = False
    """Let tasks such as humaneval run the code that the model writes."""
    seed: int = 0
    """Of tasks that sample."""
    out: Path | None = None
    """Folder for lm-eval's own files: results_*.json and samples_*.jsonl."""


def command(
    model: tyro.conf.Positional[Path],
    *,
    comparisons: tuple[Source, ...] = (),
    samples: tuple[Path, ...] = (),
    tasks: tuple[str, ...] = (),
    task_options: tyro.conf.OmitArgPrefixes[TaskOptions] = TaskOptions(),
    skip_invalid: int = 0,
    micro_tokens: int = 16384,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Measure a reward model on comparisons, compare versions by its scores, or evaluate a language
    model on lm-eval's tasks.

    Args:
        model: Folder of a reward model, with its tokenizer; with --tasks, of a language model, or
            the run directory of a plan, of which every version is compared with SFT.
        comparisons: Files of comparisons: accuracy by rating; or tables of a recipe, such as
            '{path="hh-harmless.jsonl.gz", kind="safety"}'.
        samples: Files of samples, or folders of a run's samples, one a version: mean reward,
            win rates, reward against N.
        tasks: Tasks of lm-eval by name, task files or folders of them, or a paper's list, llama2
            or rlhf-workflow.
        task_options: Of --tasks alone.
        skip_invalid: Bad records to tolerate in each file.
        micro_tokens: Tokens scored at once.
        as_json: Print one JSON object.
    """
    if tasks:
        if comparisons or samples or skip_invalid:
            raise InputError("tasks: go without --comparisons, --samples and --skip-invalid")
        _evaluate_tasks(model, tasks, task_options, micro_tokens, as_json)
        return
    if task_options != TaskOptions():
        given = [f.name for f in fields(task_options) if getattr(task_options, f.name) != f.default]
        raise InputError(f"{', '.join(given)}: means nothing without --tasks")
    result = evaluate(
        model, comparisons, samples, skip_invalid=skip_invalid, micro_tokens=micro_tokens
    )
    print(json.dumps(result) if as_json else describe(result))


def _evaluate_tasks(
    model: Path, names: Sequence[str], options: TaskOptions, micro_tokens: int, as_json: bool
) -> None:
    from llama2rt.evaluate.harness import commands as harness
    from llama2rt.evaluate.harness.runs import RunOptions

    how = RunOptions(
        limit=options.limit,
        chat=options.chat,
        system=options.system,
        add_bos_token=not options.no_bos_token,
        run_unsafe_code=options.run_unsafe_code,
        micro_tokens=micro_tokens,
        seed=options.seed,
    )
    result = harness.evaluate_tasks(model, names, options.shots, how, options.out)
    print(json.dumps(result, default=str) if as_json else harness.describe(result))
