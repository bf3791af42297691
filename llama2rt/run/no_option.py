"""A key that stands in a recipe's file only: tyro leaves its value as it is. `Annotated[list[Step],
*NO_OPTION]`."""

from typing import Any

import tyro

NO_OPTION = (
    tyro.conf.Fixed,
    tyro.constructors.PrimitiveConstructorSpec[Any](
        nargs=1,
        metavar="TABLE",
        instance_from_str=list,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [f"{len(value)} in the file"],
    ),
)
