#!/usr/bin/env bash
# Are numpy's generators of two different lists of seeds different generators?
#
# `default_rng([seed, epoch])` for the order of an epoch, `default_rng([seed, file, turn])` for that
# of a file: numpy's own page on parallel generation recommends such lists. One would guess that lists
# which differ give streams that have nothing to do with each other; that is what a SeedSequence is
# for. Found in numpy 2.4.6: a list of up to four 32-bit words is filled up with zeros. [3, 1] and
# [3, 1, 0] are one stream, and [3], [3, 0] and [3, 0, 0, 0]; a number of more than 32 bits is several
# words, so that [2**32] is [0, 1]. From the fifth word on a zero counts. The `spawn_key` of a
# SeedSequence does not end so. A program with several lists of seeds gives them one length and a
# first number that says what for, as `llama2rt.data.shard_loader` does, or uses spawn keys.
#
# Installs numpy in a folder that is removed afterwards; exits 1 if any answer differs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6
cat > "$folder/seeds.py" <<'PYTHON'
import sys

import numpy
from numpy.random import SeedSequence, default_rng

print("numpy", numpy.__version__)
EXPECTED = [
    ([3, 1], [3, 1, 0], True),
    ([3], [3, 0, 0, 0], True),
    ([2**32], [0, 1], True),
    ([3, 1], [3, 1, 1], False),
    ([1, 2, 3, 4], [1, 2, 3, 4, 0], False),
]
found = []
for one, other, _ in EXPECTED:
    same = (default_rng(one).permutation(100) == default_rng(other).permutation(100)).all()
    print(f"default_rng({one}) and default_rng({other}): {'one stream' if same else 'two'}")
    found.append((one, other, bool(same)))
keys = [SeedSequence(3, spawn_key=key).generate_state(4).tolist() for key in ((1,), (1, 0))]
print("spawn keys (1,) and (1, 0):", "one stream" if keys[0] == keys[1] else "two")
sys.exit(0 if found == EXPECTED and keys[0] != keys[1] else "it has changed")
PYTHON
"$folder/venv/bin/python" "$folder/seeds.py"
