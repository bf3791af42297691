"""Which store keeps a run's checkpoints: one process's, or that of a group of ranks.

Both write the same folders, and each reads what the other has written.
"""

import os

from llama2rt.checkpoint.store import Store
from llama2rt.parallel.world import world


def open_store(directory: str | os.PathLike[str], keep: int = 2) -> Store:
    """The checkpoints in `directory`, of which `keep` stay; called by every rank."""
    if world().size == 1:
        return Store(directory, keep)
    # Here, because torch.distributed.checkpoint takes a second to import.
    from llama2rt.parallel.group_store import GroupStore

    return GroupStore(directory, keep)
