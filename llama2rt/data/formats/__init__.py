"""Rows as other people publish them, turned into our records: one module a family of formats.

Each format is a test on a row's keys and a function from the row to JSON objects in our own form,
which `records` then checks like any other. A row may give several records (four ranked answers)
or none where the source's own rule leaves it out (an SHP pair with too small a score ratio). What a
format does not read is the reader's to count: it knows which further keys a format reads, and which
published rows are known to carry. Selection rules: Dong et al. 2024 (arXiv 2405.07863), section 2;
what they drop as malformed is an error here, to be tolerated by `skip_invalid`.
"""

# In this order are rows recognised: transcripts before plain text, whose rows have the same keys;
# formats with more keys before those that any of them might match.
from llama2rt.data.formats import (  # noqa: F401  # isort: skip
    anthropic,
    orca,
    ultrainteract,
    gsm8k,
    scored,
    shp,
    saferlhf,
    rlhflow,
    trl,
    sharegpt,
)
from llama2rt.data.formats.registry import FORMATS, Convert, Format, Selection, recognise

__all__ = ["FORMATS", "Convert", "Format", "Selection", "recognise"]
