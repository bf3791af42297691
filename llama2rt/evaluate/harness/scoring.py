"""Log-likelihoods of many requests: packed without padding, what they begin with alike read once.

The options of a question, and questions behind the same shots, are neighbours once requests are
sorted by their tokens, and `data.shared` leaves in a batch what they begin with a single time.
Logits are held for the tokens that are scored alone, a few rows at a time, and for none where only
their log-probability counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from llama2rt import ops
from llama2rt.data.packing import Batch, Example, groups
from llama2rt.data.shared import pack_shared
from llama2rt.evaluate.harness.requests import Scored
from llama2rt.model import Llama

_ROWS = 128  # of logits at once: 16 MB of fp32 with a vocabulary of 32,000


@torch.no_grad()
def log_likelihoods(
    model: Llama,
    requests: Sequence[Scored],
    micro_tokens: int,
    on_done: Callable[[int, float, bool], None] | None = None,
    *,
    flags: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """(log-likelihood fp64 [n], whether greedy decoding would give the same bool [n]) of the scored
    tokens of each of n requests. Without `flags` all of these are False, and no logits are held.

    Requests longer than the model's context plus one are cut at the left. `on_done` is called with
    index, log-likelihood and flag of each request as batches of `micro_tokens` end.
    """
    context, device = model.config.context, model.output.weight.device
    cut = [request.last(context) for request in requests]
    order = sorted(range(len(cut)), key=lambda i: cut[i].tokens.tolist())
    total = np.zeros(len(cut))
    greedy = np.zeros(len(cut), bool)
    for group in groups([len(cut[i].tokens) - 1 for i in order], micro_tokens):
        members = [order[i] for i in group]
        batch = _batch([cut[i] for i in members]).to(device)
        logprobs, likeliest = _scored_tokens(model, batch, flags)
        counts = [cut[i].count for i in members]
        begins = np.cumsum([0, *counts[:-1]])
        total[members] = np.add.reduceat(logprobs, begins)
        greedy[members] = np.logical_and.reduceat(likeliest, begins)
        if on_done is not None:
            for i in members:
                on_done(i, float(total[i]), bool(greedy[i]))
    return total, greedy


def _batch(requests: Sequence[Scored]) -> Batch:
    """What a model reads of the requests: all but each one's last token, which it only predicts."""
    examples = []
    for request in requests:
        tokens = request.tokens[:-1]
        # From the row on that predicts the first scored token, none may be left to a neighbour.
        trainable = np.arange(len(tokens)) > len(tokens) - request.count
        examples.append(Example(tokens, trainable))
    batch = pack_shared(examples)
    begins = batch.cu_seqlens[:-1].long()
    shared = batch.positions[begins].tolist()
    targets = []
    for request, example, begin in zip(requests, examples, shared, strict=True):
        row = np.full(len(example.tokens), -1, np.int64)
        row[-request.count :] = request.tokens[-request.count :]
        targets.append(row[begin:])
    return replace(batch, targets=torch.from_numpy(np.concatenate(targets)))


def _scored_tokens(model: Llama, batch: Batch, flags: bool) -> tuple[np.ndarray, np.ndarray]:
    """(log-probability fp64, whether it is the likeliest bool) of each target of a batch."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.cu_seqlens, batch.keys)
    rows = (batch.targets >= 0).nonzero().squeeze(1)
    logprobs: list[Tensor] = []
    likeliest: list[Tensor] = []
    for part in rows.split(_ROWS if flags else len(rows)):
        targets = batch.targets[part]
        if flags:
            logits = model.output(hidden[part]).float()
            of_targets = logits.gather(1, targets[:, None]).squeeze(1)
            most, token = logits.max(1)
            logits.sub_(most[:, None]).exp_()
            logprobs.append(of_targets - most - logits.sum(1).log())
            likeliest.append(token == targets)
        else:
            found = ops.token_logprob(hidden[part], model.output.weight, targets)
            assert isinstance(found, Tensor)  # a pair with entropy alone
            logprobs.append(found)
            likeliest.append(torch.zeros_like(targets, dtype=torch.bool))
    return torch.cat(logprobs).double().cpu().numpy(), torch.cat(likeliest).cpu().numpy()
