#!/usr/bin/env bash
# What do MT-Bench's own tools (FastChat's llm_judge) make of an answer that was judged again?
#
# gen_judgment.py appends: whoever judges a second time, with a better prompt file or after an
# interruption, has two rows of one judge, question, turn and model in JUDGE_single.jsonl.
# Guessed before running: show_result.py takes one of them, and clean_judgment.py ("Clean model judgment
# files") makes a file that has one of each. Found: show_result.py averages over rows, so a question that
# was judged twice weighs twice; clean_judgment.py keeps the first of two rows and drops every model that
# is not among the 31 of 2023 that stand in its source, so that of a model of one's own nothing is left.
# Status 0 both times, the files unchanged.
#
# Installs fschat 0.2.36 (without what serving needs) and pandas 3.1.1 in a folder that is removed
# afterwards; exits 1 if either tool does otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pandas==3.1.1
"$folder/venv/bin/pip" install --quiet --no-deps fschat==0.2.36
cd "$folder"
row() { # model question score
  printf '{"question_id": %s, "model": "%s", "judge": ["judge", "single-v1"], "turn": 1, "score": %s}\n' \
    "$2" "$1" "$3"
}
{ row own 81 2; row own 82 2; row own 81 8; row gpt-4 81 2; row gpt-4 82 2; row gpt-4 81 8; } > j.jsonl
python=venv/bin/python
shown=$("$python" -m fastchat.llm_judge.show_result --mode single --input-file j.jsonl)
cleaned=$("$python" -m fastchat.llm_judge.clean_judgment --infile j.jsonl)
echo "$shown" | tail -4
echo "$cleaned" | tail -1
cat j_clean.jsonl
# One of the two rows would give 2 or 5.
test "$(echo "$shown" | grep -cE '^(own|gpt-4) +4\.0$')" = 2
test "$(grep -c '"gpt-4"' j_clean.jsonl)" = 2
test "$(grep -c '"own"' j_clean.jsonl || true)" = 0
test "$(grep -c '"score": 8' j_clean.jsonl || true)" = 0
