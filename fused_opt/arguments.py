"""Types for command line arguments: they refuse a bad value with a message that names it, the limit and the remedy."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection
from pathlib import Path


class CannotRunError(Exception):
    """A command cannot do what its arguments ask for; the message says why."""


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argparse type for whole numbers from `low` to `high`, both included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; give one from {low} to {high}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is out of range; give a whole number from {low} to {high}")
        return value

    return parse


def list_of_numbers(low: int, high: int) -> Callable[[str], list[int]]:
    """An argparse type for whole numbers from `low` to `high`, separated by commas."""
    parse = whole_number(low, high)
    return lambda text: [parse(word) for word in text.split(",")]


def one_of(kind: str, names: Collection[str]) -> Callable[[str], str]:
    """An argparse type for one of these names, which are `kind`s."""

    def check(name: str) -> str:
        if name not in names:
            raise argparse.ArgumentTypeError(f"unknown {kind} {name!r}; use any of {', '.join(names)}")
        return name

    return check


def writable_file(text: str) -> Path:
    """An argparse type for a file to write at the end: what would fail then is refused now."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {str(path.parent)!r}; make it first")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written; give a file in a folder of yours")
    return path


def readable_file(text: str) -> Path:
    """An argparse type for a file that is there."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no file; give one that is there")
    return path


def writable_folder(text: str) -> Path:
    """An argparse type for a folder to write files to; it is made if its parent is there."""
    path = Path(text)
    if not path.exists() and path.absolute().parent.is_dir():
        path.mkdir()
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is no folder that can be written; give one of yours")
    return path
