"""Says at the start which libraries will not stand beside ours, and why."""

import peers
import torch


def pytest_report_header() -> list[str]:
    if not torch.cuda.is_available():
        return ["peers beside torch: none, they need a GPU"]
    return [f"not a peer here: {name}: {reason}" for name, reason in peers.missing().items()]
