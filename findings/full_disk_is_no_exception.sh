#!/usr/bin/env bash
# What does torch.distributed.checkpoint raise where a rank cannot write its part?
#
# Guessed before running: the rank's OSError, or an Exception around it, so that `except Exception`
# around `dcp.save`, or around the future of `dcp.async_save`, sees a full disk. Found: a
# CheckpointException, which is a BaseException and no Exception. A trainer that catches Exception to
# go on from the checkpoint before ends instead, as if it had been interrupted.
#
# Installs torch 2.13.0 and numpy 2.4.6 in a folder that is removed afterwards; exits 1 if either
# save raises anything else.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/save.py" <<'PYTHON'
import errno
import sys
import tempfile
import warnings

import torch
import torch.distributed.checkpoint as dcp


class FullDisk(dcp.FileSystemWriter):
    def write_data(self, plan, planner):
        raise OSError(errno.ENOSPC, "No space left on device")


def at_once():
    dcp.save({"x": torch.ones(2)}, storage_writer=FullDisk(tempfile.mkdtemp()), no_dist=True)


def later():
    state = {"x": torch.ones(2)}
    dcp.async_save(state, storage_writer=FullDisk(tempfile.mkdtemp()), no_dist=True).result()


def raised(save):
    try:
        save()
    except Exception as error:
        return f"{type(error).__name__}, an Exception"
    except BaseException as error:
        return f"{type(error).__name__}, no Exception"
    return "nothing"


warnings.simplefilter("ignore")
found = {save.__name__: raised(save) for save in (at_once, later)}
print("torch", torch.__version__, found)
sys.exit(set(found.values()) != {"CheckpointException, no Exception"})
PYTHON
"$folder/venv/bin/python" "$folder/save.py"
