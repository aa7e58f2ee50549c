"""The loss as a sum and a normaliser, so that uneven parts add up to PyTorch's own mean."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dask_nn.errors import ConfigurationError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Objective"]

Kind = Literal["mean_rows", "mean_normalized", "sum"]

# nn.CrossEntropyLoss and nn.NLLLoss ignore this label unless told otherwise.
_DEFAULT_IGNORE_INDEX: Final = -100
_CLASS_MODULES: Final = (nn.CrossEntropyLoss, nn.NLLLoss)
_CLASS_FUNCTIONS: Final = (F.cross_entropy, F.nll_loss)


class Objective:
    """A user's loss with what it takes to average it over a global batch in parts.

    Parameters
    ----------
    loss : callable
        ``loss(output, target)`` returning a scalar: a module, a function or a partial of one.
    weighted : bool
        Whether sample weights are given. They need the loss of every sample.
    ignored : bool, optional
        Whether a target equal to the loss's ``ignore_index`` occurs. Unless told, a loss with
        the default ``ignore_index`` of -100 is taken to meet no such label, and one with
        another ``ignore_index`` is taken to meet it.

    Attributes
    ----------
    kind : {"mean_rows", "mean_normalized", "sum"}
        ``mean_rows``: the loss of a batch is the mean over its rows, so that ``value`` times the
        number of rows adds up. ``mean_normalized``: the divisor depends on the data (class
        weights, ignored labels, sample weights), so that ``sum_and_normalizer`` is needed.
        ``sum``: values add up as they are.

    Raises
    ------
    ConfigurationError
        If ``loss`` cannot be called, or sample weights are given for a loss that returns no
        loss per sample.
    """

    def __init__(
        self, loss: Callable[..., Any], weighted: bool, *, ignored: bool | None = None
    ) -> None:
        if not callable(loss):
            raise ConfigurationError(
                f"loss must be a callable loss(output, target), got {loss!r}; "
                "pass for example torch.nn.CrossEntropyLoss()"
            )
        if isinstance(loss, type):
            raise ConfigurationError(
                f"loss must be a loss object, got the class {loss.__name__}; pass {loss.__name__}()"
            )
        self.loss = loss
        self.weighted = weighted
        self.reduction = _option(loss, "reduction")
        self._over_classes = _is_over_classes(loss)
        self._class_weight: Tensor | None = _option(loss, "weight") if self._over_classes else None
        self._ignore_index = _DEFAULT_IGNORE_INDEX
        if self._over_classes:
            self._ignore_index = _option(loss, "ignore_index")
        self._ignored = ignored
        self._per_element: Callable[..., Any] | None = None
        self.kind = self._kind()

    def with_ignored(self, occurs: bool) -> Objective:
        """Tell whether a target equal to the loss's ``ignore_index`` occurs.

        Returns
        -------
        Objective
            A new objective; ``kind`` may differ.
        """
        return Objective(self.loss, self.weighted, ignored=occurs)

    @property
    def ignore_index(self) -> int | None:
        """The label that the loss leaves out; None for losses without class labels."""
        return self._ignore_index if self._over_classes else None

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """Call the loss and check that it returns a scalar.

        Parameters
        ----------
        output : Tensor
            Shape (num_rows, ...).
        target : Tensor
            Shape (num_rows, ...) as the loss takes it.

        Returns
        -------
        Tensor
            Shape ().

        Raises
        ------
        ModelError
            If the loss returns anything else.
        """
        value = self.loss(output, target)
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the loss {_name(self.loss)} returned {type(value).__name__}, "
                "expected a scalar tensor"
            )
        if value.dim() != 0:
            raise ModelError(
                f"the loss {_name(self.loss)} returned a tensor of shape {tuple(value.shape)}, "
                "expected a scalar; average or sum it, for example with reduction='mean'"
            )
        return value

    def sum_and_normalizer(
        self, output: Tensor, target: Tensor, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sum the weighted losses, and sum what PyTorch would divide them by.

        The quotient of the sums over any parts of a batch is the mean over the whole batch.

        Parameters
        ----------
        output : Tensor
            Shape (num_rows, ...).
        target : Tensor
            Shape (num_rows, ...) as the loss takes it.
        weight : Tensor, optional
            Sample weights of shape (num_rows,).

        Returns
        -------
        tuple of Tensor
            The sum, which carries gradients, and the normaliser; both of shape ().

        Raises
        ------
        ModelError
            If the loss returns no loss per sample though it was asked to.
        """
        if self._per_element is None:
            self._per_element = _without_reduction(self.loss)
        losses = self._per_element(output, target)
        rows_of = weight if weight is not None else target
        if isinstance(rows_of, dict):
            rows_of = next(iter(rows_of.values()))
        num_rows = rows_of.shape[0]
        if not isinstance(losses, Tensor) or losses.dim() == 0 or losses.shape[0] != num_rows:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ModelError(
                f"the loss {_name(self.loss)} with reduction='none' returned {got}, "
                f"expected one loss per sample: a tensor whose first axis is {num_rows}"
            )
        losses = losses.reshape(num_rows, -1)
        if self._over_classes:
            shares = self._shares(target, losses)
            if weight is not None:
                losses = losses * weight[:, None]
                shares = shares * weight[:, None]
            return losses.sum(), shares.sum()
        rows = losses.sum(dim=1) if self.reduction == "batchmean" else losses.mean(dim=1)
        if weight is None:
            return rows.sum(), rows.new_tensor(float(num_rows))
        return (rows * weight).sum(), weight.sum().to(rows.dtype)

    def _shares(self, target: Tensor, losses: Tensor) -> Tensor:
        """Find what every element adds to PyTorch's divisor, of the shape of ``losses``."""
        if target.is_floating_point():
            return torch.ones_like(losses)
        labels = target.reshape(losses.shape)
        kept = labels != self._ignore_index
        if self._class_weight is None:
            return kept.to(losses.dtype)
        # An ignored label may lie outside the classes: look up class 0 and leave it out.
        weights = self._class_weight.to(losses.dtype)[torch.where(kept, labels, 0)]
        return torch.where(kept, weights, 0.0)

    def _kind(self) -> Kind:
        if self.weighted:
            if self.reduction == "sum":
                raise ConfigurationError(
                    f"sample weights need a loss that is a mean, got {_name(self.loss)} with "
                    "reduction='sum'; use reduction='mean'"
                )
            _without_reduction(self.loss)
            return "mean_normalized"
        if self.reduction == "sum":
            return "sum"
        if self._over_classes:
            ignores = self._ignored
            if ignores is None:
                ignores = self._ignore_index != _DEFAULT_IGNORE_INDEX
            if ignores or self._class_weight is not None:
                return "mean_normalized"
        return "mean_rows"


