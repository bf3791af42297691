"""Rows of Parquet files and of folders that `datasets.Dataset.save_to_disk` wrote.

A library that guesses types writes what it cannot type as JSON text: `datasets` 5 makes such
columns of rows of mixed shapes, and any part of a nested column may be one. They are decoded here,
so that a file gives the same rows as the JSON lines that it was made of. Such a column is known by
Arrow's extension type `arrow.json` (by its name in the field's metadata where pyarrow is too old to
have it) and by the `huggingface` entry of the schema's metadata. JSON text inside maps and unions
stays text.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llama2rt.data.strict_json import parse
from llama2rt.errors import InputError

Row = dict[str, Any]
Decode = Callable[[Any], Any]

_JSON = "arrow.json"


def parquet_rows(path: Path) -> Iterator[tuple[int, Row | InputError]]:
    """(row number from 1, row); a row whose JSON text is damaged comes as an InputError."""
    pyarrow = _pyarrow(path)
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            _require_unique(path, file.schema_arrow.names)
            yield from _decoded(file.schema_arrow, file.iter_batches())
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: damaged Parquet file ({error})") from None


def dataset_rows(path: Path) -> Iterator[tuple[int, Row | InputError]]:
    """Likewise of a saved dataset; InputError where the folder is none or holds several splits."""
    if (path / "dataset_dict.json").is_file():
        splits = _listed(path / "dataset_dict.json", lambda described: described["splits"])
        raise InputError(f"{path}: holds several splits; name one: {', '.join(splits)}")
    if not (path / "state.json").is_file():
        raise InputError(f"{path}: a folder, but not a saved Hugging Face dataset (no state.json)")
    pyarrow = _pyarrow(path)
    files = _listed(
        path / "state.json", lambda state: [part["filename"] for part in state["_data_files"]]
    )
    if json.loads((path / "state.json").read_bytes()).get("_indices_data_files"):
        raise InputError(
            f"{path / 'state.json'}: a selection of its rows, as datasets 1 saved one: load it and "
            "save it again with a newer release"
        )
    before = 0
    for name in files:
        number = before
        try:
            with pyarrow.memory_map(str(path / name)) as source:
                stream = pyarrow.ipc.open_stream(source)
                _require_unique(path / name, stream.schema.names)
                for number, row in _decoded(stream.schema, stream, before):
                    yield number, row
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"{path / name}: damaged Arrow file ({error})") from None
        before = number


def _listed(path: Path, names: Callable[[Any], Any]) -> list[str]:
    """The names of files or folders that a saved dataset's JSON file lists; InputError where it is
    damaged, or names anything outside its own folder."""
    try:
        found = names(json.loads(path.read_bytes()))
        if all(name not in ("", ".", "..") and Path(name).name == name for name in found):
            return list(found)
    except (ValueError, LookupError, TypeError):
        pass
    raise InputError(f"{path}: damaged: expected the names of what its folder holds")


def _require_unique(path: Path, columns: list[str]) -> None:
    """InputError for a column that stands twice: of its values a row would hold the last."""
    if twice := [name for name in dict.fromkeys(columns) if columns.count(name) > 1]:
        raise InputError(f"{path}: column {twice[0]!r} occurs twice")


def _decoded(schema: Any, batches: Any, before: int = 0) -> Iterator[tuple[int, Row | InputError]]:
    columns = decoders(schema)
    number = before
    for batch in batches:
        for row in _rows(batch):
            number += 1
            try:
                if isinstance(row, InputError):
                    raise row
                row |= {name: decode(row[name]) for name, decode in columns.items()}
            except InputError as error:
                yield number, error
            else:
                yield number, row


def _rows(batch: Any) -> Iterator[Row | InputError]:
    """Rows of a record batch; an InputError in the place of one with a value that Python cannot
    hold, such as a date beyond the year 9999 or in a time zone that it does not know."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):  # of the whole batch
        pass
    for number in range(batch.num_rows):
        row: Row = {}
        try:
            for name in batch.schema.names:
                row[name] = batch.column(name)[number].as_py()
        except (ValueError, OverflowError) as error:
            yield InputError(f"{name}: a value that cannot be read ({error})")
        else:
            yield row


def decoders(schema: Any) -> dict[str, Decode]:
    """For each column of an Arrow schema that holds JSON text anywhere: how to decode a value."""
    features: dict[str, Any] = {}
    if described := (schema.metadata or {}).get(b"huggingface"):
        features = json.loads(described).get("info", {}).get("features") or {}
    found = {field.name: _decoder(field, features.get(field.name), field.name) for field in schema}
    return {name: decode for name, decode in found.items() if decode is not None}


def _decoder(field: Any, feature: Any, where: str) -> Decode | None:
    """None where `field` and what is inside it hold no JSON text. `feature` is its description
    by `datasets`, or None."""
    from pyarrow import types

    named = feature.get("_type") if isinstance(feature, dict) else None
    extension = getattr(field.type, "extension_name", None) or (
        (field.metadata or {}).get(b"ARROW:extension:name", b"").decode()
    )
    if extension == _JSON or (named == "Json" and not types.is_nested(field.type)):
        return lambda value: _parse(where, value)
    if types.is_struct(field.type):
        inside = {
            part.name: _decoder(
                part,
                feature.get(part.name) if isinstance(feature, dict) else None,
                f"{where}.{part.name}",
            )
            for part in field.type
        }
        return _struct({name: decode for name, decode in inside.items() if decode is not None})
    if types.is_list(field.type) or types.is_large_list(field.type):
        of = feature.get("feature") if isinstance(feature, dict) else None
        of = feature[0] if isinstance(feature, list) and feature else of
        return _list(_decoder(field.type.value_field, of, f"{where}[]"))
    return None


def _struct(inside: dict[str, Decode]) -> Decode | None:
    if not inside:
        return None
    return lambda value: (
        value and value | {name: decode(value[name]) for name, decode in inside.items()}
    )


def _list(inside: Decode | None) -> Decode | None:
    if inside is None:
        return None
    return lambda value: value and [inside(item) for item in value]


def _parse(where: str, value: Any) -> Any:
    if value is None:
        return None
    try:
        return parse(value)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise InputError(f"{path}: reading this needs pyarrow: pip install pyarrow") from None
    return pyarrow
