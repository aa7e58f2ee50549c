"""Code of the user's that a job file names: imported here, and sent along to the workers."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

__all__ = ["import_module"]


def import_module(name: str, folder: Path) -> ModuleType:
    """Import a module, from a job file's folder too, and let what lies there travel by value.

    Workers elsewhere have no such files. Modules that are installed are imported there by name.

    Parameters
    ----------
    name : str
        Such as ``"package.module"``.
    folder : Path
        Of the job file.

    Raises
    ------
    ImportError
        If there is no such module, or its own imports fail.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    module = importlib.import_module(name)
    if _lies_in(name, folder):
        import cloudpickle

        # With all that it imports from there.
        for other, loaded in list(sys.modules.items()):
            if _lies_in(other, folder):
                cloudpickle.register_pickle_by_value(loaded)
    return module


def _lies_in(name: str, folder: Path) -> bool:
    """Tell whether a module's package, or the module itself, is directly in a folder."""
    top = sys.modules.get(name.partition(".")[0])
    places = [getattr(top, "__file__", None), *getattr(top, "__path__", [])]
    expected = {str(folder / f"{name.partition('.')[0]}.py"), str(folder / name.partition(".")[0])}
    return any(place in expected for place in places)
