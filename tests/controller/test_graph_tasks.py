from __future__ import annotations

import threading
import time
from types import SimpleNamespace

from dask_nn.controller import graph_tasks
from dask_nn.data import randomness


def test_a_task_that_waits_for_the_random_generator_is_not_at_work(monkeypatch):
    """It would be taken for one that hangs, and its worker given up."""
    monkeypatch.setattr(randomness, "LOOK_S", 0.01)
    bench = SimpleNamespace(spec=SimpleNamespace(threads_per_rank=1, bitwise=False))
    monkeypatch.setattr(graph_tasks, "_find_bench", lambda *_: bench)
    done = threading.Event()

    def task() -> None:
        with graph_tasks._at_bench(b"", "run", step=0):
            randomness.SeededRandomness(7).run_once(lambda: None, "key")
        done.set()

    with randomness.own_generator():
        waiting = threading.Thread(target=task)
        waiting.start()
        deadline = time.monotonic() + 1.0
        longest = 0.0
        while time.monotonic() < deadline:
            longest = max(longest, graph_tasks.at_work("run")[0])
            time.sleep(0.01)
    assert done.wait(5)
    waiting.join()
    assert longest < 0.5
    assert graph_tasks.at_work("run")[1] < 0.5
    graph_tasks.forget_benches("run")
