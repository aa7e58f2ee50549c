"""Which fields of a batch are inputs, which are targets, and which are weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Grouping", "call_model", "group_of", "map_inputs"]


def group_of(name: str) -> str:
    """Give the input that a field belongs to: ``"X"`` of ``"X.image"``."""
    return name.split(".", 1)[0]


@dataclass(frozen=True)
class Grouping:
    """Puts the fields of a batch together as the user gave them.

    Parameters
    ----------
    x, y : int or dict of str to int
        Positions of the fields: one, or one for each member of a dictionary.
    weight : int or None
        Position of the sample weights.
    """

    x: int | dict[str, int]
    y: int | dict[str, int]
    weight: int | None = None

    @classmethod
    def of(cls, names: Sequence[str]) -> Grouping:
        """Read the names of fields, such as ``"X.image"``, ``"X.table"``, ``"y"``."""
        return cls(_places(names, "X"), _places(names, "y"), _weight(names))

    @property
    def single_target(self) -> bool:
        """Whether y is one array."""
        return isinstance(self.y, int)

    def inputs(self, batch: Sequence[Any]) -> Any:
        """Give X of a batch, an array or a dictionary."""
        return _take(batch, self.x)

    def targets(self, batch: Sequence[Any]) -> Any:
        """Give y of a batch, an array or a dictionary."""
        return _take(batch, self.y)

    def weights(self, batch: Sequence[Any]) -> Any:
        """Give the sample weights of a batch, or None."""
        return None if self.weight is None else batch[self.weight]


def map_inputs(function: Callable[[Any], Any], inputs: Any) -> Any:
    """Apply a function to an array, or to every member of a dictionary."""
    if isinstance(inputs, dict):
        return {key: function(value) for key, value in inputs.items()}
    return function(inputs)


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a module: with one tensor, or with a dictionary's members as keyword arguments."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def _take(batch: Sequence[Any], places: int | dict[str, int]) -> Any:
    if isinstance(places, int):
        return batch[places]
    return {key: batch[place] for key, place in places.items()}


def _places(names: Sequence[str], group: str) -> int | dict[str, int]:
    found = {name: place for place, name in enumerate(names) if group_of(name) == group}
    if group in found:
        return found[group]
    return {name.split(".", 1)[1]: place for name, place in found.items()}


def _weight(names: Sequence[str]) -> int | None:
    return names.index("sample_weight") if "sample_weight" in names else None
