"""Functions that travel as source text, to processes that may lack this package."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Shipped"]

_MAKE = "(lambda names: (exec({source!r}, names), names[{name!r}])[1])({{'__name__': {module!r}}})"


class Shipped:
    """Pickles as text that makes a function of a module anew wherever it is read.

    Neither by reference, which needs the module there, nor as byte code, which needs the same
    Python there: both may be just what is wrong.

    Parameters
    ----------
    module : module
        Imports nothing at its top that may be missing elsewhere.
    name : str
        The function.
    """

    def __init__(self, module: ModuleType, name: str) -> None:
        self._source = inspect.getsource(module)
        self._module = module.__name__
        self._name = name

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        source = _MAKE.format(source=self._source, name=self._name, module=self._module)
        return eval, (source,)
