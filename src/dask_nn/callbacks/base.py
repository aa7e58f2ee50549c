"""The hooks through which a run tells how it goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from dask_nn.events import Event, Progress, RunInfo

__all__ = ["Callback"]


class Callback:
    """Watch a run from the client; every hook does nothing unless overridden.

    Hooks run in the client's process, one at a time. They see plain values, never the gang's own
    state, and cannot change what is trained.
    """

    def on_train_start(self, run: RunInfo) -> None:
        """Take note that all ranks are ready and the first step begins."""

    def on_progress(self, progress: Progress) -> None:
        """Take note of where the epoch stands; called at most a few times per second."""

    def on_epoch_end(self, record: dict[str, float]) -> None:
        """Take note of a finished epoch; `record` is its entry in the history."""

    def on_event(self, event: Event) -> None:
        """Take note of a failure, a decision, a resize, a checkpoint, or an epoch's end."""

    def on_train_end(self, result: Any) -> None:
        """Take note of the result, which is what ``train`` returns."""
