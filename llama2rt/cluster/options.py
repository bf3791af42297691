"""Options that several subcommands of `llama2rt cluster` share."""

from pathlib import Path
from typing import Annotated

import tyro

Json = Annotated[bool, tyro.conf.arg(name="json", help="Print one JSON object.")]
Figure = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
"""where a figure is drawn; None for none"""
