#!/usr/bin/env bash
# What does `transformers serve` do with temperature, n and logprobs, and is its continuation one?
#
# Guessed before running: as OpenAI's API, whose routes it serves: a temperature above 0 samples, n
# gives n answers, logprobs are there or refused, and prompt + text is the whole text. Found: the
# answer at temperature 1.5 is the greedy one, for every seed, unless the model's
# generation_config.json says do_sample; n = 4 gives one answer and logprobs none, with status 200
# and a warning in the server's log alone (top_k, which it does not know, is refused with 422); and a
# completion is decoded alone, so that a SentencePiece model's text lacks the space in front of its
# first word. Best-of-n by such a server is best of one. A request's `generation_config` field, which
# replaces the file, mends the first.
#
# Installs torch 2.13.0, transformers 5.24.0 and what serving needs in a folder that is removed
# afterwards, unless PYTHON names one that has them; exits 1 if any of it is otherwise.
set -euo pipefail
folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2> /dev/null; rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    PYTHON="$folder/venv/bin/python"
    "$PYTHON" -m pip install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 \
        fastapi==0.165.0 uvicorn==0.54.0 openai==3.57.0
fi
cat > "$folder/model.py" <<'PYTHON'
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = ["<unk>", "<s>", "</s>", *(f"\u2581word{i}" for i in range(61))]
inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
tokenizer.save_pretrained(sys.argv[1])
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
PYTHON
cat > "$folder/ask.py" <<'PYTHON'
import json
import sys
import time
import urllib.error
import urllib.request

url, model = sys.argv[1:]


def ask(path, **fields):
    body = json.dumps({"model": model, "max_tokens": 8, **fields}).encode()
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


for _ in range(300):
    try:
        urllib.request.urlopen(url + "/health")
        break
    except OSError:
        time.sleep(1)
messages = {"messages": [{"role": "user", "content": "word1 word2"}]}


def chat(**fields):
    status, reply = ask("/v1/chat/completions", **messages, **fields)
    assert status == 200, reply
    return reply["choices"]


greedy = chat(temperature=0)[0]["message"]["content"]
hot = {chat(temperature=1.5, seed=seed)[0]["message"]["content"] for seed in range(4)}
config = json.dumps({"do_sample": True, "temperature": 1.5, "max_new_tokens": 8})
mended = {
    chat(generation_config=config, seed=seed)[0]["message"]["content"] for seed in range(4)
}
several = chat(n=4, logprobs=True, top_logprobs=2)
refused = ask("/v1/chat/completions", **messages, top_k=3)[0]
text = ask("/v1/completions", prompt="word1 word2", temperature=0)[1]["choices"][0]["text"]
print(f"texts of 4 seeds at temperature 1.5: {len(hot)}, greedy: {hot == {greedy}}")
print(f"with do_sample in generation_config: {len(mended)}")
print(f"n = 4: {len(several)} answer, logprobs {several[0].get('logprobs')}; top_k: {refused}")
print(f"the continuation of 'word1 word2' begins {text[:6]!r}")
found = hot == {greedy} and len(mended) > 1 and len(several) == 1 and refused == 422
found = found and several[0].get("logprobs") is None and text.startswith("word")
print("they are dropped" if found else "it has changed")
sys.exit(not found)
PYTHON
export HF_HUB_OFFLINE=1
"$PYTHON" "$folder/model.py" "$folder/model" > "$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
port=$("$PYTHON" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$PYTHON" -m transformers.cli.transformers serve "$folder/model" --host 127.0.0.1 --port "$port" \
    --device cpu > "$folder/log" 2>&1 &
server=$!
"$PYTHON" "$folder/ask.py" "http://127.0.0.1:$port" "$folder/model" || { cat "$folder/log"; exit 1; }
