"""`llama2rt generate` and `llama2rt chat`: the engine at a terminal. Numbers and samples go to
stdout, progress to stderr; the command line turns these functions' arguments into options.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llama2rt.checkpoint import load
from llama2rt.data import readers
from llama2rt.data.records import Prompt, Sample
from llama2rt.errors import InputError
from llama2rt.generate.engine import Completion, Engine
from llama2rt.generate.sampling import check_options, check_whole
from llama2rt.model import Llama
from llama2rt.text.chat import check_messages


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the defaults are Llama-2-Chat's (Meta's `example_chat_completion`)."""

    temperature: float = 0.6
    """0 takes the likeliest token."""
    top_p: float = 0.9
    """Sample from the likeliest tokens that hold this much probability; 1: from all."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0: from all."""
    max_tokens: int = 256
    """Longest answer, in tokens."""
    seed: int = 0

    def options(self) -> dict[str, Any]:
        return vars(self).copy()


def open_engine(
    model: Path,
    device: str | None,
    cache_bytes: int | None = None,
    *,
    max_sequences: int = 256,
) -> Engine:
    """The model in a folder, ready to sample; `device` None: the GPU where there is one. InputError
    for a device or a folder that cannot be used."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA at all
        reason = str(error).splitlines()[0]
        raise InputError(f"device: {device!r} cannot be used: {reason}") from None
    loaded, tokenizer = load(model, device=device)
    if not isinstance(loaded, Llama):
        raise InputError(f"{model}: a reward model or critic scores text, it does not write any")
    if tokenizer is None:
        raise InputError(f"{model}: no tokenizer.model and no tokenizer.json in this folder")
    return Engine(loaded, tokenizer, max_sequences=max_sequences, cache_bytes=cache_bytes)


def generate(
    model: tyro.conf.Positional[Path],
    /,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(),
    *,
    prompt: str | None = None,
    prompts: Path | None = None,
    n: int = 1,
    raw: bool = False,
    cache_bytes: int | None = None,
    device: str | None = None,
    out: Path | None = None,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Sample answers to one prompt, or to a file of them.

    Args:
        model: Folder of this project, Hugging Face or Meta.
        prompt: The prompt's text.
        prompts: A file of prompt records; with --raw of documents to continue.
        n: Samples for each prompt.
        raw: Continue the text as it is instead of answering it in the chat format (base models).
        cache_bytes: Most memory that sampling takes beside the model; by default half of what is
            free. Less of it is slower, with the same samples.
        device: cpu, cuda, ...; by default cuda where there is one.
        out: Write the samples here, as sample records.
        json_output: Print one JSON object.
    """
    if (prompt is None) == (prompts is None):
        raise InputError("give either --prompt TEXT or --prompts FILE")
    if out is not None and out.is_dir():
        raise InputError(f"out: expected a file, {out} is a folder")
    check_options(n, **sampling.options())  # before the model is loaded
    if cache_bytes is not None:
        check_whole("cache_bytes", cache_bytes, 1, 2**63 - 1)
    records = _prompts(prompt, prompts, raw)
    engine = open_engine(model, device, cache_bytes)
    encoded = [
        engine.tokenizer.encode(record.messages[0]["content"], bos=True) if raw else record.messages
        for record in records
    ]
    started = time.perf_counter()
    completions = _with_progress(engine, encoded, n, sampling)
    seconds = time.perf_counter() - started
    samples = [
        Sample(
            prompt_id=records[completion.prompt_index].id,
            messages=records[completion.prompt_index].messages,
            response=completion.text,
            policy=str(model),
            temperature=sampling.temperature,
            seed=sampling.seed,
        )
        for completion in completions
    ]
    if out is not None:
        readers.write(out, samples)
    if json_output:
        rows = [
            {**sample.to_json(), "finish_reason": c.finish_reason, "tokens": len(c.tokens)}
            for sample, c in zip(samples, completions, strict=True)
        ]
        tokens = sum(len(completion.tokens) for completion in completions)
        summary = {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}
        print(json.dumps({"samples": rows, **summary}, ensure_ascii=False))
    elif out is None:
        for sample in samples:
            print(
                sample.response if len(samples) == 1 else f"[{sample.prompt_id}] {sample.response}"
            )


def _with_progress(
    engine: Engine, prompts: Sequence[Any], n: int, sampling: Sampling
) -> list[Completion]:
    """n samples of each of `prompts`, with a bar on the terminal."""
    columns = (
        *(TextColumn("sampling"), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("{task.fields[rate]:.0f} tokens/s"), TimeRemainingColumn()),
    )
    started, tokens = time.perf_counter(), 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(prompts) * n, rate=0.0)

        def advance(completion: Completion) -> None:
            nonlocal tokens
            tokens += len(completion.tokens)
            progress.update(task, advance=1, rate=tokens / (time.perf_counter() - started))

        return engine.generate(prompts, n, **sampling.options(), on_finish=advance)


def _prompts(prompt: str | None, path: Path | None, raw: bool) -> list[Prompt]:
    if prompt is not None:
        texts = [prompt]
    elif raw:
        texts = [document.text for document in readers.read(path or "", "document")]
    else:
        return readers.read(path or "", "prompt")
    return [
        Prompt(id=str(i), messages=[{"role": "user", "content": text}])
        for i, text in enumerate(texts)
    ]


def chat(
    model: tyro.conf.Positional[Path],
    /,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(),
    *,
    system: str | None = None,
    device: str | None = None,
) -> None:
    """Talk to a model. /reset forgets the conversation; Ctrl-C stops an answer, Ctrl-D leaves.

    Args:
        model: Folder of this project, Hugging Face or Meta.
        system: A system message for the whole conversation.
        device: cpu, cuda, ...; by default cuda where there is one.
    """
    check_options(1, **sampling.options())
    engine = open_engine(model, device)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    turn = 0
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/reset":
            messages = list(opening)
        if text in ("", "/reset"):
            continue
        asked = [*messages, {"role": "user", "content": text}]
        pieces = []
        options = sampling.options() | {"seed": (sampling.seed + turn) % 2**63}
        turn += 1
        try:
            for piece in engine.stream(asked, **options):
                print(piece, end="", flush=True)
                pieces.append(piece)
        except KeyboardInterrupt:
            pass
        except InputError as error:
            print(f"{error} (/reset starts afresh)", end="")
        print()
        answered = [*asked, {"role": "assistant", "content": "".join(pieces).strip()}]
        try:  # an empty answer, or one with format tags in it, cannot be part of a prompt
            check_messages(answered, last="assistant")
            messages = answered
        except InputError:
            if pieces:
                print("(this exchange is not remembered)")
