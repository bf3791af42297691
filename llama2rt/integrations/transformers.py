"""A Llama of Hugging Face transformers on our ops, with one call: `patch_transformers(model)`.

For those who train or sample with transformers and want our kernels there. One instance is patched,
never transformers' own classes: its modules get subclasses of their classes that differ only in
`forward`, so parameters, state dict, hooks, gradient checkpointing and `save_pretrained` stay as
they were. The subclasses keep the names, since `save_pretrained` writes them into config.json and
wrapping policies look them up.

On our ops: norms, feed-forward, rotary embedding, attention over the whole of a batch (training,
scoring, the prompt of `generate`), the token embedding's gradient and, in training, the loss.
Padding, on any side, is left out of attention, and packed `position_ids` become documents where
transformers' own attention takes them for such: without a cache (use_cache=False) and without an
attention mask.

Left to transformers: attention with keys from a cache (a step of `generate`: its cache is not
paged) or with a mask of four dimensions, run by its `sdpa`; logits; the loss in evaluation, where
logits are wanted beside it; norms whose weight has another dtype than their input; a feed-forward
whose activation was replaced.

transformers renames arguments between minor releases (5.24: `past_key_values` became `cache`), and
its functions take any keyword, so that what is read under an old name is absent without an error.
Hence only releases that were tested are patched, others refused by name; what our subclasses do not
read they hand on under whatever name it came; and the names they do read are compared with the
signatures of the release at hand.
"""

import copy
import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2rt import ops
from llama2rt.integrations.transformers_loss import loss
from llama2rt.ops.embedding import embedding

TESTED = ("5.22", "5.23", "5.24")
"""releases of transformers that are patched; `make peers` runs the tests on each"""

try:
    import transformers
except ImportError as error:
    raise ImportError(
        f"{__name__} needs transformers {', '.join(TESTED)} (pip install transformers): {error}"
    ) from error

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.activations import ACT2FN
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.masking_utils import causal_mask_function, sdpa_mask
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.models.llama import modeling_llama
    from transformers.utils import can_return_tuple
except ImportError as error:
    raise ImportError(
        f"{__name__} needs transformers {', '.join(TESTED)}, this is {transformers.__version__}: "
        f"{error}"
    ) from error

ATTENTION = "llama2rt"
"""name of our attention in `model.set_attn_implementation`"""
BACK = 'model.set_attn_implementation("sdpa"), or "eager", brings back that of transformers'


def _minor(version: str) -> str:
    """ "5.24" of "5.24.0"; the whole where it is not a release's (5.24.0.dev0)."""
    number = re.fullmatch(r"(\d+\.\d+)\.\d+", version)
    return number[1] if number else version


CACHE = "past_key_values" if _minor(transformers.__version__) in ("5.22", "5.23") else "cache"
"""what this release calls the keys and values of earlier tokens"""


def _names(function: Callable) -> list[str]:
    """Of a function's parameters, without self and any other keyword."""
    parameters = inspect.signature(function).parameters.values()
    return [x.name for x in parameters if x.name != "self" and x.kind != x.VAR_KEYWORD]


ARGUMENTS = _names(modeling_llama.LlamaForCausalLM.forward)
SILU = type(ACT2FN["silu"])

# What our subclasses replace, and the arguments that they read by these names.
SIGNATURES = {
    "LlamaRMSNorm": "hidden_states",
    "LlamaMLP": "x",
    "LlamaAttention": f"hidden_states position_embeddings attention_mask {CACHE}",
    "LlamaForCausalLM": (
        f"input_ids attention_mask position_ids {CACHE} inputs_embeds labels use_cache "
        "logits_to_keep"
    ),
}


def _why_not() -> str:
    """Why this release of transformers is not patched; "" if it is."""
    known = f"patch_transformers is tested with {', '.join(TESTED)}"
    # Importing one of its models makes transformers replace its module by another.
    for loaded in (transformers, sys.modules["transformers"]):
        if _minor(loaded.__version__) not in TESTED:
            return (
                f"transformers {loaded.__version__}: {known}; another release may take other "
                f"arguments and give other tokens: pip install 'transformers=={TESTED[-1]}.*'"
            )
    for name, expected in SIGNATURES.items():
        if (found := _names(getattr(modeling_llama, name).forward)) != expected.split():
            return (
                f"transformers {transformers.__version__}: expected {name}.forward with the "
                f"arguments {expected}; got {' '.join(found)} ({known})"
            )
    return ""


class Documents(NamedTuple):
    """The documents of a batch [B, S], which our attention takes in place of a mask."""

    cu_seqlens: Tensor
    """int32, offsets among the tokens that count"""
    rows: Tensor | None = None
    """which of the B * S tokens count, the others being padding; None for all"""


