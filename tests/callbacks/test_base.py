from __future__ import annotations

from dask_nn.callbacks.base import Callback


def test_hooks_do_nothing_unless_overridden() -> None:
    callback = Callback()
    for hook in (callback.on_train_start, callback.on_progress, callback.on_epoch_end):
        hook(None)
    callback.on_train_end(None)
