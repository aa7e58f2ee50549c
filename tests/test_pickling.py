from __future__ import annotations

import functools
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
from torch import nn

from dask_nn.errors import ModelError
from dask_nn.pickling import dumps


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.lock = threading.Lock()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 1)
        self.encoder = Encoder()


def closure() -> Any:
    lock = threading.Lock()
    return lambda x: lock and x


@pytest.mark.parametrize(
    ("obj", "path"),
    [
        (Net(), "module.encoder.lock is"),
        (nn.Sequential(nn.Linear(1, 1), Encoder()), "module.1.lock is"),
        (functools.partial(max, key=threading.Lock()), r"module.keywords\['key'\] is"),
        (closure(), r"module \(variable lock\) is"),
        ({"a": [1, threading.Lock()]}, r"module\['a'\]\[1\] is"),
        (Net().encoder.lock.acquire, "module"),
    ],
)
def test_the_attribute_that_cannot_be_pickled_is_named(obj: Any, path: str) -> None:
    with pytest.raises(ModelError, match=path):
        dumps(obj, "module")


def test_what_can_be_pickled_comes_back() -> None:
    factor = 3
    assert pickle.loads(dumps(lambda x: factor * x, "transform"))(2) == 6


def test_needs_no_torch() -> None:
    code = "import sys, dask_nn.pickling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
