"""What the tests of patched models share."""

import pytest

from llama2rt import ops


@pytest.fixture
def calls(monkeypatch):
    """How often each of our ops is called by the patched modules."""
    counts = dict.fromkeys(("rms_norm", "swiglu", "rope", "attention", "token_logprob"), 0)

    def counted(name, op):
        def call(*args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        return call

    for name in counts:
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return counts
