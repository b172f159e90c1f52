"""Show a live run on a terminal or in a container log.

On a terminal, log lines scroll above a live panel; elsewhere there are only plain lines without
control codes. A separate thread writes them, so that a slow terminal cannot block the supervisor.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, TextIO

from ..run import events
from ..run.events import Event
from ..run.status import RunStatus
from ..units import duration, number
from .script_screens import JsonScreen, QuietScreen
from .terminal import PATIENCE_SECONDS, Sink, clean, one_line, shortened
from .text import closing_lines, figures, flowed, lasting_line, sparkline, steps_done, work_done

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

LINE_SECONDS = 10.0  # between the plain lines of steps and of progress
TICK_SECONDS = 0.25  # between the panel's refreshes while nothing happens
REFRESH_SECONDS = 0.1  # between its refreshes while much happens
QUEUED_EVENTS = 1000
SPARK_STEPS = 30
PANEL_COLUMNS = 24  # a narrower terminal gets the panel's rows without its frame
LINE_INDENT = 9  # where a lasting line's text begins, behind the clock
SEPARATOR = " · "


class Display:
    """Show a run as its events come in; `close` adds the closing tables of a finished one.

    `is_quiet` shows warnings only, on standard error; `is_json` each event as an object.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        logging_steps: int = 1,
        *,
        is_quiet: bool = False,
        is_json: bool = False,
    ) -> None:
        usual = sys.stderr if is_quiet and not is_json else sys.stdout
        self._sink = Sink(usual if stream is None else stream)
        is_live = self._sink.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._screen: _Screen
        if is_json:
            self._screen = JsonScreen(self._sink, logging_steps, is_quiet=is_quiet)
        elif is_quiet:
            self._screen = QuietScreen(self._sink)
        elif is_live:
            self._screen = _LiveScreen(self._sink)
        else:
            self._screen = _PlainScreen(self._sink, logging_steps)
        self._queue: queue.Queue[tuple[Event | str, RunStatus] | None] = queue.Queue(QUEUED_EVENTS)
        self._status = RunStatus()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="display", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a hidden cursor must come back

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def show(self, event: Event, status: RunStatus) -> None:
        """Show an event and the status after it; return at once, whatever the terminal does."""
        self._status = status
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait((event, status))

    def print_line(self, text: str) -> None:
        """Add a lasting line, such as the address of the status page."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait((text, self._status))

    @property
    def error(self) -> Exception | None:
        """Return why nothing more is shown, None while all is."""
        return self._sink.error

    def close(self) -> None:
        """Take the panel away and, if the run finished, print its tables; harmless twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(PATIENCE_SECONDS)
        atexit.unregister(self.close)

    def _run(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=TICK_SECONDS)
            except queue.Empty:
                if self._closing.is_set():
                    break
                item = (Event(), self._status)
            if item is None or self._sink.is_dead:
                break
            with contextlib.suppress(Exception):  # nothing here is worth the run
                self._show(*item)
        with contextlib.suppress(Exception):
            self._screen.close()
        with contextlib.suppress(Exception):
            if self._status.finished is not None:
                for line in closing_lines(self._status, self._sink.size()[0]):
                    self._screen.line(*line)
        self._sink.close()

    def _show(self, event: Event | str, status: RunStatus) -> None:
        if isinstance(event, str):
            self._screen.print_line(event, status)
            return
        self._screen.update(event, status)
        line = lasting_line(event, status)
        if line is not None:
            self._screen.line(f"{_clock(status)}  {line[0]}", line[1])


