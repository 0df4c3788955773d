"""Arguments of a command: numbers with a smallest value, and errors in one line."""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from typing import NoReturn

from workflow.errors import ConfigError


class OneLineParser(ArgumentParser):
    """Raises ConfigError for a wrong argument; argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, message, f"type {self.prog} --help")


def at_least(smallest: int) -> Callable[[str], int]:
    """The `type=` of an option: a whole number that is not smaller."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.lstrip("-").isdigit() or int(text) < smallest:
            raise ArgumentTypeError(f"{text!r} is not a whole number of {smallest} or more")
        return int(text)

    return parse
