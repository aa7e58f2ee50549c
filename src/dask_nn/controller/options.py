"""The arguments of ``train``, checked before any work starts."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from dask_nn.controller.failure_policy import Recovery
from dask_nn.data.memory import MEMORY
from dask_nn.errors import ConfigurationError, ModelError
from dask_nn.pickling import dumps
from dask_nn.training.strategies import Synchronous

if TYPE_CHECKING:
    import torch

    from dask_nn.callbacks.base import Callback
    from dask_nn.checkpoints.options import Checkpoint
    from dask_nn.data.memory import Memory
    from dask_nn.data.plan import Shuffle
    from dask_nn.metrics.names import Metrics

__all__ = ["Engine", "Options"]

Engine = Literal["spmd", "graph"]

ENGINES = ("spmd", "graph")
DEVICES = ("cpu", "cuda")
SHUFFLES: dict[Any, Shuffle] = {True: "blocks", False: "none", "within": "within"}
EVERY = ("epoch", "step")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to train; see :func:`dask_nn.train` for every field."""

    model: nn.Module | Callable[[], nn.Module]
    loss: Callable[..., torch.Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    epochs: int = 1
    batch_size: int = 32
    metrics: Metrics | Mapping[str, Metrics] = ()
    strategy: Synchronous = field(default_factory=Synchronous)
    engine: Engine = "spmd"
    memory: Memory = "auto"
    features: Sequence[str] | None = None
    batch_dim: str | None = None
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    lr_scheduler: Callable[..., Any] | None = None
    lr_scheduler_every: str = "epoch"
    clip_grad_norm: float | None = None
    seed: int = 0
    shuffle: bool | str = True
    window: int | None = None
    callbacks: Sequence[Callback] = ()
    device: str = "cpu"
    checkpoint: Checkpoint | None = None
    resume: bool = False
    recovery: Recovery = field(default_factory=Recovery)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            _check_integer(name, getattr(self, name), at_least=1)
        _check_integer("seed", self.seed, at_least=0)
        if self.window is not None:
            _check_integer("window", self.window, at_least=1)
        _check_choice("engine", self.engine, ENGINES)
        _check_choice("memory", self.memory, MEMORY)
        _check_choice("device", self.device, DEVICES)
        _check_choice("shuffle", self.shuffle, tuple(SHUFFLES))
        _check_choice("lr_scheduler_every", self.lr_scheduler_every, EVERY)
        clip = self.clip_grad_norm
        if clip is not None and not (isinstance(clip, numbers.Real) and clip > 0):
            message = f"clip_grad_norm must be a positive number or None, got {clip!r}"
            raise ConfigurationError(message)
        if not isinstance(self.callbacks, Sequence):
            message = f"callbacks must be a sequence of Callback, got {self.callbacks!r}"
            raise ConfigurationError(message)
        if not isinstance(self.strategy, Synchronous):
            message = f"strategy must be a Synchronous(...), got {self.strategy!r}"
            raise ConfigurationError(message)
        if not isinstance(self.recovery, Recovery):
            message = f"recovery must be a Recovery(...), got {self.recovery!r}"
            raise ConfigurationError(message)
        if not isinstance(self.resume, bool):
            message = f"resume must be True or False, got {self.resume!r}"
            raise ConfigurationError(message)
        if self.resume and self.checkpoint is None:
            message = "resume=True needs checkpoint=, the path or URL of the checkpoints"
            raise ConfigurationError(message)
        if self.engine == "graph" and self.device != "cpu":
            message = (
                "engine='graph' computes on the CPU alone; use engine='spmd' for GPUs, or "
                "device='cpu'"
            )
            raise ConfigurationError(message)
        self._check_callables()
        self._check_divisible()

    def _check_callables(self) -> None:
        for name in ("loss", "optimizer"):
            if not callable(getattr(self, name)):
                message = f"{name} must be callable, got {getattr(self, name)!r}"
                raise ConfigurationError(message)
        for name in ("transform", "lr_scheduler"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                message = f"{name} must be callable or None, got {getattr(self, name)!r}"
                raise ConfigurationError(message)

    def _check_divisible(self) -> None:
        shards = self.strategy.shards
        if shards is not None and self.batch_size % shards:
            message = (
                f"batch_size must be divisible by the number of shards, got batch_size="
                f"{self.batch_size} and shards={shards}"
            )
            raise ConfigurationError(message)

    def with_layout_of(self, configuration: Mapping[str, Any]) -> Options:
        """Take shards and threads from a saved run where they were left open."""
        strategy = self.strategy
        shards = configuration["shards"] if strategy.shards is None else strategy.shards
        threads = strategy.threads_per_rank
        if threads is None:
            threads = configuration["threads_per_rank"]
        return replace(self, strategy=replace(strategy, shards=shards, threads_per_rank=threads))

    @property
    def plan_shuffle(self) -> Shuffle:
        """The plan's name for the wanted shuffling."""
        return SHUFFLES[self.shuffle]

    def check_pickles(self, model: nn.Module) -> None:
        """Check that everything that goes to the workers can.

        Raises
        ------
        ModelError
            Names the attribute that cannot be pickled.
        """
        dumps(model, "module")
        for name in ("loss", "optimizer", "transform", "lr_scheduler"):
            value = getattr(self, name)
            if value is not None:
                dumps(value, name)

    def make_model(self) -> nn.Module:
        """Give the module, or make it where a class or function was given.

        Raises
        ------
        ModelError
            If there is no module.
        """
        model = self.model
        if not isinstance(model, nn.Module) and callable(model):
            import torch

            from dask_nn.data.randomness import own_generator

            # Ranks of another run may be threads of this process.
            with own_generator():
                torch.manual_seed(self.seed)
                model = model()
        if not isinstance(model, nn.Module):
            message = f"model must be a torch.nn.Module, got {type(model).__name__}"
            raise ModelError(message)
        return model


def check_sizes(num_samples: int, *, batch_size: int, shards: int) -> None:
    """Check that there is enough data for a batch and for every shard.

    Raises
    ------
    ConfigurationError
        If there is not.
    """
    if shards > num_samples:
        message = f"there are more shards ({shards}) than samples ({num_samples}); use fewer shards"
        raise ConfigurationError(message)
    if batch_size > num_samples:
        message = (
            f"batch_size is {batch_size}, but there are only {num_samples} samples; "
            f"use batch_size={num_samples // shards * shards} or less"
        )
        raise ConfigurationError(message)


def _check_integer(name: str, value: Any, *, at_least: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        message = f"{name} must be an integer, got {value!r}"
        raise ConfigurationError(message)
    if value < at_least:
        wanted = "positive" if at_least == 1 else f"at least {at_least}"
        message = f"{name} must be {wanted}, got {value}"
        raise ConfigurationError(message)


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices or (value in {0, 1} and not isinstance(value, bool)):
        message = f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        raise ConfigurationError(message)
