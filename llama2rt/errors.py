"""The one exception that means "your input is wrong", wherever in the library it is found."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input from a user: a file, a record, a recipe key.

    The message says where (`FILE:LINE` or the key), what was found and what was expected. The
    command line prints it without a traceback and exits with status 2.
    """


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """An InputError from inside begins with `what`, such as the record that it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from None
