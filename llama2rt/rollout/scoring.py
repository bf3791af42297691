"""Scores of a reward model over many responses: what rejection sampling, PPO and DPO rank by.

The score is the model's scalar at the last token of the dialogue (Llama 2, section 3.2.2).
`score` takes finished text, which the chat format closes with EOS, as in the comparisons that the
model was trained on. `score_tokens` takes tokens exactly as they were sampled: a response cut off
by the length limit has no EOS, and with one it would be a text that the policy never wrote.

Scores are raw: before any sigmoid and before the model's `normalization`, which is of rewards. They
compare only between responses to the same prompt scored by the same model.
"""

from collections.abc import Sequence

import numpy as np
import torch

from llama2rt.data.loader import dealt
from llama2rt.data.packing import Example, filler, micro_batches
from llama2rt.data.shared import pack_shared
from llama2rt.errors import InputError
from llama2rt.model.heads import ScalarModel, last_token
from llama2rt.model.tails import Tails
from llama2rt.parallel import Mesh, faults
from llama2rt.rollout.frozen import phase
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer


def score(
    model: ScalarModel,
    tokenizer: Tokenizer,
    items: Sequence[tuple[chat.Messages, str]],
    *,
    micro_tokens: int = 16384,
) -> np.ndarray:
    """Score finished responses given as text: items of (messages, response) -> fp32 [len(items)].

    `messages` are the turns before the response, the last one the user's.
    """
    sequences = [chat.encode_response(tokenizer, messages, text)[0] for messages, text in items]
    return score_tokens(model, sequences, micro_tokens=micro_tokens)


def _as_read(sequence: Sequence[int] | np.ndarray, unread: int) -> Sequence[int] | np.ndarray:
    """`sequence` up to the last token that is not `unread`; its first one where all are."""
    (read,) = np.nonzero(np.asarray(sequence) != unread)
    return sequence[: read[-1] + 1 if len(read) else 1]


@phase
def score_tokens(
    model: ScalarModel,
    sequences: Sequence[Sequence[int] | np.ndarray],
    *,
    micro_tokens: int = 16384,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Score token sequences (prompt + response as sampled) at their last token, or the last that is
    not the model's `unread` -> fp32 [B].

    Sequences share a micro-batch of at most `micro_tokens` tokens in the order given (a longer
    sequence gets one of its own). What neighbours begin with alike, such as the prompt of several
    responses, is computed once; it counts in each of them. Runs without gradients and in
    eval mode, and restores the model's mode. ValueError for an empty sequence,
    which has no last token, InputError for one beyond the model's context, FloatingPointError for a
    score that is not finite: it would rank as neither above nor below another. The ranks of `mesh`
    read a share of the micro-batches each, and all have all scores.
    """
    mesh = mesh or Mesh.single()
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    scores = np.zeros(len(lengths), dtype=np.float32)
    if not len(lengths):
        return scores
    if lengths.min() == 0:
        raise ValueError(f"sequences[{lengths.argmin()}] is empty: no last token to score")
    if lengths.max() > model.config.context:
        raise InputError(
            f"sequences[{lengths.argmax()}] has {lengths.max()} tokens, "
            f"the reward model's context is {model.config.context}"
        )

    if model.unread is not None:
        sequences = [_as_read(sequence, model.unread) for sequence in sequences]
    # Nothing is predicted: whatever is alike may be shared, up to the last token.
    examples = [Example.of(sequence, np.zeros(len(sequence), bool)) for sequence in sequences]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        micros = micro_batches(examples, micro_tokens, pack_shared)
        begins = np.cumsum([0, *(micro.documents for micro in micros)])
        numbered = zip(begins.tolist(), micros, strict=False)
        with torch.no_grad():
            for begin, micro in dealt(numbered, mesh.share, (len(scores), filler())):
                faults.moved()
                batch = micro.to(device)
                packed = batch.tokens, batch.positions, batch.cu_seqlens
                ends = Tails.of_last_tokens(batch.cu_seqlens)
                values = model(*packed, keys=batch.keys, tails=ends)
                read = last_token(values, batch.cu_seqlens).float().cpu().numpy()
                scores[begin : begin + len(read)] = read[: len(scores) - begin]
    finally:
        model.train(training)
    # Each rank has zeros where others have read.
    scores = mesh.sum(torch.from_numpy(scores).to(device)).cpu().numpy()
    if not np.isfinite(scores).all():
        raise FloatingPointError("the reward model's scores are not finite: damaged weights")
    return scores