def _mask(**request: Any) -> Documents | Tensor | None:
    """What transformers hands to attention for a mask: Documents, or, where they cannot express
    what is asked for, the mask of its `sdpa`."""
    queries, device, seen = request["q_length"], request["device"], request["q_offset"]
    visible, padding = request["mask_function"], request["attention_mask"]
    shape, packed = (request["batch_size"], queries), visible is not causal_mask_function
    if (
        queries != request["kv_length"]
        or isinstance(seen, Tensor)  # of a static cache, whose count is not worth waiting for
        or seen
        or request["use_vmap"]  # a pattern of the caller's own
        or not getattr(request["config"], "is_causal", True)
        or (padding is not None and (packed or padding.shape != shape))
    ):
        return sdpa_mask(**request)
    if packed:
        return Documents(_offsets_of_packed(visible, *shape, device))
    if padding is None or padding.all():
        offsets = torch.arange(0, shape[0] * queries + 1, queries, device=device)
        return Documents(offsets.int())
    offsets = F.pad(padding.sum(1).cumsum(0), (1, 0))
    return Documents(offsets.int(), padding.flatten().nonzero()[:, 0])


def _offsets_of_packed(visible: Callable, batch: int, length: int, device: torch.device) -> Tensor:
    """cu_seqlens of packed `position_ids`, which come as a function (batch, head, query, key): a
    document starts where a token does not see the token before it."""
    row, token = torch.arange(batch, device=device)[:, None], torch.arange(length, device=device)
    starts = ~visible(row, row, token, (token - 1).clamp_min(0))
    starts[:, 0] = True
    return F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=batch * length).int()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, length: int, scale: float
) -> Tensor:
    """q [B * S, Hq, D], k and v [B * S, Hkv, D] -> [B * S, Hq, D], 0 at padding."""
    cu_seqlens, rows = documents
    if rows is None:
        return ops.attention(q, k, v, cu_seqlens, max_seqlen=length, scale=scale)
    q_, k_, v_ = (x.index_select(0, rows) for x in (q, k, v))
    out = ops.attention(q_, k_, v_, cu_seqlens, max_seqlen=length, scale=scale)
    return out.new_zeros(q.shape).index_copy(0, rows, out)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' own modules call: ours where there are no Documents, and those of a model
    made from the config of a patched one. Heads [B, H, S, D] -> [B, S, H, D]."""
    if not isinstance(attention_mask, Documents):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if not isinstance(module, modeling_llama.LlamaAttention) or kwargs.get("dropout"):
        raise ValueError(
            f"attention {ATTENTION!r}: expected a Llama's without dropout, got "
            f"{type(module).__name__}, dropout {kwargs.get('dropout')}; {BACK}"
        )
    _refuse(module, kwargs)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    batch, _, length, _ = query.shape
    out = _attend(q, k, v, attention_mask, length, module.scaling)
    return out.unflatten(0, (batch, length)), None


# What transformers' own attention heeds beyond the mask and the cache that this release passes.
HEEDED = {*_names(sdpa_attention_forward)[5:], "softcap", "output_attentions", "past_key_values"}
HEEDED -= {CACHE}


def _refuse(module: Any, kwargs: dict[str, Any]) -> None:
    """ValueError where transformers' attention would give something else than ours."""
    same = {"dropout": 0.0, "scaling": module.scaling, "is_causal": True}
    for name in HEEDED.intersection(kwargs):
        given, expected = kwargs[name], same.get(name)
        if given is None or (name == "output_attentions" and not given):
            continue
        if expected is None or given != expected:
            raise ValueError(f"{name}: expected {expected} by attention {ATTENTION!r}; {BACK}")
    if not module.is_causal:
        raise ValueError(f"is_causal of a layer: expected True, got {module.is_causal}; {BACK}")
    if module.training and module.attention_dropout:
        raise ValueError(f"attention_dropout: expected 0, got {module.attention_dropout}; {BACK}")


if not _why_not():
    AttentionMaskInterface.register(ATTENTION, _mask)
    AttentionInterface.register(ATTENTION, _attention)


def _is_plain(module: nn.Module, kind: type) -> bool:
    """Whether it is of this class and does no more: no adapter, shard or hook (pruning and norms
    of weights are such)."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return type(module) is kind and "forward" not in vars(module) and not any(hooks)


class LlamaRMSNorm(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class Embedding(nn.Embedding):
    """Its gradient is summed in fp32: torch's on a CPU stops at 256 equal terms in bf16."""

    def forward(self, input: Tensor) -> Tensor:
        if self.max_norm is not None or self.sparse or self.scale_grad_by_freq:
            return super().forward(input)
        rows = embedding(input, self.weight)
        if self.padding_idx is None:
            return rows
        # A padding token's row learns nothing.
        return torch.where((input == self.padding_idx)[..., None], rows.detach(), rows)


