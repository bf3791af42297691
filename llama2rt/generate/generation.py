"""Forward passes, one after the other, until all requests are answered: a scheduler, the pages that
it gives out, and the model whose weights are read as they are at each pass.
"""

from dataclasses import replace

import numpy as np
import torch

from llama2rt.generate.batch import Batch, Step, layout
from llama2rt.generate.kv_cache import Addresses, KVCache
from llama2rt.generate.runner import Runner
from llama2rt.generate.sampling import choose, uniforms
from llama2rt.generate.scheduler import Scheduler
from llama2rt.generate.slots import Sequence, Slots
from llama2rt.parallel import faults, tensor_group


class Generation:
    """Answers what is added to `scheduler`; `runner` has been refreshed."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self.runner, self.model, self.scheduler = runner, runner.model, scheduler
        self.cache = KVCache(self.model.config.layers, scheduler.pool.pages, scheduler.page_size)

    @torch.inference_mode()
    def advance(self) -> tuple[Step, list[Sequence]]:
        """One forward pass: what it was, and the sequences that it finished. FloatingPointError
        where logits are not finite."""
        faults.moved()
        step = self.scheduler.step()
        batch = layout(step, self.scheduler.slots)
        logits = self._forward(batch)
        slots = self.scheduler.slots
        uniform = self._put(uniforms(slots.keys[batch.drawn], batch.counts))
        options = slots.options.take(batch.drawn)
        penalised = options.repetition_penalty != 1
        seen = _seen(slots, batch, penalised) if penalised.any() else None
        choice = choose(logits, uniform, options, seen)
        tokens, logprobs = tensor_group.first(self.model, choice.tokens, choice.logprobs)
        choice = replace(choice, tokens=tokens, logprobs=logprobs)
        if np.isnan(choice.logprobs).any():
            raise FloatingPointError(
                "the model's logits are not finite: its weights are damaged, training diverged, or "
                "the temperature is too small to divide by"
            )
        return step, self.scheduler.record(step, choice)

    def _put(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.model.output.weight.device)

    def _forward(self, batch: Batch) -> torch.Tensor:
        """fp32 logits [N, V] of the rows to draw from."""
        put, drawn, pages = self._put, len(batch.drawn), self.cache
        if not len(batch.tokens):
            logits = torch.empty(0, self.model.config.vocab_size)
        else:
            pages.addresses = Addresses(
                slots=put(batch.slots),
                prompt_cu_seqlens=put(batch.cu_seqlens),
                prompt_tokens=int(batch.cu_seqlens[-1]),
                longest_prompt=int(np.diff(batch.cu_seqlens).max(initial=0)),
                block_table=put(batch.block_table),
                lengths=put(batch.lengths),
                cu_seqlens_q=None if batch.cu_seqlens_q is None else put(batch.cu_seqlens_q),
            )
            tokens, positions = put(batch.tokens).long(), put(batch.positions)
            rows = slice(len(tokens) - drawn, None)
            logits = self.runner.forward(tokens, positions, pages, rows)
        if batch.copies.size:
            pages.copy(*put(batch.copies))
        return logits


def _seen(slots: Slots, batch: Batch, rows: np.ndarray) -> np.ndarray:
    """int64 [P, L]: for each of the rows drawn from that `rows` marks its prompt, its answer and
    the guesses in front of it; its first token where it is shorter."""
    drawn = batch.drawn[rows]
    lengths = slots.prompts[drawn] + batch.counts[rows]
    tokens = slots.tokens[drawn, : int(lengths.max())]
    mine = np.arange(tokens.shape[1]) < lengths[:, None]
    return np.where(mine, tokens, tokens[:, :1]).astype(np.int64)
