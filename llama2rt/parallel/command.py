"""A command that torchrun has started several times: the ranks meet, work, and leave as one."""

import contextlib
import logging
import os
import signal
import sys
import typing
from collections.abc import Iterator

import torch

from llama2rt.parallel import faults
from llama2rt.parallel.world import barrier, start, stop, world

logger = logging.getLogger("llama2rt.parallel.command")


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Inside, the ranks have met. After an error they stay so, for `leave`."""
    start()
    if world().rank == 0:
        logger.info("%d ranks on %s", world().size, world().device.type)
        warn_of_threads()
    yield
    barrier()
    stop()


def restarted() -> bool:
    """Whether torchrun has started the ranks anew after one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def finish() -> typing.NoReturn:
    """End this rank after a whole run, at once: as Python takes leave, a thread of torch 2.13's
    that still ends may abort the process, and torchrun would call the run failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def leave(error: BaseException, message: str, status: int, verb: str) -> typing.NoReturn:
    """End this rank with what to say of `error`: what all have in common is said once, by rank 0,
    and all leave with one status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # it ends already
    rank = int(os.environ.get("RANK", "0"))
    if faults.watched():
        said, status = faults.last_words(error, message, status)
    else:  # the ranks have not met: each has read the same
        said = None if rank else message
    if said is not None:
        print(f"llama2rt {verb}: {said}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    faults.wait_until_said(said is not None)
    # At once: what torch tears down at its end may wait for ranks that are no more.
    os._exit(status)


def warn_of_threads() -> None:
    """Say so where ranks on a CPU leave most cores idle, as torchrun has it unless told."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    if world().device.type == "cpu" and 2 * here * threads <= cores:
        logger.warning(
            "%d ranks of %d threads on %d cores: torchrun sets OMP_NUM_THREADS=1 where it is not "
            "set; OMP_NUM_THREADS=%d uses them all",
            here,
            threads,
            cores,
            cores // here,
        )
