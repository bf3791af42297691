"""A Llama of Hugging Face transformers on our kernels, with one call.

python examples/patch_transformers.py                 a small random model, which learns to count
python examples/patch_transformers.py MODEL_FOLDER    your own, compared with itself unpatched
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama2rt.integrations.transformers import patch_transformers

VOCABULARY = 64


def small_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def compare(model: LlamaForCausalLM) -> None:
    """Patch the model; print what that changes on a batch whose second row is padded."""
    tokens = torch.randint(0, model.config.vocab_size, (2, 32))
    mask = torch.ones_like(tokens)
    mask[1, :8] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.where(mask == 1, -100)}
    before = model.eval()(**batch)
    patch_transformers(model)
    after = model(**batch)
    difference = (after.logits - before.logits)[mask == 1].abs().max().item()
    print(f"logits to {before.logits.abs().max().item():.2f}, largest difference {difference:.1e}")
    print(f"loss {before.loss.item():.6f} before, {after.loss.item():.6f} after")


def train(model: LlamaForCausalLM) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(60):
        tokens = (torch.randint(0, VOCABULARY, (8, 1)) + torch.arange(32)) % VOCABULARY
        # In training mode the loss comes without the logits, which are never held.
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            print(f"step {step + 1}: {loss.item():.3f} nats per token")


def main() -> None:
    torch.manual_seed(0)
    if len(sys.argv) > 1:
        compare(LlamaForCausalLM.from_pretrained(sys.argv[1]))
        return
    model = small_model()
    compare(model)
    train(model)
    prompt = torch.tensor([[5, 6, 7, 8]])
    tokens = model.eval().generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
    )
    print(*tokens[0].tolist())


if __name__ == "__main__":
    main()
