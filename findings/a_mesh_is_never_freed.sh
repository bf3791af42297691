#!/usr/bin/env bash
# What is left of a DeviceMesh that nobody holds any more?
#
# Guessed before running: nothing; or at least that a second mesh of the same shape and names takes
# the process groups of the first. Found: every `init_device_mesh` makes groups of its own, which
# stay, each with a thread of gloo. The threads of all of a process's groups are woken with the
# traffic of the one in use: a program that makes a mesh for every phase (a stage, an iteration of
# RLHF, a test) gets slower with each; with hundreds of groups the processor does little else. A
# mesh by shape, kept to the end of the job, mends it.
#
# Installs torch 2.13.0 and numpy 2.4.6 in a folder that is removed afterwards; exits 1 if the number
# of threads does not grow by the same with every mesh.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/worker.py" <<'PYTHON'
import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def threads_of_gloo():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("gloo") for name in names)


dist.init_process_group("gloo")
found = [threads_of_gloo()]
for _ in range(4):
    init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "shard"))  # and dropped
    gc.collect()
    found.append(threads_of_gloo())
if dist.get_rank() == 0:
    each = {after - before for before, after in zip(found, found[1:])}
    grows = len(each) == 1 and each.pop() > 0
    print(f"torch {torch.__version__}: gloo's threads before and after each mesh: {found}")
    print("they stay" if grows else "it has changed", flush=True)
dist.barrier()
os._exit(0)  # the end of the groups is not what is looked at
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --standalone \
    --nproc-per-node 4 "$folder/worker.py" 2> "$folder/log" | tee "$folder/said"
grep -q "they stay" "$folder/said" || { cat "$folder/log"; exit 1; }
