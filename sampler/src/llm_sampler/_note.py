"""What others' code raises comes through as it is, with a note of where that was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def noted(name: str, where: str) -> Iterator[None]:
    """Note it of whatever is raised in here."""
    try:
        yield
    except Exception as error:
        note(error, name, where)
        raise


def note(error: Exception, name: str, where: str) -> None:
    """Say it in the error's `__notes__`, as its add_note does from Python 3.11 on, where tracebacks show it."""
    vars(error).setdefault("__notes__", []).append(f"raised by {name} in {where}")
