"""Published formats of rows, made into our records: one module a family of formats.

A format is a test on a row's keys and a function from the row to JSON objects in our own form,
which `records` then checks like any other. A row may give several records (four ranked answers)
or none, where the source's own rule leaves it out (an SHP pair with too small a score ratio). Each
format names the keys that it reads and those that published rows are known to have; the reader
counts all others. Selection rules: Dong et al. 2024 (arXiv 2405.07863), section 2; rows that they
drop as malformed are errors here, which `skip_invalid` tolerates.
"""

# Rows are recognised in this order: transcripts before plain text, whose rows have the same keys;
# formats with more keys before those that would match such rows too.
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
