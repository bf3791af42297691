"""`llama2rt evaluate`: what a reward model says about comparison files and sample files."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama2rt.checkpoint import load
from llama2rt.data.readers import read
from llama2rt.data.records import Comparison, Sample
from llama2rt.errors import InputError
from llama2rt.evaluate import best_of, length, preference
from llama2rt.evaluate.intervals import bootstrap
from llama2rt.evaluate.scoring import score
from llama2rt.evaluate.win_rates import win_rate
from llama2rt.model import ScalarModel
from llama2rt.text.tokenizer import Tokenizer


def evaluate(
    reward_model: Path,
    comparisons: tuple[Path, ...] = (),
    samples: tuple[Path, ...] = (),
    *,
    skip_invalid: int = 0,
    micro_tokens: int = 16384,
) -> dict[str, Any]:
    """Measure a reward model on comparisons, or compare versions by its scores.

    Comparison files give accuracy by rating. Sample files, one a version, give each version's mean
    reward and every pair's win rate on the prompts both answered; where all prompts of a version
    have the same number of samples (two or more), also the reward-length correlation and the
    expected max and median reward among N samples. All with 95 % intervals over prompts.

    Args:
        reward_model: folder of a reward model, with its tokenizer.
        comparisons: files of comparisons.
        samples: files of samples, one a version.
        skip_invalid: invalid records to tolerate in each file.
        micro_tokens: tokens scored at once.
    """
    if not (comparisons or samples):
        raise InputError("evaluate: nothing to do; give --comparisons or --samples")
    for name, value, least in (
        ("skip_invalid", skip_invalid, 0),
        ("micro_tokens", micro_tokens, 1),
    ):
        if value < least:
            raise InputError(f"{name}: expected at least {least}, got {value}")
    # Read everything before the model: bad input should not cost the loading of one.
    pairs = {str(path): read(path, "comparison", skip_invalid) for path in comparisons}
    versions = _by_version({path: read(path, "sample", skip_invalid) for path in samples})
    model, tokenizer = load(reward_model, "cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(model, ScalarModel):
        raise InputError(f"{reward_model}: expected a reward model, found a language model")
    if tokenizer is None:
        raise InputError(f"{reward_model}: holds no tokenizer")

    result: dict[str, Any] = {"reward_model": str(reward_model)}
    if pairs:
        result["comparisons"] = [
            {"file": file, "accuracy": _accuracy(model, tokenizer, records, micro_tokens)}
            for file, records in pairs.items()
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


def describe(result: dict[str, Any]) -> str:
    """What `evaluate` found, as lines for a terminal."""
    lines = []
    for file in result.get("comparisons", []):
        lines.append(f"{file['file']}: pairs ranked as annotated")
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


def _by_version(files: dict[Path, list[Sample]]) -> dict[str, list[Sample]]:
    """Versions by file name, or by path where two files share a name."""
    names = [path.name.split(".")[0] for path in files]
    return {
        name if names.count(name) == 1 else str(path): records
        for name, (path, records) in zip(names, files.items(), strict=True)
    }


def _accuracy(
    model: ScalarModel, tokenizer: Tokenizer, records: Sequence[Comparison], micro_tokens: int
) -> list[dict[str, Any]]:
    items = [(r.prompt, text) for r in records for text in (r.chosen, r.rejected)]
    scores = score(model, tokenizer, items, micro_tokens=micro_tokens)
    return preference.accuracy_table(scores[::2], scores[1::2], [r.rating for r in records])


def _rewards(
    model: ScalarModel, tokenizer: Tokenizer, records: Sequence[Sample], micro_tokens: int
) -> dict[str, list[float]]:
    """Scores by prompt id, samples in the order of the file."""
    scores = score(
        model, tokenizer, [(r.messages, r.response) for r in records], micro_tokens=micro_tokens
    )
    by_prompt: dict[str, list[float]] = {}
    for record, value in zip(records, scores.tolist(), strict=True):
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
        correlation = length.correlation(table, [lengths[prompt] for prompt in rewards])
        interval = correlation.mean._asdict() if correlation.mean else {"mean": None}
        found["length_correlation"] = {**interval, "undefined": correlation.undefined}
        found["best_of"] = best_of.curves(table)
    return found


def _win_rate(
    a: str, b: str, ours: dict[str, list[float]], theirs: dict[str, list[float]]
) -> dict[str, Any]:
    shared = [prompt for prompt in ours if prompt in theirs]
    if not shared:
        raise InputError(f"samples: {a} and {b} share no prompt_id")
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
