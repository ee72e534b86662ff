"""Options that several commands share, read from text."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from spark3d.errors import ConfigError

Geometry = Literal["agree", "sform", "qform"]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="A recipe (name or YAML file), then overrides `section.key=value`."),
]


def split_recipe(arguments: list[str] | None) -> tuple[str | None, tuple[str, ...]]:
    """The recipe's name, if the first argument is not an override, and the overrides."""
    given = arguments or []
    if given and "=" not in given[0]:
        return given[0], tuple(given[1:])
    return None, tuple(given)


def by_name(text: str, option: str) -> dict[str, float]:
    """Numbers of the form `2` (for all) or `name=3`, with commas; "" is the name for all.

    Raises:
        ConfigError: something else stands there.
    """
    found = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(f"{option}={text} must read like 2 or 2,liver=5") from None
    return found


def numbers(text: str, option: str) -> list[str]:
    """The parts of a comma-separated list of whole numbers.

    Raises:
        ConfigError: something else stands there.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise ConfigError(f"{option}={text} must be numbers with commas, e.g. 0,1")
    return parts


def required(value: Path | None, option: str) -> Path:
    """The option's value.

    Raises:
        ConfigError: it was not given.
    """
    if value is None:
        raise ConfigError(f"{option} is missing; see --help for a worked example")
    return value
