"""What a run gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dask_nn.checkpoints.serialization import weights_sha256

if TYPE_CHECKING:
    from torch import nn

    from dask_nn.events import Event, RunInfo

__all__ = ["TrainingResult"]


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A trained model and the story of its training.

    Parameters
    ----------
    model : torch.nn.Module
        A new module on the CPU, in evaluation mode; the one given to ``train`` is untouched.
    history : list of dict
        One dict for each finished epoch: ``epoch`` (from 0), ``loss``, each metric, ``val_loss``
        and ``val_<metric>`` where there is validation data, ``samples_per_s``, ``seconds``.
    run : RunInfo
        How the run was laid out.
    start_s : float
        Seconds from the call of ``train`` to the first step.
    steps : int
        Steps completed.
    bitwise : bool
        Whether all ranks proved to compute the same bits when the gang formed.
    optimizer_state : dict
        The optimizer's state dict.
    events : list of Event
        What happened.
    """

    model: nn.Module
    history: list[dict[str, float]]
    run: RunInfo
    start_s: float
    steps: int
    bitwise: bool = True
    optimizer_state: dict[str, Any] = field(default_factory=dict, repr=False)
    events: list[Event] = field(default_factory=list, repr=False)

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256, in hex, over the raw bytes of the state dict's tensors in order."""
        return weights_sha256(self.model.state_dict())

    def summary(self) -> str:
        """Describe the run in a few lines of text."""
        run = self.run
        lines = [
            (
                f"{type(self.model).__name__}: {len(self.history)} of {run.epochs} epochs, "
                f"{self.steps} steps of {run.batch_size} samples"
            ),
            (
                f"engine {run.engine}, {run.strategy}: {run.shards} shards on {run.world_size} "
                f"rank(s) of {run.threads_per_rank} thread(s), collective {run.collective}, "
                f"{run.num_workers} worker(s); first step after {self.start_s:.2f} s"
            ),
        ]
        if self.history:
            names = [name for name in self.history[0] if name != "epoch"]
            lines.append("  ".join(["epoch", *(f"{name:>13}" for name in names)]))
            lines += [
                "  ".join(
                    [
                        f"{int(record['epoch']) + 1:>5}",
                        *(f"{record[name]:>13.6g}" for name in names),
                    ]
                )
                for record in self.history
            ]
        lines.append(f"weights sha256 {self.weights_sha256}")
        return "\n".join(lines)
