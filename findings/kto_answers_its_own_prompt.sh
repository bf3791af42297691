#!/usr/bin/env bash
# Which answers does TRL's KTO trainer estimate the policy's KL from, and what is in its batches?
#
# The KL is to come from mismatched pairs: a prompt with another prompt's answer (Ethayarajh et al.
# 2024, section 3.2). Guessed before running: whatever the order of the rows, each KL answer is
# another prompt's, and batches mix desirable and undesirable rows. Found in trl 1.16.0: the answers
# of a batch are moved on by one row, whoever's they are, and rows are never shuffled (the loss needs
# the order). Where the answers to a prompt lie beside each other, as whoever scores n samples a
# prompt writes them, a batch of two holds one prompt: all KL answers are to the prompt itself, and
# the "KL" is the mean implied reward of the very rows that are trained. And of a set of pairs, which
# the trainer takes apart into all chosen and then all rejected answers (of 1,000 rows at a time),
# every batch has one label alone. llama2rt takes the next prompt's answer, and shuffles.
#
# Installs trl 1.16.0 and torch 2.13.0 in a folder that is removed afterwards; exits 1 if what it
# prints differs from what is said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet trl==1.16.0 transformers==5.24.0 accelerate==1.15.0
cat > "$folder/kto.py" <<'PYTHON'
import sys
import tempfile

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

words = [f"{kind}{i}" for kind in ("ask", "good", "bad") for i in range(8)]
vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *words])}
base = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=base, pad_token="<pad>", eos_token="<eos>"
)
config = transformers.LlamaConfig(
    vocab_size=len(vocabulary),
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    pad_token_id=0,
    eos_token_id=1,
)
torch.manual_seed(0)
home = tempfile.mkdtemp()
transformers.LlamaForCausalLM(config).save_pretrained(home)
tokenizer.save_pretrained(home)
tables = {
    "pairs": Dataset.from_dict(
        {
            "prompt": [f"ask{i}" for i in range(8)],
            "chosen": [f" good{i}" for i in range(8)],
            "rejected": [f" bad{i}" for i in range(8)],
        }
    ),
    "two answers a prompt": Dataset.from_dict(
        {
            "prompt": [f"ask{i}" for i in range(8) for _ in range(2)],
            "completion": [f" {kind}{i}" for i in range(8) for kind in ("good", "bad")],
            "label": [True, False] * 8,
        }
    ),
}
print("trl", trl.__version__, "transformers", transformers.__version__)
found = {}
for name, table in tables.items():
    with tempfile.TemporaryDirectory() as folder:
        options = trl.KTOConfig(
            output_dir=folder, per_device_train_batch_size=2 if "two" in name else 4,
            report_to=[], use_cpu=True, bf16=False,
        )
        trainer = trl.KTOTrainer(
            model=home, args=options, train_dataset=table, processing_class=tokenizer
        )
        rows = trainer.train_dataset
        labels = [batch["label"].tolist() for batch in trainer.get_train_dataloader()]
        asked = [tokenizer.decode(row["prompt_ids"]) for row in rows]
        other = [tokenizer.decode(row["KL_completion_ids"]) for row in rows]
    same = sum(a.strip()[-1] == b.split()[0][-1] for a, b in zip(asked, other))
    print(f"{name}: labels of each batch {labels}; KL answers to the same prompt {same} of {len(rows)}")
    found[name] = ([len(set(batch)) for batch in labels], same, len(rows))
holds = found == {
    "pairs": ([1, 1, 1, 1], 0, 16),
    "two answers a prompt": ([2] * 8, 16, 16),
}
sys.exit(not holds)
PYTHON
"$folder/venv/bin/python" "$folder/kto.py"
