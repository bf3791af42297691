"""The one exception that means "your input is wrong", wherever in the library it is found."""


class InputError(ValueError):
    """Bad input from a user: a file, a record, a recipe key.

    The message says where (``FILE:LINE`` or the key), what was found and what was expected. The
    command line prints it without a traceback and exits with status 2.
    """
