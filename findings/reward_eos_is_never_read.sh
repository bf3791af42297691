#!/usr/bin/env bash
# At which token is a LLaMA reward model read that TRL's RewardTrainer trains?
#
# The trainer ends every text that is no templated chat with EOS, and a tokenizer like LLaMA's has no pad
# token. Guessed before running: the score is the one at that EOS, since the attention mask covers it, so
# that the model learns whether an answer has come to its end. Found in trl 1.16.0 with transformers
# 5.24.0: the trainer pads with EOS, and transformers looks for the last token that is not the pad token,
# though the mask covers more. The EOS is computed, and never read: an answer that was cut off scores, to the
# bit, as the same one finished. The pad token is saved with the model, so transformers goes on reading
# it so; a program that reads the last token reads one that was never trained. llama2rt reads such a
# folder at the token before.
#
# Installs both and torch 2.13.0 in a folder that is removed afterwards, unless PYTHON names one that has
# them; exits 1 if it is otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/venv"
  python=$folder/venv/bin/python
  "$python" -m pip install --quiet torch==2.13.0 transformers==5.24.0 trl==1.16.0
fi
cd "$folder"
"$python" - <<'PY'
import sys

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

words = ["<s>", "</s>", "why", "rain", "falls", "clouds", "because", "of"]
plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "why"))
plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=plain, bos_token="<s>", eos_token="</s>"
)
config = transformers.LlamaConfig(
    vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_labels=1, bos_token_id=0, eos_token_id=1,
)
torch.manual_seed(0)
seen = []


class Trainer(trl.RewardTrainer):
    def compute_loss(self, model, inputs, **options):
        seen.append(inputs["input_ids"].clone())
        return super().compute_loss(model, inputs, **options)


pair = {"chosen": "why rain falls because of clouds", "rejected": "why rain falls"}
trainer = Trainer(
    model=transformers.LlamaForSequenceClassification(config),
    args=trl.RewardConfig(
        "out", max_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no",
        per_device_train_batch_size=1, disable_tqdm=True, logging_strategy="no",
    ),
    train_dataset=Dataset.from_list([pair]),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model("saved")
print("trained on", seen[0].tolist())
ends = seen[0].tolist()[0] == [2, 3, 4, 6, 7, 5, 1]  # nothing of the longer one is padding

model = transformers.AutoModelForSequenceClassification.from_pretrained("saved").eval()
print("saved: pad_token_id", model.config.pad_token_id, "eos_token_id", model.config.eos_token_id)
cut = torch.tensor([[2, 3, 4, 6, 7, 5]])
finished = torch.cat([cut, torch.tensor([[1]])], 1)
mask = torch.ones_like(finished)
with torch.no_grad():
    of_cut = float(model(cut).logits)
    of_finished = float(model(finished, attention_mask=mask).logits)
    at_eos = float(model.score(model.model(finished).last_hidden_state)[0, -1])
print(f"cut off {of_cut:.6f}, finished {of_finished:.6f}, at its EOS {at_eos:.6f}")
same = of_cut == of_finished and abs(at_eos - of_finished) > 1e-4
sys.exit(not (ends and same and model.config.pad_token_id == 1))
PY
echo "as found"
