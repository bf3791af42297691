"""`llama2rt generate` and `llama2rt chat`: the engine at a terminal. Numbers and samples go to
stdout, progress to stderr; the command line turns these functions' arguments into options.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llama2rt.checkpoint import gguf_file, load
from llama2rt.checkpoint.convert import DTYPES
from llama2rt.data import readers
from llama2rt.data.records import Prompt, Sample
from llama2rt.errors import InputError
from llama2rt.generate.chat import Chat
from llama2rt.generate.engine import Completion, Engine
from llama2rt.generate.runner import Weights
from llama2rt.generate.sampling import check_options, check_whole
from llama2rt.generate.unfinished import Finished, Unfinished
from llama2rt.model import Llama
from llama2rt.run.manifest import hash_path

logger = logging.getLogger("llama2rt.generate")

Dtype = Literal["fp32", "bf16", "fp16"]

# Samples of one prompt are known by their order, which the engine gives when a call ends; so with
# several a prompt, a file of samples grows by calls of this many.
_SAMPLES_PER_CALL = 1024
_SECONDS_BETWEEN_LINES = 30.0  # of progress, where stderr is no terminal


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


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How a model is held while it answers."""

    dtype: Dtype | None = None
    """Dtype of the weights; None keeps what is there."""
    weights: Weights = "same"
    """int8, on a CPU, reads half of bf16's bytes for each token and is a little less exact."""
    speculate: int = 0
    """Guess up to this many tokens where the text has gone on before; the same samples."""
    device: str | None = None
    """cpu, cuda, ...; by default cuda where there is one."""

    def engine(self, model: Path, *, cache_bytes: int | None = None, at_once: int = 256) -> Engine:
        """The model in a folder or a GGUF file, ready for `at_once` sequences. InputError for a
        device or a model that cannot be used."""
        check_whole("speculate", self.speculate, 0, 64)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA at all
            reason = str(error).splitlines()[0]
            raise InputError(f"device: {device!r} cannot be used: {reason}") from None
        dtype = DTYPES[self.dtype] if self.dtype else None
        loaded, tokenizer = load(model, device=device, dtype=dtype)
        if not isinstance(loaded, Llama):
            raise InputError(f"{model}: a reward model or critic scores text and writes none")
        if tokenizer is None:
            raise InputError(f"{model}: has no tokenizer.model, tokenizer.json or vocabulary")
        return Engine(
            loaded,
            tokenizer,
            max_sequences=at_once,
            cache_bytes=cache_bytes,
            speculate=self.speculate,
            weights=self.weights,
        )


