"""The one exception that means "your input is wrong", wherever in the library it is found."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input from a user: a file, a record, a recipe key.

    The message says where (`FILE:LINE` or the key), what was found and what was expected. The
    command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str = "", fault: str | None = None) -> None:
        super().__init__(message)
        self.fault = fault
        """of a record: the filter of `data.filters` that leaves such records out"""


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """An InputError from inside begins with `what`, such as the record that it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}", error.fault) from None
