"""Whether directives of a batch job ask for a GPU, in the words of each batch system."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["asks_for_gpu", "with_slurm_gpu"]

# Parts of a GPU (mps, shard) are asked for in its place, never beside it.
_SLURM_GRES = re.compile(r"(?:^|[,:/])(?:gpu|mps|shard)(?=[:=,]|$)")
_SLURM_COUNTS = ("-G", "--gpus", "--gpus-per-node", "--gpus-per-socket", "--gpus-per-task")
_SLURM_LISTS = ("--gres", "--tres-per-task")
_PBS = re.compile(r"(?:^|[:,+])n?gpus=")
_LSF_USAGE = re.compile(r"rusage\[[^\]]*\bn?gpus?\w*=")
_SGE = re.compile(r"(?:^|,)n?gpus?(?=[=,]|$)")
_OAR = re.compile(r"(?:^|[/+,])n?gpus?\w*=")
# Properties that nodes must have, inside of OAR's resources.
_OAR_PROPERTIES = re.compile(r"\{[^}]*\}\s*")


def asks_for_gpu(
    kind: str, directives: Iterable[str] | Mapping[str, object], resource_spec: str = ""
) -> bool:
    """Tell whether a job asks for a GPU; a queue or a constraint of that name does not.

    Parameters
    ----------
    kind : str
        The batch system.
    directives : iterable of str or mapping
        Lines as they follow ``#SBATCH`` and the like; for HTCondor a mapping.
    resource_spec : str, default ""
        What dask-jobqueue puts behind ``-l``.

    Examples
    --------
    >>> asks_for_gpu("slurm", ["--exclusive", "--gres=gpu:a100:1"])
    True
    >>> asks_for_gpu("slurm", ["-C gpu", "--gres=tmpfs:20G"])
    False
    """
    if kind == "htcondor":
        return any(
            re.sub(r"^(?:\+|my\.)|_", "", name.lower()) == "requestgpus" for name in directives
        )
    lines = list(directives)
    if kind == "slurm":
        return any(True for _ in _values(lines, *_SLURM_COUNTS)) or _found(
            _SLURM_GRES, _values(lines, *_SLURM_LISTS)
        )
    if kind == "lsf":
        return any(True for _ in _values(lines, "-gpu")) or _found(_LSF_USAGE, _values(lines, "-R"))
    resources = [resource_spec, *_values(lines, "-l", "--resource")]
    if kind == "oar":
        resources = [_OAR_PROPERTIES.sub("", resource) for resource in resources]
    return _found({"pbs": _PBS, "sge": _SGE, "oar": _OAR}[kind], resources)


def with_slurm_gpu(directives: Iterable[str]) -> list[str]:
    """Add a GPU to directives of Slurm, of which the last ``--gres`` alone counts.

    Examples
    --------
    >>> with_slurm_gpu(["--gres=tmpfs:20G", "--exclusive"])
    ['--gres=tmpfs:20G', '--exclusive', '--gres=tmpfs:20G,gpu:1']
    """
    lines = list(directives)
    others = list(_values(lines, "--gres"))[-1:]
    return [*lines, f"--gres={','.join([*others, 'gpu:1'])}"]


def _found(pattern: re.Pattern[str], values: Iterable[str]) -> bool:
    return any(pattern.search(value) for value in values)


def _values(lines: Iterable[str], *options: str) -> Iterator[str]:
    """Give the values of options: of ``-l x``, ``-lx``, ``--gres x`` and ``--gres=x``."""
    for line in lines:
        words = _words(line)
        for word, following in zip(words, [*words[1:], ""], strict=True):
            name, equals, value = word.partition("=")
            if word in options:
                yield following
            elif equals and name in options and name.startswith("--"):
                yield value
            elif word[:2] in options:
                yield word[2:]


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()
