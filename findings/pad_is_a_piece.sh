#!/usr/bin/env bash
# What does a pad token that is an ordinary piece of the vocabulary do to text that holds it?
#
# Models that come without a pad token get a piece named as one when they are fine-tuned; "!", id 0 of
# Llama 3's and GPT-2's vocabularies, is such a choice. One would guess: ids and decoded text stay as
# they were, since "!" has its id already and padding is a matter of `pad` alone.
# Found in transformers 5.24.0 with tokenizers 0.23.3: the piece becomes a special token. Pieces that
# hold it ("!!", " wait!") are never used again, so text has other ids than the model was trained on,
# and `decode(..., skip_special_tokens=True)`, which every chat program calls, loses each "!" of an
# answer. Only a mask made before padding tells a "!" from padding. llama2rt keeps it a piece.
#
# Installs both in a folder that is removed afterwards; exits 1 if any output differs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3
cat > "$folder/pad.py" <<'PYTHON'
import sys

import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
bpe.train_from_iterator(["wait!! stop!! go! yes!!!"] * 50, trainer)
text = "wait!! stop! go"

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
found = []
for name, settings in (("no pad token", {}), ('pad_token="!"', {"pad_token": "!"})):
    one = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **settings)
    ids = one(text)["input_ids"]
    pieces = one.convert_ids_to_tokens(ids)
    shown = one.decode(ids, skip_special_tokens=True)
    print(f"{name:14} {len(one)} pieces; {' '.join(pieces)} -> {shown!r}")
    found.append((pieces.count("!!"), pieces.count("!"), shown))
sys.exit(found != [(1, 1, text), (0, 3, "wait stop go")])
PYTHON
"$folder/venv/bin/python" "$folder/pad.py"
