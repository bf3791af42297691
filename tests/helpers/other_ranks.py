"""A run that is saved on some ranks and goes on on other numbers of them: is it one process's?

    python tests/helpers/other_ranks.py --ranks 4 8 1 2

(with OMP_NUM_THREADS=1) pretrains, as one process, 20 steps of the model of `parallel_stages`; then
again, stopped by Ctrl-C after an equal part of the steps on each number of ranks in turn, which
shard the model (FSDP) and its checkpoints. AssertionError where a step's loss, a held-out number or
a weight of the last model is not what one process has.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from parallel_stages import agree, metrics, run_stage, write_data  # beside this file
from rank_pool import pools

from llama2rt.parallel import ParallelOptions

STEPS = 20
SECONDS = 1800  # for each number of ranks, reached only where something hangs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name, pools() as on_ranks:
        folder, options = Path(name), ParallelOptions()
        data, out = folder / "data", folder / "run"
        write_data(data)
        run_stage("pretrain", data, data, folder / "whole", options)
        each = STEPS // len(given.ranks)
        for turn, ranks in enumerate(given.ranks, start=1):
            stop = 0 if turn == len(given.ranks) else each
            arguments = "pretrain", data, data, out, options, stop
            if ranks == 1:
                said = run_stage(*arguments)
            else:
                said = on_ranks(ranks, run_stage, *arguments, seconds=SECONDS)[0]
            done = metrics(out)[-1]["step"]
            print(f"{ranks} ranks, step {done} of {STEPS}: {said.replace(name, '')}", flush=True)
        agree(out, folder / "whole")
        apart = max(
            abs(ours["loss"] / theirs["loss"] - 1)
            for ours, theirs in zip(metrics(out), metrics(folder / "whole"), strict=True)
            if "loss" in ours
        )
    print(f"as one process: losses within {apart:.1e}, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
