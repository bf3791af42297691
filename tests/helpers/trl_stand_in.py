"""What TRL's trainers ask of themselves when only their losses are wanted."""

from collections import defaultdict
from types import SimpleNamespace


def trl_host(**settings):
    """A stand-in for one of TRL's trainers: its settings, and an accelerator of one process."""
    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        **settings,
    )
