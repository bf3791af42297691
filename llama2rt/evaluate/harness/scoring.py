"""Log-likelihoods of many requests: packed without padding, what they begin with alike read once.

The options of a question, and questions behind the same shots, are neighbours once requests are
sorted by their tokens, and `data.shared` leaves in a batch what they begin with a single time.
Log-probabilities come from `ops.token_logprob`, which holds no logits. Whether greedy decoding
would give a continuation is decided by few of its tokens: one that is given more than half is the
likeliest, and where the least likely one is not, no other is asked. Only for those in doubt are
logits made.
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
# Above it a token is the likeliest, whatever the others' rounding.
_CERTAIN = float(np.log(0.5)) + 1e-2


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
    tokens of each of n requests. Without `flags` all of these are False.

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
        hidden, targets = _scored_rows(model, batch)
        found = ops.token_logprob(hidden, model.output.weight, targets)
        assert isinstance(found, Tensor)  # a pair with entropy alone
        logprobs = found.double().cpu().numpy()
        begins = np.cumsum([0, *(cut[i].count for i in members[:-1])])
        total[members] = np.add.reduceat(logprobs, begins)
        if flags:
            greedy[members] = _greedy(model, hidden, targets, logprobs, begins)
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
    # Its tails are those of the targets that it was packed with.
    return replace(batch, targets=torch.from_numpy(np.concatenate(targets)), tails=None)


def _scored_rows(model: Llama, batch: Batch) -> tuple[Tensor, Tensor]:
    """(hidden states [rows, dim] that predict them, targets int64 [rows]) of a batch."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.cu_seqlens, batch.keys)
    rows = (batch.targets >= 0).nonzero().squeeze(1)
    return hidden[rows], batch.targets[rows]


def _greedy(
    model: Llama, hidden: Tensor, targets: Tensor, logprobs: np.ndarray, begins: np.ndarray
) -> np.ndarray:
    """Whether each target of a request is the likeliest token, bool [requests]; the rows of request
    i are those from `begins[i]` on."""
    request = np.repeat(np.arange(len(begins)), np.diff([*begins, len(logprobs)]))
    doubt = ~(logprobs > _CERTAIN)
    greedy = np.ones(len(begins), bool)
    # Each request's least likely token first, then what is left of those that it leaves open.
    least = np.lexsort((logprobs, request))[begins]
    first = np.isin(np.arange(len(logprobs)), least) & doubt
    for asked in (first, doubt & ~first):
        rows = np.flatnonzero(asked & greedy[request])
        greedy[request[rows[~_likeliest(model, hidden, targets, rows)]]] = False
    return greedy


def _likeliest(model: Llama, hidden: Tensor, targets: Tensor, rows: np.ndarray) -> np.ndarray:
    """Whether the target of each of `rows` is the token with the highest logit, bool [rows]."""
    found = [np.zeros(0, bool)]
    for part in torch.from_numpy(rows).to(hidden.device).split(_ROWS):
        token = model.output(hidden[part]).argmax(1)
        found.append((token == targets[part]).cpu().numpy())
    return np.concatenate(found)