class LlamaMLP(modeling_llama.LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        if not _is_plain(self.act_fn, SILU):
            return super().forward(x)
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class LlamaAttention(modeling_llama.LlamaAttention):
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Documents | Tensor | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = (hidden_states, position_embeddings, attention_mask, *rest)
        if not isinstance(attention_mask, Documents):
            return super().forward(*inputs, **kwargs)
        (cache,) = rest or (kwargs.get(CACHE),)
        _refuse(self, kwargs)
        batch, length, _ = hidden_states.shape
        heads = (batch * length, -1, self.head_dim)
        q = self.q_proj(hidden_states).view(heads)
        k = self.k_proj(hidden_states).view(heads)
        v = self.v_proj(hidden_states).view(heads)
        # The tables have a row for each token already, or for each column that rows share.
        cos, sin = (
            table[..., : self.head_dim // 2].flatten(0, 1).float() for table in position_embeddings
        )
        q, k = ops.rope(q, k, cos, sin, torch.arange(batch * length, device=q.device) % len(cos))
        if cache is not None:  # it holds nothing yet: as many keys as queries
            stored = (x.view(batch, length, -1, self.head_dim).transpose(1, 2) for x in (k, v))
            cache.update(*stored, self.layer_idx)
        out = _attend(q, k, v, attention_mask, length, self.scaling)
        return self.o_proj(out.view(batch, length, -1)), None


class LlamaForCausalLM(modeling_llama.LlamaForCausalLM):
    @can_return_tuple
    @functools.wraps(modeling_llama.LlamaForCausalLM.forward)  # whose arguments others look up
    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        kwargs |= zip(ARGUMENTS, args, strict=False)
        keep = kwargs.get("logits_to_keep", 0)
        keeps_all = isinstance(keep, int) and keep == 0
        labels = kwargs.get("labels")
        if labels is None or not (self.training and keeps_all and self._has_own_loss()):
            return super().forward(**kwargs)
        inputs = {k: v for k, v in kwargs.items() if k not in ("labels", "logits_to_keep")}
        outputs = self.model(**inputs)
        return CausalLMOutputWithPast(
            loss=loss(outputs.last_hidden_state, self.lm_head.weight, **kwargs),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _has_own_loss(self) -> bool:
        """Whether loss and output layer are those it was made with."""
        return (
            self.loss_function is ForCausalLMLoss
            and _is_plain(self.lm_head, nn.Linear)
            and self.lm_head.bias is None
        )


_OURS: dict[type, type] = {
    getattr(modeling_llama, ours.__name__): ours
    for ours in (LlamaRMSNorm, LlamaMLP, LlamaAttention, LlamaForCausalLM)
}


def patch_transformers(model: Any) -> Any:
    """Make `model`, a transformers.LlamaForCausalLM, run on our ops; returns it.

    Logits, losses, gradients and samples stay what transformers gives, up to rounding, at all
    tokens that are not padding; at padding they may differ. In training mode with
    labels, `loss` is computed by `ops.token_logprob`, which never holds the [B, S, V] logits, and
    `logits` is None; in evaluation mode both are there. A second call changes nothing.
    `model.set_attn_implementation("sdpa")` returns attention alone to transformers ("eager" where
    attention weights are asked for). Call it before wrapping the model (torch.compile, adapters,
    shards). A mask of padding breaks a compiled graph, which asks whether anything is padded; so
    does, unless fullgraph=True, the loss in training. Not yet run on a GPU.

    RuntimeError on a release of transformers other than TESTED. TypeError for any other class,
    subclasses included. ValueError, and nothing changed, for dropout in attention, an activation
    other than SiLU, and modules whose class or forward another library has replaced (hooks of a
    device map over several devices among them). ValueError at a call with what our attention does
    not know: `is_causal=False`, `position_bias`, `softcap`, attention weights.
    """
    if reason := _why_not():
        raise RuntimeError(reason)
    if type(model) is LlamaForCausalLM:
        return model
    if type(model) is not modeling_llama.LlamaForCausalLM:
        got = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(f"model: expected transformers.LlamaForCausalLM itself, got {got}")
    config = model.config
    if config.attention_dropout:
        raise ValueError(f"attention_dropout: expected 0, got {config.attention_dropout}")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act: expected 'silu', got {config.hidden_act!r}")
    parts = _parts(model)
    for name, part in parts.items():
        if type(part) not in _OURS or "forward" in vars(part):
            kind = f"{type(part).__module__}.{type(part).__qualname__}"
            raise ValueError(
                f"{name or 'model'}: expected transformers' own class and forward, got {kind}"
                + " with another forward" * ("forward" in vars(part))
            )
    for part in parts.values():
        part.__class__ = _OURS[type(part)]
    tokens = model.model.embed_tokens
    if type(tokens) is nn.Embedding and "forward" not in vars(tokens):
        tokens.__class__ = Embedding
    own = copy.copy(config)  # models made from one config share it, and in it the attention's name
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = own
    model.set_attn_implementation(ATTENTION)
    return model


def _parts(model: Any) -> dict[str, nn.Module]:
    """The modules to patch, by name."""
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    layers = range(len(model.model.layers))
    names = ["", "model.norm", *(f"model.layers.{i}.{part}" for i in layers for part in parts)]
    return {name: model.get_submodule(name) for name in names}
