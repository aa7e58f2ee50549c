"""One progress bar per epoch, or one line per epoch where there is no terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from dask.utils import format_bytes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from dask_nn.callbacks.base import Callback

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

    from dask_nn.events import Event, RunInfo
    from dask_nn.events import Progress as Report

__all__ = ["RichProgress", "describe"]

# Drawing takes time from the cores that train, so bars are drawn at most so often.
_DRAW_EVERY_S = 0.2
# Where there is no terminal, a long epoch says so often how far it is.
_LINE_EVERY_S = 60.0


def describe(values: dict[str, float]) -> str:
    """Turn the numbers of a history record into one line of text.

    Parameters
    ----------
    values : dict of str to float
        Such as ``{"loss": 0.31, "accuracy": 0.91, "samples_per_s": 2.1e5}``; ``epoch`` and
        ``seconds`` are left out.

    Returns
    -------
    str
        Such as ``"loss 0.3100  accuracy 0.9100  210,000 samples/s"``.
    """
    parts = [
        f"{name.replace('_', ' ')} {value:.4f}"
        for name, value in values.items()
        if name not in {"epoch", "seconds", "samples_per_s"}
    ]
    if "samples_per_s" in values:
        parts.append(f"{values['samples_per_s']:,.0f} samples/s")
    return "  ".join(parts)


def sentence(event: Event) -> str | None:
    """Say in one sentence what happened; None for what needs no words.

    Parameters
    ----------
    event : Event
        Of a run.
    """
    say = _SENTENCES.get(event.name)
    return say(event.details) if say is not None else None


def _recovered(details: dict[str, Any]) -> str:
    lost = ", ".join(details["lost"])
    what = f"worker {lost} lost" if lost else "the gang broke"
    return (
        f"{what} at step {details['step']:,}, going on with {_ranks(details)} after "
        f"{details['seconds']:.1f} s"
    )


def _streaming(details: dict[str, Any]) -> str:
    size, room = format_bytes(details["size_bytes"]), format_bytes(details["room_bytes"])
    why = "as asked" if details["asked"] else f"the workers have {room} to hold data"
    return f"streaming {size} in {details['blocks']:,} blocks: {why}"


def _ranks(details: dict[str, Any]) -> str:
    count = details["ranks"]
    return f"{count} rank" if count == 1 else f"{count} ranks"


def _encrypted(details: dict[str, Any]) -> str:
    between = "hosts" if details["hosts"] > 1 else "workers"
    return (
        f"gradients travel between {between} over Dask's own encrypted connections, which is "
        "slower than gloo"
    )


_SENTENCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "encrypted-exchange": _encrypted,
    "queued": lambda d: f"waiting for another training on {', '.join(d['workers'])}",
    "recovered": _recovered,
    "waiting": lambda d: f"waiting for workers: {d['able']} can run ranks, there were {d['ranks']}",
    "gave-up": lambda d: f"giving up: {d['reason']}",
    "stopping": lambda _: "stopping after the step under way; Ctrl-C again stops at once",
    "resized": lambda d: f"going on with {_ranks(d)} from step {d['step']:,}",
    "worker-refused": lambda d: f"worker {d['address']} takes no part: {d['reason']}",
    "checkpoint-failed": lambda d: f"a checkpoint could not be written: {d['reason']}",
    "checkpoint-refused": lambda d: f"the checkpoint {d['path']} is passed over: {d['reason']}",
    "saving": lambda d: f"waiting for the last checkpoint to be written to {d['path']}",
    "no-checkpoint": lambda d: f"no checkpoint in {d['path']}: beginning anew",
    "other-torch": lambda d: (
        f"the checkpoint was written with torch {d['saved']}, this is {d['now']}: bits may differ"
    ),
    "streaming": _streaming,
    "window-reduced": lambda d: (
        f"shuffling among {d['window']} blocks instead of {d['wanted']}: more do not fit a worker"
    ),
    "resumed": lambda d: f"resumed from {d['path']} at step {d['steps']:,}",
}


class RichProgress(Callback):
    """Show loss, metrics and samples per second of every epoch.

    Parameters
    ----------
    console : rich.console.Console, optional
        Where to draw; standard output by default. A console that is no terminal gets one line
        per finished epoch.
    metrics : tuple of str, default ("accuracy", "val_accuracy")
        The metrics of the history that are shown beside the loss, where a run has them.

    Notes
    -----
    Use it as a context manager, or call `close`, so that an interrupted run leaves the terminal
    as it was.
    """

    def __init__(
        self,
        console: Console | None = None,
        metrics: tuple[str, ...] = ("accuracy", "val_accuracy"),
    ) -> None:
        self._console = console or Console()
        self._shown = ("loss", *metrics, "samples_per_s")
        self._epochs = self._blocks = 0
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._epoch = 0
        self._drawn_at_s = 0.0

    def on_train_start(self, run: RunInfo) -> None:
        """Remember how much there will be."""
        self._epochs, self._blocks = run.epochs, run.num_blocks
        self._drawn_at_s = time.monotonic()

    def on_progress(self, progress: Report) -> None:
        """Move the bar of this epoch."""
        now_s = time.monotonic()
        values = {
            "loss": progress.loss,
            **progress.metrics,
            "samples_per_s": progress.samples_per_s,
        }
        read = self._read(progress)
        if not self._console.is_terminal:
            if now_s - self._drawn_at_s > _LINE_EVERY_S:
                self._drawn_at_s = now_s
                step = f"step {progress.step:,} of {progress.num_steps:,}"
                line = f"{self._title(progress.epoch)}  {step}  {describe(values)}{read}"
                self._console.print(line, highlight=False, soft_wrap=True)
            return
        if self._bar is None or self._epoch != progress.epoch:
            self._open(progress.epoch, progress.num_steps)
        elif now_s - self._drawn_at_s < _DRAW_EVERY_S:
            return
        self._drawn_at_s = now_s
        self._draw(progress.step, values, read)

    def on_epoch_end(self, record: dict[str, float]) -> None:
        """Complete the bar, or print the epoch's line."""
        epoch = int(record["epoch"])
        values = {name: record[name] for name in self._shown if name in record}
        if not self._console.is_terminal:
            self._console.print(
                f"{self._title(epoch)}  {describe(values)}", highlight=False, soft_wrap=True
            )
            return
        if self._bar is None or self._epoch != epoch:
            self._open(epoch, 1)
        bar = self._bar
        if bar is not None:
            self._draw(int(bar.tasks[0].total or 1), values)
        self.close()

    def on_event(self, event: Event) -> None:
        """Print a line for what a user wants to know: losses, resizes, failed checkpoints."""
        line = sentence(event)
        if line is not None:
            self._console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, result: Any) -> None:
        """Close what is still open."""
        self.close()

    def close(self) -> None:
        """End the open bar and give the terminal back; does nothing the second time."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _title(self, epoch: int) -> str:
        return f"epoch {epoch + 1}/{self._epochs}" if self._epochs else f"epoch {epoch + 1}"

    def _open(self, epoch: int, num_steps: int) -> None:
        self.close()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            console=self._console,
            # No drawing thread: it would wake up beside the ranks.
            auto_refresh=False,
        )
        self._bar.start()
        self._epoch = epoch
        self._task = self._bar.add_task(self._title(epoch), total=num_steps, values="")

    def _draw(self, step: int, values: dict[str, float], read: str = "") -> None:
        if self._bar is not None:
            text = describe(values) + read
            self._bar.update(self._task, completed=step, values=text, refresh=True)

    def _read(self, progress: Report) -> str:
        """Say how much of streamed data has been read."""
        if not progress.blocks:
            return ""
        return f"  {format_bytes(progress.bytes)} in {progress.blocks:,} of {self._blocks:,} blocks"
