#!/usr/bin/env bash
# What does a group that torchrun restarts (--max-restarts) find in the store that its ranks meet in?
#
# Guessed before running: nothing of the attempt before, since keys carried a prefix of the attempt
# once, and torch 2.13 says where it connects that each retry has a new store. Found: the store is the
# same, without a prefix. What the first attempt's ranks have left there is read by the second's, the
# addresses of dead ranks included: a gloo group that is started by `init_process_group` alone can
# then fail to connect, by which rank comes first. A store of its own for every attempt
# (`PrefixStore(TORCHELASTIC_RESTART_COUNT, ...)`) mends it.
#
# Installs torch 2.13.0 and numpy 2.4.6 in a folder that is removed afterwards; exits 1 if the key is
# gone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/worker.py" <<'PYTHON'
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
store, rank, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=60)))
if attempt == 0:
    if rank == 0:
        store.set("left by the first attempt", "")
        store.wait(["rank 1 has seen it"])
    else:
        store.wait(["left by the first attempt"])
        store.set("rank 1 has seen it", "")
    sys.exit(1)
if rank == 0:
    kept = store.check(["left by the first attempt"])
    print(f"torch {torch.__version__}: the first attempt's key is {'there' if kept else 'gone'}")
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --standalone \
    --nproc-per-node 2 --max-restarts 1 "$folder/worker.py" 2> "$folder/log" | tee "$folder/said"
grep -q "the first attempt's key is there" "$folder/said" || { cat "$folder/log"; exit 1; }
