"""The class that the harness asks: `lm_eval.simple_evaluate(model=HarnessModel(...), ...)`.

Left out: models on several ranks, pictures, and prefixes of answers in a chat (`gen_prefix`), which
are refused.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from llama2rt.errors import InputError, naming
from llama2rt.evaluate.harness.requests import Encoder, sampling_options
from llama2rt.evaluate.harness.scoring import log_likelihoods
from llama2rt.generate import Engine
from llama2rt.generate.request import SamplingOptions
from llama2rt.model import Llama
from llama2rt.text.tokenizer import Tokenizer


class HarnessModel(LM):
    """A language model with its tokenizer, as lm-eval's `LM`.

    Requests are read packed, `micro_tokens` at once; answers are drawn by the engine, at most
    `max_sequences` at once, from `seed`. `add_bos_token` as the harness's Hugging Face backend has
    it; `chat`: whether prompts are dialogues (`apply_chat_template`).
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        micro_tokens: int = 8192,
        max_sequences: int = 256,
        add_bos_token: bool = True,
        chat: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.tokens = model.eval(), tokenizer
        self.micro_tokens, self.chat, self.seed = micro_tokens, chat, seed
        self.encoder = Encoder(tokenizer, add_bos_token=add_bos_token)
        self.engine = Engine(model, tokenizer, max_sequences=max_sequences)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each request's continuation behind its context."""
        pairs = [request.args for request in requests]
        scored = []
        for context, continuation in pairs:
            self._require_chat_prompt(context)
            scored.append(self.encoder.pair(context, continuation))

        def keep(i: int, value: float, greedy: bool) -> None:
            self.cache_hook.add_partial("loglikelihood", pairs[i], (value, greedy))

        total, greedy = log_likelihoods(self.model, scored, self.micro_tokens, keep)
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of each request's whole text."""
        context = self.model.config.context
        windows = [self.encoder.windows(request.args[0], context) for request in requests]
        scored = [window for of_text in windows for window in of_text]
        total, _ = log_likelihoods(self.model, scored, self.micro_tokens, flags=False)
        values = iter(total.tolist())
        found = [sum((next(values) for _ in of_text), 0.0) for of_text in windows]
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request's prompt, up to the first of its stop texts."""
        asked: list[tuple[list[int], SamplingOptions]] = []
        context = self.model.config.context
        for request in requests:
            prompt, given = request.args[:2]
            self._require_chat_prompt(prompt)
            with naming(f"{request.task_name}"):
                options = sampling_options(given, self.seed)
                room = context - options.max_tokens
                if room < 1:
                    raise InputError(
                        f"generation_kwargs: max_gen_toks: {options.max_tokens} leave no room for "
                        f"a prompt in the context of {context}"
                    )
            asked.append((self.encoder.prompt(prompt, room), options))
        texts = self._answers(asked)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text that stands for a dialogue in requests."""
        if not self.chat:
            raise InputError("a chat template needs HarnessModel(..., chat=True)")
        if not add_generation_prompt:
            raise InputError("a task's gen_prefix, which begins the answer, is not supported")
        return self.encoder.render(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, as the harness writes it into its files."""
        return self.encoder.template.source if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.digest[:16]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes about a model into its files."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.output.weight.dtype),
            "add_bos_token": self.encoder.add_bos_token,
        }

    def _require_chat_prompt(self, text: str) -> None:
        if self.chat and text and not self.encoder.is_chat(text):
            raise InputError("chat: a task's prompt is no dialogue that its template has written")

    def _answers(self, asked: Sequence[tuple[list[int], SamplingOptions]]) -> list[str]:
        texts = [""] * len(asked)
        before: Counter[tuple[int, ...]] = Counter()
        with self.engine.session() as session:
            index = {}
            for i, (prompt, options) in enumerate(asked):
                sample = before[tuple(prompt)]  # repeats of a prompt are other samples
                before[tuple(prompt)] += 1
                index[session.add(prompt, options, sample=sample)] = i
            while session.unfinished:
                for update in session.step():
                    texts[index[update.id]] += update.text
        return [self.encoder.answer(text) for text in texts]