def generate(
    model: tyro.conf.Positional[Path],
    /,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(),
    opening: Annotated[Opening, tyro.conf.arg(name="")] = Opening(),
    *,
    prompt: str | None = None,
    prompts: Path | None = None,
    n: int = 1,
    raw: bool = False,
    cache_bytes: int | None = None,
    out: Path | None = None,
    resume: bool = False,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Sample answers to one prompt, or to a file of them.

    Args:
        model: Folder of this project, Hugging Face or Meta; or a GGUF file.
        prompt: The prompt's text.
        prompts: A file of prompt records; with --raw of documents to continue.
        n: Samples for each prompt.
        raw: Continue the text as it is instead of answering it in the chat format (base models).
        cache_bytes: Most memory that sampling takes beside the model; by default half of what is
            free. Less of it is slower, with the same samples.
        out: Write the samples here, as sample records. While they come, they are in OUT.partial.
        resume: Go on with the samples in OUT.partial, or leave them if all are in OUT.
        json_output: Print one JSON object.
    """
    if (prompt is None) == (prompts is None):
        raise InputError("give either --prompt TEXT or --prompts FILE")
    if out is not None and out.is_dir():
        raise InputError(f"out: expected a file, {out} is a folder")
    if resume and out is None:
        raise InputError("resume: expected --out FILE, whose samples are to be completed")
    check_options(n, **sampling.options())  # before the model is loaded
    if cache_bytes is not None:
        check_whole("cache_bytes", cache_bytes, 1, 2**63 - 1)
    work = _Work(_prompts(prompt, prompts, raw), n, raw, sampling, str(model))
    done = work.found_in(out) if resume and out is not None else None
    if done is not None:
        print(f"generate: all samples are in {out}", file=sys.stderr)
        if json_output:
            print(json.dumps({"samples": [s.to_json() for s in done], "resumed": len(done)}))
        return
    with contextlib.ExitStack() as stack:
        file = None
        if out is not None:
            asked = work.asked(model, opening)
            file = stack.enter_context(Unfinished(out, asked, resume=resume))
        engine = opening.engine(model, cache_bytes=cache_bytes)
        before = len(file.finished) if file else 0
        started = time.perf_counter()
        finished = work.carry_out(engine, file)
    seconds = time.perf_counter() - started
    if json_output:
        rows = [
            {**sample.to_json(), "finish_reason": reason, "tokens": tokens}
            for sample, tokens, reason in finished
        ]
        done_now = {"tokens": work.tokens, "seconds": seconds}
        rate = {"tokens_per_s": work.tokens / seconds, "resumed": before}
        print(json.dumps({"samples": rows, **done_now, **rate}, ensure_ascii=False))
    elif out is None:
        for sample, *_ in finished:
            alone = len(finished) == 1
            print(sample.response if alone else f"[{sample.prompt_id}] {sample.response}")


def _hash(model: Path) -> str:
    """SHA-256 of a model's folder or file; of several GGUF files, of their hashes."""
    if model.is_dir() or not model.is_file() or not gguf_file.is_gguf(model):
        return hash_path(model)
    tensors = gguf_file.read(model).tensors.values()
    hashes = [hash_path(path) for path in sorted({tensor.path for tensor in tensors})]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


@dataclass
class _Work:
    """What `generate` was asked for, and how much of it this process has done."""

    prompts: list[Prompt]
    n: int
    raw: bool
    sampling: Sampling
    policy: str
    tokens: int = 0

    def asked(self, model: Path, opening: Opening) -> dict[str, Any]:
        """Everything that decides the samples; of models and prompts their hashes."""
        said = (dataclasses.asdict(record) for record in self.prompts)
        records = json.dumps([{key: value for key, value in one.items() if value} for one in said])
        return {
            "model": _hash(model),
            "prompts": hashlib.sha256(records.encode()).hexdigest(),
            "n": self.n,
            "raw": self.raw,
            "dtype": opening.dtype,
            "weights": opening.weights,
            **self.sampling.options(),
        }

    def found_in(self, out: Path) -> list[Sample] | None:
        """The samples in `out`, None where they are yet to be completed. InputError where there are
        others in it."""
        if not out.exists() or Unfinished.path_of(out).exists():
            return None
        ids = [record.id for record in self.prompts for _ in range(self.n)]
        expected = (ids, {self.policy}, {self.sampling.temperature}, {self.sampling.seed})
        samples = readers.read(out, "sample")
        found = (
            [sample.prompt_id for sample in samples],
            {sample.policy for sample in samples},
            {sample.temperature for sample in samples},
            {sample.seed for sample in samples},
        )
        if found != expected:
            raise InputError(f"{out}: exists, and holds other samples than are asked for")
        return samples

    def carry_out(self, engine: Engine, file: Unfinished | None) -> list[Finished]:
        """All samples in the prompts' order: those in the file, and those that it lacks."""
        if file is None:
            with _Progress(len(self.prompts) * self.n, 0) as progress:
                found = self._sample(engine, range(len(self.prompts)), progress.advance)
            return [self._finished(completion) for completion in found]
        lacking = [
            i
            for i in range(len(self.prompts))
            if any((i, j) not in file.finished for j in range(self.n))
        ]
        most = len(lacking) if self.n == 1 else max(1, _SAMPLES_PER_CALL // self.n)

        def add(index: int, completion: Completion) -> None:
            file.add(completion.prompt_index, index, self._finished(completion))

        total = len(self.prompts) * self.n
        with _Progress(total, total - len(lacking) * self.n) as progress:

            def advance(completion: Completion) -> None:
                if self.n == 1:
                    add(0, completion)
                progress.advance(completion)

            try:
                for begin in range(0, len(lacking), most or 1):
                    found = self._sample(engine, lacking[begin : begin + most], advance)
                    for number, completion in enumerate(found):
                        add(number % self.n, completion)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted: {len(file.finished)} of {total} samples are in {file.path}; "
                    "--resume goes on"
                ) from None
        return file.complete()

    def _sample(
        self, engine: Engine, indices: Sequence[int], on_finish: Callable[[Completion], None]
    ) -> list[Completion]:
        encode = engine.tokenizer.encode
        asked = [self.prompts[i].messages for i in indices]
        encoded = [encode(m[0]["content"], bos=True) for m in asked] if self.raw else asked
        options = self.sampling.options()
        found = engine.generate(encoded, self.n, **options, indices=indices, on_finish=on_finish)
        self.tokens += sum(len(completion.tokens) for completion in found)
        return found

    def _finished(self, completion: Completion) -> Finished:
        record = self.prompts[completion.prompt_index]
        sample = Sample.of(
            record,
            completion.text,
            policy=self.policy,
            temperature=self.sampling.temperature,
            seed=self.sampling.seed,
        )
        return Finished(sample, len(completion.tokens), completion.finish_reason)


class _Progress:
    """A bar on a terminal; elsewhere, such as in a log file, a line now and then."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done, self._tokens = total, done, 0
        self._started = self._said = time.perf_counter()
        columns = (
            *(TextColumn("sampling"), BarColumn(), MofNCompleteColumn()),
            *(TextColumn("{task.fields[rate]:.0f} tokens/s"), TimeRemainingColumn()),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=total, completed=done, rate=0.0)

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, completion: Completion) -> None:
        self._done += 1
        self._tokens += len(completion.tokens)
        now = time.perf_counter()
        rate = self._tokens / (now - self._started)
        self._bar.update(self._task, advance=1, rate=rate)
        if not self._bar.console.is_terminal and now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            logger.info("%d of %d samples, %.0f tokens/s", self._done, self._total, rate)


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
    opening: Annotated[Opening, tyro.conf.arg(name="")] = Opening(),
    *,
    system: str | None = None,
) -> None:
    """Talk to a model. /help lists commands; Ctrl-C stops an answer, Ctrl-D leaves.

    Args:
        model: Folder of this project, Hugging Face or Meta; or a GGUF file.
        system: A system message for the whole conversation.
    """
    check_options(1, **sampling.options())
    engine = opening.engine(model)
    Chat(engine, sampling.options(), system or None, source=str(model)).run()
