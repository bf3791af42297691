#!/usr/bin/env bash
# How finely does lm-eval tell the options of a question apart when a model is read in bf16?
#
# One would guess: as finely as fp32 does, since a log-likelihood is a sum over an option's tokens,
# and every training loop takes it in fp32 whatever the weights are.
# Found in lm-eval 0.4.13, backend "hf", defaults: the softmax, each token's log-probability and the
# option's sum are bf16, as the weights are (dtype="auto" reads them as stored). A sum beyond -128 is
# then a whole number, beyond -256 an even one. Options of 32 tokens, which a model tells apart by a
# few nats, tie for the first place in 16 of 100 questions, where the option that stands first wins, and
# in 10 another one is chosen. softmax_dtype="float32" (#2921) avoids it and is not the default.
# llama2rt takes logits to fp32 and sums in fp64.
#
# Installs the packages in a folder that is removed afterwards; exits 1 if any output differs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 \
    tokenizers==0.23.3 lm-eval==0.4.13
cat > "$folder/options.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers

QUESTIONS, OPTIONS, LENGTH, WORDS = 100, 4, 32, 1000
torch.set_num_threads(1)
vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(WORDS)}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=128, initializer_range=0.1,
)
model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def text() -> str:
    return "".join(f" w{i}" for i in torch.randint(0, WORDS, (LENGTH,)).tolist())


asked = [
    Instance("loglikelihood", {}, (question, text()), i)
    for i, question in enumerate(text().strip() for _ in range(QUESTIONS))
    for _ in range(OPTIONS)
]


def scores(**options) -> torch.Tensor:
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, **options)
    found = [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]
    return torch.tensor(found, dtype=torch.float64).view(QUESTIONS, OPTIONS)


print("lm-eval", version("lm-eval"), "transformers", transformers.__version__)
plain, exact = scores(), scores(softmax_dtype="float32")
ties = (plain == plain.max(1, keepdim=True).values).sum(1) > 1
other = plain.argmax(1) != exact.argmax(1)
whole = bool((plain == plain.round()).all())
print(f"bf16: from {plain.min():.0f} to {plain.max():.0f}, all whole numbers: {whole}")
print(f"first place tied in {int(ties.sum())} of {QUESTIONS} questions, another option than with "
      f"an fp32 softmax in {int(other.sum())}")
tied_exactly = ((exact == exact.max(1, keepdim=True).values).sum(1) > 1).sum()
print(f"with softmax_dtype=float32: tied in {int(tied_exactly)}")
sys.exit(not (whole and ties.sum() >= 10 and other.sum() >= 5 and tied_exactly == 0))
PYTHON
"$folder/venv/bin/python" "$folder/options.py"
