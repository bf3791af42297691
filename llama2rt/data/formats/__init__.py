"""Published formats of rows, made into our records: one module a family of formats.

A format is a test on a row's keys and a function from the row to JSON objects in our own form,
which `records` then checks like any other. A row may give several records (four ranked answers)
or none, where the source's own rule leaves it out (an SHP pair with too small a score ratio). Each
format names the keys that it reads and those that published rows are known to have; the reader
counts all others. A row that two formats could claim is an error, which `format` in the file's
table settles. Selection rules: Dong et al. 2024 (arXiv 2405.07863), section 2; rows that they drop
as malformed are errors here, which `skip_invalid` tolerates.
"""

from llama2rt.data.formats import (  # noqa: F401
    alpaca,
    anthropic,
    gsm8k,
    helpsteer3,
    nectar,
    orca,
    rlhflow,
    saferlhf,
    scored,
    sharegpt,
    shp,
    stack_exchange,
    summaries,
    trl,
    ultrainteract,
    webgpt,
)
from llama2rt.data.formats.registry import (
    FORMATS,
    OWN,
    Convert,
    Format,
    Selection,
    named,
    recognise,
)

__all__ = ["FORMATS", "OWN", "Convert", "Format", "Selection", "named", "recognise"]
