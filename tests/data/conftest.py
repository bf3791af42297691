"""Files of rows, as other programs write them."""

import json_lines
import pytest


@pytest.fixture
def rows_file(tmp_path):
    """`rows_file(*rows)`: a file of one JSON object a line."""

    def write(*rows, name="rows.jsonl"):
        json_lines.write(tmp_path / name, rows)
        return tmp_path / name

    return write
