"""What every verb does around its work: one line for an error, clean interrupts, progress, output that suits a pipe."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from onnxsnp.errors import OnnxSnpError, one_line

if TYPE_CHECKING:
    from rich.console import Console


def guarded(work: Callable[[], None], debug: bool) -> None:
    """Run a verb; an error becomes one line on stderr and exit status 1, an interrupt 130."""
    with _interrupts() as interrupts:
        try:
            work()
            return
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:  # whoever read the output has had enough
                raise
            if debug:
                traceback.print_exc()
            # Compiled modules turn an interrupt during their import into an error of their own.
            interrupted = bool(interrupts) or isinstance(error, KeyboardInterrupt)
            message = "interrupted; nothing half-written was left" if interrupted else _in_words(error)
    print(f"onnxsnp: {message}", file=sys.stderr)
    raise typer.Exit(130 if interrupted else 1)


def _in_words(error: BaseException) -> str:
    """One line for any error."""
    if isinstance(error, OnnxSnpError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory; use fewer --threads or a smaller --input-shape"
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}; check the disk and the paths"
    text = one_line(str(error))
    return f"unexpected {type(error).__name__}: {text}; this is a bug, please report it with the output of --debug"


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that holds an entry once Ctrl-C was pressed."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread
        yield seen
        return
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, allow_nan=False))


def stdout() -> Console:
    """The terminal at its own width; in a pipe lines are not broken. Texts are data, not markup."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 10_000
    return Console(markup=False, emoji=False, highlight=False, width=width)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def status(text: str) -> Any:
    return _stderr().status(text)


class progress_bar:
    """A bar on stderr, one line per stage, with the time left where the amount of work is known.

    Args:
        keep: stages that are done stay in sight; where there are many of them, False.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep

    def __enter__(self) -> Callable[[str, int, int], None]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = _stderr()
        self._bar = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar.start()
        self._tasks: dict[str, Any] = {}
        return self._update

    def _update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            for task in list(self._bar.tasks):  # what went before is done, also where its size was not known
                self._bar.update(task.id, total=task.total or 1, completed=task.total or 1)
                self._bar.stop_task(task.id)
                if not self._keep:
                    self._bar.remove_task(task.id)
            if not self._keep:
                self._tasks.clear()
            self._tasks[stage] = self._bar.add_task(stage, total=total or None)
        self._bar.update(self._tasks[stage], completed=done, total=total or None)

    def say(self, line: str) -> None:
        """A line on stderr, above the bar."""
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