def _innermost(loss: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss


def _is_over_classes(loss: Callable[..., Any]) -> bool:
    innermost = _innermost(loss)
    return isinstance(innermost, _CLASS_MODULES) or innermost in _CLASS_FUNCTIONS


def _option(loss: Callable[..., Any], name: str) -> Any:
    """Read an option of a loss from its attribute, its partial's keywords or its signature."""
    if isinstance(loss, functools.partial):
        if name in loss.keywords:
            return loss.keywords[name]
        return _option(loss.func, name)
    if isinstance(loss, nn.Module):
        return getattr(loss, name, None)
    parameter = _parameters(loss).get(name)
    if parameter is None or parameter.default is inspect.Parameter.empty:
        return None
    return parameter.default


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some built-in functions have no signature
        return {}


def _without_reduction(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Find the same loss returning one value per sample or element."""
    if isinstance(loss, nn.Module):
        if hasattr(loss, "reduction"):
            copied: nn.Module = copy.copy(loss)
            setattr(copied, "reduction", "none")  # noqa: B010 - nn.Module hides it from mypy
            return copied
    elif "reduction" in _parameters(_innermost(loss)):
        return functools.partial(loss, reduction="none")
    raise ConfigurationError(
        f"sample weights need the loss of every sample, but {_name(loss)} cannot return it; pass "
        "a loss module with a `reduction` attribute (such as torch.nn.CrossEntropyLoss()) or a "
        "function that accepts the keyword reduction='none'"
    )


def _name(loss: Callable[..., Any]) -> str:
    innermost = _innermost(loss)
    return str(getattr(innermost, "__name__", type(innermost).__name__))
