#!/usr/bin/env bash
# What does a bf16 product on a CPU cost whose number of rows is new?
#
# Guessed before running: what the last one cost, as in fp32; a first call may warm something up, once
# for a shape of weight. Found: each number of rows is compiled for by oneDNN, which takes most of a
# millisecond, several times a small product itself, and leaves half a MiB or more; a thousand such
# are kept, for each shape of weight and each of forward, gradient of the input and of the weight. A
# process that trains on packed documents, whose batches hardly have a number of tokens twice, grows
# by hundreds of MiB and is never warm. Batches padded to a multiple do not show it, nor does fp32,
# which MKL multiplies.
#
# Needs a CPU whose bf16 oneDNN multiplies (AVX-512); says so and ends where it does not. Installs
# torch 2.13.0 in a folder that is removed afterwards; exits 1 if what it finds has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/lengths.py" <<'PYTHON'
import subprocess
import sys
import time

import torch

COUNT = 60


def resident():
    status = open("/proc/self/status").read()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def measure(dtype, new):
    """Least milliseconds of a product, on one thread, and MiB that each leaves."""
    torch.set_num_threads(1)
    weight = torch.randn(128, 128).to(dtype)
    x = torch.randn(1000, 128).to(dtype)
    for rows in (1000, 999):
        torch.nn.functional.linear(x[:rows], weight)
    before, taken = resident(), []
    for i in range(COUNT):
        rows = 300 + (7 * i if new else 0)
        start = time.perf_counter()
        torch.nn.functional.linear(x[:rows], weight)
        taken.append(1e3 * (time.perf_counter() - start))
    return min(taken[1:]), (resident() - before) / COUNT


if len(sys.argv) > 1:
    dtype, new = getattr(torch, sys.argv[1]), sys.argv[2] == "new"
    print(*measure(dtype, new))
    sys.exit()
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    print("oneDNN does not multiply bf16 on this CPU: nothing to see")
    sys.exit()


def run(dtype, rows):
    said = subprocess.check_output([sys.executable, __file__, dtype, rows], text=True)
    milliseconds, grown = map(float, said.split())
    print(f"{dtype}, {rows} number of rows: {milliseconds:.2f} ms, {grown:.2f} MiB each")
    return milliseconds, grown


same, kept = run("bfloat16", "same")
new, grown = run("bfloat16", "new")
single, single_kept = run("float32", "same")
single_new, single_grown = run("float32", "new")
expected = {
    "a new number takes longer in bf16": new > 3 * same,
    "and stays in memory": grown > kept + 0.3,
    "not so in fp32": single_new < 3 * single and single_grown < single_kept + 0.1,
}
for what, holds in expected.items():
    print(what, "" if holds else "CHANGED")
sys.exit(not all(expected.values()))
PYTHON
"$folder/venv/bin/python" "$folder/lengths.py"
