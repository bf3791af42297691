"""A recipe to which options may still add, and what is wrong with one in a sentence."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

from llama2rt.errors import InputError
from llama2rt.run.recipe import Recipe, whole_type


def unfinished(
    recipe_class: type[Recipe], values: dict[str, Any], source: str, options: Sequence[str] = ()
) -> Recipe:
    """The recipe of a file to which `options`, as they were given, may still add: its keys are
    checked one by one, keys it must have are left open, and checks across keys, of a table those
    that options name, wait for the options."""
    from pydantic import ValidationError

    try:
        recipe_class.model_validate(values)
    except ValidationError as error:
        wrong = [e for e in error.errors() if e["loc"] and not _left_open(e, recipe_class, options)]
        if wrong:
            raise InputError(f"{source}: {first_problem(wrong, recipe_class)}") from None
    recipe: Recipe = _construct(recipe_class, recipe_class.refine(values))
    return recipe


def _left_open(error: Any, recipe_class: type, options: Sequence[str]) -> bool:
    """Whether an error is about a key that is not there, of the recipe or of one of its tables, or
    about what the keys of such a table must be to each other, where options give some of them."""
    if error["type"] not in ("missing", "value_error"):
        return False
    if error["type"] == "value_error":
        begin = "--" + ".".join(map(str, error["loc"])).replace("_", "-") + "."
        if not any(option.replace("_", "-").startswith(begin) for option in options):
            return False
    table: Any = recipe_class
    for key in error["loc"][:-1] if error["type"] == "missing" else error["loc"]:
        field = getattr(table, "model_fields", {}).get(key)
        if field is None or not field.is_required():
            return False  # an item of a list, or a table that the recipe has a default for
        table = field.annotation
    return error["type"] == "missing" or hasattr(table, "model_fields")


def _construct(table: Any, values: dict[str, Any]) -> Any:
    """`table` (a model's class) with `values`, its other keys at their defaults or left open, and
    likewise in the tables that it must have."""
    import tyro
    from pydantic import BaseModel, TypeAdapter

    fields: dict[str, Any] = {}
    for name, field in table.model_fields.items():
        annotation = field.annotation
        nested = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if field.is_required() and nested:
            fields[name] = _construct(annotation, values.get(name, {}))
        elif name in values:
            fields[name] = TypeAdapter(whole_type(field)).validate_python(values[name])
        elif field.is_required():
            fields[name] = tyro.MISSING
        else:
            fields[name] = field.get_default(call_default_factory=True)
    return table.model_construct(**fields)


def first_problem(errors: Sequence[Any], recipe_class: type) -> str:
    """The key, what is wrong with it, and what was given, of a pydantic error list."""
    error = errors[0]
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key}: no such key in this recipe{_in_a_table(key, recipe_class)}"
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return message
    return f"{key}: {message[0].lower()}{message[1:]}, got {error['input']!r}"


def _in_a_table(key: str, recipe_class: Any) -> str:
    """Where a key that does not stand in the recipe itself belongs, if one of its tables has it."""
    tables = (
        name
        for name, field in recipe_class.model_fields.items()
        if key in getattr(field.annotation, "model_fields", {})
    )
    table = next(tables, None)
    return "" if table is None else f"; did you mean {table}.{key}?"


def registry() -> Any:
    """How options name files of records: a path, or a table as it would stand in a recipe."""
    import tyro

    from llama2rt.data.sources import Source

    def parse(kind: type[Source], given: list[str]) -> Source:
        try:
            return kind.parse(given[0])
        except InputError as error:  # tyro would say only that it could not be parsed
            print(f"llama2rt {error}", file=sys.stderr)
            sys.exit(2)

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def _source(info: Any) -> Any:
        if not (isinstance(info.type, type) and issubclass(info.type, Source)):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH|TABLE",
            instance_from_str=functools.partial(parse, info.type),
            is_instance=lambda value: isinstance(value, info.type),
            str_from_instance=lambda value: [value.as_option()],
        )

    return registry
