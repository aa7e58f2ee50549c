"""``job.toml``: a whole training described in one file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask_nn.cli.job_keys import OPEN_SECTIONS, REQUIRED, SECTIONS, TYPES
from dask_nn.cli.user_code import import_module
from dask_nn.clusters.known_names import nearest
from dask_nn.errors import ConfigurationError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import nn

__all__ = ["JobFile", "read_job"]


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """The tables of a job file, checked for unknown and missing keys.

    Parameters
    ----------
    path : Path
        Where it was read.
    data, model, loss, optimizer, schedule, training, cluster, recovery, checkpoint, output : dict
        Its tables.
    """

    path: Path
    data: dict[str, Any]
    model: dict[str, Any]
    loss: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    cluster: dict[str, Any] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    output: dict[str, Any] = field(default_factory=dict)

    def place(self, path: str) -> str:
        """Give a path or URL relative to the file's own folder."""
        if "://" in path:
            return path
        return str(self.path.parent / Path(path).expanduser())

    def data_url(self, url: str) -> str:
        """Give a data URL whose path is relative to the file's own folder."""
        kind, colon, rest = url.partition(":")
        return f"{kind}:{self.place(rest)}" if colon and "://" not in rest else url

    def make_model(self) -> Callable[[], Any]:
        """Give what makes the module."""
        name = self.model["module"]
        make = self.imported("model", name)
        arguments = self._table(self.model.get("arguments", {}), "model.arguments")

        def made() -> Any:
            try:
                return make(**arguments)
            except Exception as error:
                message = f"{self.path}: [model] {name} cannot be made: {error}"
                raise ModelError(message) from error

        return made

    def transform(self) -> Callable[..., Any] | None:
        """Give the function that is applied to batches of X."""
        name = self.model.get("transform")
        return None if name is None else self.imported("model", name)

    def make_loss(self) -> Any:
        """Give the loss."""
        options = dict(self.loss)
        found = self.imported("loss", options.pop("name"), home="torch.nn")
        return (
            self.made("loss", partial(found, **options))
            if isinstance(found, type)
            else (partial(found, **options) if options else found)
        )

    def make_optimizer(self) -> Callable[..., Any]:
        """Give what makes the optimizer from parameters."""
        options = dict(self.optimizer)
        return partial(
            self.imported("optimizer", options.pop("name"), home="torch.optim"), **options
        )

    def make_schedule(self) -> tuple[Callable[..., Any] | None, str]:
        """Give what makes the learning-rate scheduler, and when it is stepped."""
        if not self.schedule:
            return None, "epoch"
        options = dict(self.schedule)
        if "name" not in options:
            raise self._error("schedule", 'needs name, such as "StepLR"')
        every = options.pop("every", "epoch")
        home = "torch.optim.lr_scheduler"
        return partial(self.imported("schedule", options.pop("name"), home=home), **options), every

    def check_optimizer(self, model: nn.Module) -> None:
        """Make the optimizer and the schedule of a model once, to see whether their arguments fit.

        Parameters
        ----------
        model : nn.Module
            One more of those that `make_model` makes.

        Raises
        ------
        ConfigurationError
            If they do not.
        """
        from torch.nn.parameter import is_lazy

        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters or any(map(is_lazy, parameters)):
            return  # train says that there are none, or learns their shapes first
        optimizer = self.made("optimizer", partial(self.make_optimizer(), parameters))
        make_schedule, _ = self.make_schedule()
        if make_schedule is not None:
            self.made("schedule", partial(make_schedule, optimizer))

    def made(self, section: str, make: Callable[[], Any]) -> Any:
        """Make what a table describes.

        Raises
        ------
        ConfigurationError
            If it cannot be made.
        """
        try:
            return make()
        except (TypeError, ValueError) as error:
            name = getattr(self, section).get("name")
            raise self._error(section, f"{name}: {error}" if name else str(error)) from error

    def imported(self, section: str, name: Any, *, home: str | None = None) -> Any:
        """Import something by its name.

        Raises
        ------
        ConfigurationError
            If it does not exist; with the nearest name that does.
        """
        if not isinstance(name, str):
            raise self._error(section, f"expected a name, got {name!r}")
        module_name, colon, attribute = name.partition(":")
        if not colon:
            if home is None:
                raise self._error(section, f'{name!r} must be like "package.module:Name"')
            module_name, attribute = home, name
        module = self._module(section, module_name)
        if not hasattr(module, attribute):
            public = [known for known in dir(module) if known[:1] != "_"]
            hint = nearest(attribute, public, listed=len(public) < 20)
            raise self._error(section, f"{module_name} has no {attribute!r}{hint}")
        found = getattr(module, attribute)
        if not callable(found):
            raise self._error(section, f"{name} is a {type(found).__name__}, expected a callable")
        return found

    def _module(self, section: str, name: str) -> Any:
        try:
            return import_module(name, self.path.parent)
        except ImportError as error:
            raise self._error(section, f"{name} cannot be imported: {error}") from error

    def _table(self, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._error(where, f"expected a table, got {value!r}")
        return value

    def _error(self, section: str, text: str) -> ConfigurationError:
        return ConfigurationError(f"{self.path}: [{section}] {text}")


def read_job(path: Path) -> JobFile:
    """Read a job file.

    Raises
    ------
    ConfigurationError
        If it does not exist, is no TOML, or has keys that are unknown or missing.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"{path} cannot be read: {error.strerror or error}"
        raise ConfigurationError(message) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        message = f"{path} is no TOML file: {error}"
        raise ConfigurationError(message) from error
    known = [each.name for each in fields(JobFile) if each.name != "path"]
    _check_keys(path, "", tables, known)
    for section, table in tables.items():
        if not isinstance(table, dict):
            message = f"{path}: {section} must be a table, written [{section}]"
            raise ConfigurationError(message)
        if section not in OPEN_SECTIONS:
            _check_keys(path, section, table, SECTIONS[section])
        _check_types(path, section, table)
    for section, keys in REQUIRED.items():
        for key in keys:
            if key not in tables.get(section, {}):
                message = (
                    f"{path}: [{section}] needs {key}; dask-nn train --example FILE writes a "
                    "file with everything"
                )
                raise ConfigurationError(message)
    return JobFile(path=path.absolute(), **tables)


def _check_keys(path: Path, section: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    known = list(known)
    for key in table:
        if key not in known:
            where = f"[{section}] " if section else ""
            what = "key" if section else "table"
            message = f"{path}: {where}unknown {what} {key!r}{nearest(key, known)}"
            raise ConfigurationError(message)


def _check_types(path: Path, section: str, table: Mapping[str, Any]) -> None:
    for key, types in TYPES.get(section, {}).items():
        if key in table and not isinstance(table[key], types):
            expected = " or ".join(_TOML_NAMES[one] for one in types)
            message = f"{path}: [{section}] {key} must be {expected}, got {table[key]!r}"
            raise ConfigurationError(message)


_TOML_NAMES: dict[Any, str] = {str: "text", list: "an array", dict: "a table"}
