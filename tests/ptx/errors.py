"""What goes wrong: in reading a kernel, and in running it."""

from __future__ import annotations


class UnsupportedPtxError(Exception):
    """The text has something that the machine does not know, or whose result the PTX manual leaves open."""


class PtxFaultError(Exception):
    """A running thread did what a GPU refuses, or what it leaves undefined."""
