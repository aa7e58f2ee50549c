from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from dask_nn.callbacks import progress as module
from dask_nn.callbacks.progress import RichProgress, describe
from dask_nn.events import Progress, RunInfo

RUN = RunInfo(
    engine="spmd",
    strategy="synchronous",
    num_workers=2,
    world_size=2,
    shards=2,
    threads_per_rank=1,
    collective="shared_memory",
    num_samples=1280,
    num_steps=10,
    epochs=2,
    batch_size=128,
)
RECORD = {
    "epoch": 0,
    "loss": 0.31,
    "accuracy": 0.91,
    "val_loss": 0.4,
    "val_accuracy": 0.9,
    "samples_per_s": 210_000.0,
    "seconds": 0.3,
}


def progress(epoch: int, step: int) -> Progress:
    return Progress(
        epoch=epoch,
        step=step,
        num_steps=10,
        loss=0.5,
        metrics={"accuracy": 0.8},
        samples_per_s=1000.0,
    )


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_numbers_are_described_in_one_line() -> None:
    values = {"epoch": 0, "loss": 0.31, "val_accuracy": 0.9, "samples_per_s": 2.1e5, "seconds": 1}
    assert describe(values) == "loss 0.3100  val accuracy 0.9000  210,000 samples/s"


def test_streamed_data_shows_what_was_read() -> None:
    shown = console(terminal=True)
    with RichProgress(shown) as bar:
        bar.on_train_start(replace(RUN, num_blocks=1200, streamed=True))
        bar.on_progress(replace(progress(0, 3), blocks=40, bytes=5 << 20))
    assert "5.00 MiB in 40 of 1,200 blocks" in text(shown)


def test_without_a_terminal_a_long_epoch_says_how_far_it_is(monkeypatch) -> None:
    monkeypatch.setattr(module, "_LINE_EVERY_S", 0.0)
    shown = console(terminal=False)
    with RichProgress(shown) as lines:
        lines.on_train_start(replace(RUN, num_blocks=12, streamed=True))
        lines.on_progress(replace(progress(0, 3), blocks=4, bytes=5 << 20))
    assert text(shown) == (
        "epoch 1/2  step 3 of 10  loss 0.5000  accuracy 0.8000  1,000 samples/s  5.00 MiB in 4 of "
        "12 blocks\n"
    )


def test_without_a_terminal_each_epoch_is_one_line() -> None:
    out = console(terminal=False)
    with RichProgress(out) as bar:
        bar.on_train_start(RUN)
        bar.on_progress(progress(0, 5))
        bar.on_epoch_end(RECORD)
        bar.on_train_end(None)
    assert text(out) == (
        "epoch 1/2  loss 0.3100  accuracy 0.9100  val accuracy 0.9000  210,000 samples/s\n"
    )


def test_on_a_terminal_each_epoch_has_a_bar_that_ends_full() -> None:
    out = console(terminal=True)
    with RichProgress(out) as bar:
        bar.on_train_start(RUN)
        for epoch in range(2):
            bar.on_progress(progress(epoch, 3))
            bar.on_epoch_end({**RECORD, "epoch": epoch})
        bar.on_train_end(None)
    shown = text(out)
    assert "epoch 1/2" in shown
    assert "epoch 2/2" in shown
    assert shown.count("10/10") >= 2
    assert "loss 0.5000  accuracy 0.8000  1,000 samples/s" in shown


def test_an_epoch_too_short_for_any_report_still_has_its_bar() -> None:
    out = console(terminal=True)
    with RichProgress(out) as bar:
        bar.on_train_start(RUN)
        bar.on_epoch_end(RECORD)
    assert "loss 0.3100" in text(out)


def test_an_interrupted_run_gets_its_cursor_back() -> None:
    out = console(terminal=True)
    with pytest.raises(KeyboardInterrupt), RichProgress(out) as bar:  # noqa: PT012
        bar.on_train_start(RUN)
        bar.on_progress(progress(0, 3))
        raise KeyboardInterrupt
    shown = text(out)
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
