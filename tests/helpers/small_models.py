"""Batches for a model, models to sample from, and transformers' model with the same weights."""

from collections.abc import Sequence

import torch
from attention_cases import offsets
from torch import Tensor

from llama2rt.checkpoint.hf import hf_name, write_config
from llama2rt.model import Llama, LlamaConfig, ScalarModel

VOCABULARY = 400


def packed(*documents: Tensor | Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, positions, cu_seqlens) of a batch of these documents."""
    lengths = [len(document) for document in documents]
    tokens = torch.cat([torch.as_tensor(document) for document in documents])
    return tokens, torch.cat([torch.arange(n) for n in lengths]), offsets(lengths)


def far_from_flat(
    kv_heads: int = 4,
    vocab_size: int = VOCABULARY,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Llama:
    """A model whose weights are so large that it prefers some tokens to others."""
    config = LlamaConfig(64, 2, 4, kv_heads, 128, vocab_size=vocab_size, context=96)
    model = Llama(config).initialize(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
        model.output.weight.mul_(3)
    return model.to(dtype)


def transformers_twin(model: Llama | ScalarModel):
    """transformers' model of the same class, shape, dtype and weights."""
    import transformers

    settings = write_config(model, None)
    for key in ("architectures", "model_type", "dtype", "torch_dtype"):
        settings.pop(key)
    scalar = isinstance(model, ScalarModel)
    config = transformers.LlamaConfig(**settings, attn_implementation="eager")
    cls = transformers.LlamaForSequenceClassification if scalar else transformers.LlamaForCausalLM
    theirs = cls(config).to(next(model.parameters()).dtype)
    weights = {hf_name(name): p.detach().clone() for name, p in model.named_parameters()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if model.config.tied else set())
    return theirs.eval()


class Ids:
    """A tokenizer for tests on token ids: words are numbers, EOS is any id (-1: never), and any
    `others` end a sample too."""

    bos, vocab_size, template = 1, VOCABULARY, None

    def __init__(self, eos: int = 2, *others: int) -> None:
        self.eos, self.stop_ids = eos, (eos, *others)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))
