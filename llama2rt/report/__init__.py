"""Figures and the one-file HTML report.

`html.write(path, title, sections)` writes a page from sections of blocks; `figures` draws what is
known about models and versions, `training` what metrics.jsonl says of a run;
`versions.sections(numbers)` compares versions and reward models, `of_run(directory)` makes the
report of a single stage, `finish(run, numbers)` ends a stage's run with it. Numbers come in as
arguments: nothing here computes one.
"""

from llama2rt.report import figures, training, versions
from llama2rt.report.files import write_json
from llama2rt.report.html import (
    Answers,
    Dialogues,
    Facts,
    Headline,
    Section,
    Table,
    Text,
    write,
)
from llama2rt.report.plot import Plot
from llama2rt.report.single_run import finish, of_run

__all__ = [
    "Answers",
    "Dialogues",
    "Facts",
    "Headline",
    "Plot",
    "Section",
    "Table",
    "Text",
    "figures",
    "finish",
    "of_run",
    "training",
    "versions",
    "write",
    "write_json",
]