class _Screen(Protocol):
    def line(self, text: str, style: str) -> None:
        """Print a line that stays."""

    def print_line(self, text: str, status: RunStatus) -> None:
        """Print text that is no event, such as an address."""

    def update(self, event: Event, status: RunStatus) -> None:
        """Show what has no lasting line; a bare Event is the tick of a clock."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class _PlainScreen:
    def __init__(self, sink: Sink, logging_steps: int) -> None:
        self._sink = sink
        self._logging_steps = max(1, logging_steps)
        self._logged_at = float("-inf")

    def line(self, text: str, style: str) -> None:  # noqa: ARG002 - no colour here
        self._sink.write(text.rstrip() + "\n")

    def print_line(self, text: str, status: RunStatus) -> None:
        self.line(f"{_clock(status)}  {clean(text)}", "")

    def update(self, event: Event, status: RunStatus) -> None:
        text = ""
        if isinstance(event, events.StepDone):
            is_logged = event.step % self._logging_steps == 0 and self._is_due(event)
            if is_logged or event.step in (1, status.total_steps):
                text = ", ".join([f"step {steps_done(status)}", *figures(status)])
        elif isinstance(event, events.Progress) and event.done > 0:
            is_printed = self._is_due(event) or event.done == event.total
            text = f"{status.phase} {work_done(event)}" if is_printed else ""
        if text:
            self._logged_at = event.time
            self.line(f"{_clock(status)}  {text}", "")

    def close(self) -> None:
        pass

    def _is_due(self, event: Event) -> bool:
        # Also after the clock was set back.
        return not 0 <= event.time - self._logged_at < LINE_SECONDS


class _LiveScreen:
    def __init__(self, sink: Sink) -> None:
        from rich.console import Console
        from rich.live import Live

        self._sink = sink
        self._status = RunStatus()
        self._losses: deque[float] = deque(maxlen=SPARK_STEPS)
        self._event_at = self._drawn_at = time.monotonic()
        self._console = Console(
            file=sink,  # type: ignore[arg-type]  # what Console uses of a file, it has
            force_terminal=True,
            force_jupyter=False,
            legacy_windows=False,
            markup=False,
            emoji=False,
            highlight=False,
        )
        self._live = Live(
            console=self._console,
            get_renderable=self._panel,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def line(self, text: str, style: str) -> None:
        from rich.text import Text

        self._resize()
        # Broken between words only: a path can be copied in one piece.
        columns = max(LINE_INDENT + 11, self._console.size.width)
        indent = " " * LINE_INDENT
        wrapped = textwrap.wrap(
            text,
            columns,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        self._console.print(Text("\n".join(wrapped), style=style), soft_wrap=True)

    def print_line(self, text: str, status: RunStatus) -> None:
        self.line(f"{_clock(status)}  {clean(text)}", "")

    def update(self, event: Event, status: RunStatus) -> None:
        now = time.monotonic()
        if type(event) is not Event:
            self._event_at = now
        self._status = status
        if isinstance(event, events.StepDone):
            self._losses.append(event.loss)
        elif isinstance(event, events.Resumed):
            self._losses.clear()
        if not self._live.is_started:
            self._live.start()
        if now - self._drawn_at >= REFRESH_SECONDS:
            self._drawn_at = now
            self._resize()
            self._live.refresh()

    def close(self) -> None:
        self._live.stop()

    def _resize(self) -> None:
        from rich.console import ConsoleDimensions

        self._console.size = ConsoleDimensions(*self._sink.size())

    def _panel(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        status = self._status
        columns = self._console.size.width
        is_framed = columns >= PANEL_COLUMNS
        width = columns - 4 if is_framed else columns
        waited = time.monotonic() - self._event_at
        rows = list(panel_rows(status, list(self._losses), width, waited, self._sink.is_unicode))
        for row in rows:
            row.no_wrap, row.overflow = True, "ellipsis" if self._sink.is_unicode else "crop"
        if not is_framed:
            return Group(*rows)
        is_bad = not status.is_loss_finite or status.is_worker_down
        title = Text(shortened(one_line(status.run_name) or "lora-trainer", width - 4), "bold")
        style = "red" if is_bad else "yellow" if status.warnings else "cyan"
        return Panel(Group(*rows), title=title, title_align="left", border_style=style)


def panel_rows(
    status: RunStatus, losses: list[float], width: int, waited: float, is_unicode: bool
) -> Iterator[Text]:
    """Yield the panel's rows; `waited` is how long the last event is ago, in seconds."""
    from rich.text import Text

    separator = SEPARATOR if is_unicode else ", "
    yield _headline(status, width, waited, is_unicode)
    facts: list[str] = []
    if status.latest is not None:
        spark = sparkline(losses, is_unicode)
        yield Text(
            f"loss {number(status.latest.loss)}  {spark}", "" if status.is_loss_finite else "red"
        )
        facts = figures(status)[1:]  # the loss has its row, the time left stands above
        facts = [fact for fact in facts if not fact.endswith(" left")]
        total_epochs = status.planned("steps_per_epoch")
        of = f" of {status.total_steps / total_epochs:.3g}" if total_epochs else ""
        facts.append(f"epoch {status.latest.epoch:.2f}{of}")
        facts.append(f"grad norm {status.latest.grad_norm:.3g}")
        if status.latest.loss_scale:
            facts.append(f"loss scale {status.latest.loss_scale:g}")
    if status.best_eval is not None:
        best = status.best_eval
        facts.append(f"best eval {number(best.eval_loss)} at step {best.step}")
    if status.checkpoints:
        facts.append(f"checkpoint at step {status.checkpoints[-1].step}")
    if status.ranks:
        facts.append(f"{len(status.ranks)} processes, slowest: {status.slowest_rank}")
    if status.restarts:
        facts.append(f"restarts {len(status.restarts)}")
    facts.append(f"elapsed {duration(status.elapsed_seconds + waited)}")
    for text in flowed(facts, width, separator):
        yield Text(text)
    if status.warnings:
        count = len(status.warnings) + status.warnings_left_out
        head = "warning" if count == 1 else f"{count} warnings, the last"
        yield Text(f"{head}: {one_line(status.warnings[-1].message)}", "yellow")


def _headline(status: RunStatus, width: int, waited: float, is_unicode: bool) -> Text:
    from rich.text import Text

    done, total, tail = status.step, status.total_steps, ""
    text = Text().append(status.phase, "bold")
    if status.is_training:
        text.append(f"  step {steps_done(status)}")
        if status.eta_seconds is not None:
            tail = f"{duration(max(0.0, status.eta_seconds - waited))} left"
    else:
        text.append(f"  {one_line(status.detail)}" if status.detail else "")
        progress = status.progress
        done, total = (progress.done, progress.total) if progress else (0, 0)
        tail = work_done(progress) if progress else ""
    fraction = min(1.0, max(0.0, done / total)) if total > 0 else 0.0
    tail = SEPARATOR.join(part for part in (f"{fraction:.0%}" if total > 0 else "", tail) if part)
    tail = tail if is_unicode else tail.replace(SEPARATOR, ", ")
    columns = width - text.cell_len - len(tail) - 4
    if total > 0 and columns >= 8:
        full = round(min(columns, 60) * fraction)
        text.append("  " + ("━" if is_unicode else "#") * full, "green")
        text.append(("─" if is_unicode else "-") * (min(columns, 60) - full), "dim")
    elif not status.is_over:
        frames = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏" if is_unicode else "|/-\\"
        text.append(" " + frames[int(time.monotonic() / TICK_SECONDS) % len(frames)], "cyan")
    return text.append(f"  {tail}")


def _clock(status: RunStatus) -> str:
    return f"{duration(status.elapsed_seconds):>7}"
