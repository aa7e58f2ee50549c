"""Blocks that are computed when their window comes, and released after use."""

from __future__ import annotations

import pickle
import uuid
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, batched
from typing import TYPE_CHECKING, Any

import cloudpickle
import dask
from dask.delayed import Delayed
from dask.sizeof import sizeof
from distributed import Future

from dask_nn.data.lengths import check_rows
from dask_nn.data.problem import Problem, this_worker
from dask_nn.data.reader import with_retries
from dask_nn.data.recipes import Literal, Recipe, cook
from dask_nn.data.sending import gather, send

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    import numpy as np
    from distributed import Client

    type Array = np.ndarray[Any, Any]

__all__ = ["Stream", "Surveyor", "needed_keys"]

# A survey of many blocks is made by so many tasks for each thread of the cluster.
TASKS_PER_THREAD = 4


@dataclass(frozen=True, kw_only=True)
class Stream:
    """All that a worker needs to make any block of a data set.

    Parameters
    ----------
    recipes : tuple of Recipe
        For each block how its streamed fields are computed.
    names : tuple of str
        Of all fields, by position.
    places : tuple of int
        The positions of the streamed fields, in the order in which a recipe gives them.
    kept : dict of int to ndarray
        Whole columns of all other fields, which are small, by position.
    lengths : tuple of int
        Rows of each block.
    shared : tuple
        Keys of what many recipes need.
    values : dict
        The values of `shared`, where this process computed them.
    finite : frozenset of int
        Fields, by position, in which no value is missing or infinite.
    numbers : tuple of int, optional
        The numbers of the blocks, where these are some of those of a data set.
    """

    recipes: tuple[Recipe, ...]
    names: tuple[str, ...]
    places: tuple[int, ...]
    kept: dict[int, Array]
    lengths: tuple[int, ...]
    shared: tuple[Any, ...] = ()
    values: dict[Any, Any] = field(default_factory=dict)
    finite: frozenset[int] = frozenset()
    numbers: tuple[int, ...] | None = None

    @property
    def starts(self) -> list[int]:
        """The first row of each block, counted over all of them."""
        return list(accumulate(self.lengths, initial=0))

    @property
    def computed(self) -> str:
        """How errors call the fields that are computed together."""
        return " and ".join(self.names[place] for place in self.places)

    def one(self, block: int) -> Stream:
        """Give a stream of one block alone."""
        start = self.starts[block]
        rows = slice(start, start + self.lengths[block])
        return replace(
            self,
            recipes=(self.recipes[block],),
            lengths=(self.lengths[block],),
            numbers=(block,),
            shared=self.recipes[block].shared,
            kept={place: column[rows] for place, column in self.kept.items()},
        )

    def compute(self, block: int, start: int, shared: Mapping[Any, Any]) -> tuple[Array, ...]:
        """Make one block, in this thread.

        Parameters
        ----------
        block : int
            Its number.
        start : int
            Its first row, counted over all blocks.
        shared : mapping
            The values of `shared`.

        Raises
        ------
        DataError
            If it has another length than was said.
        """
        cooked = cook(self.recipes[block], shared) if self.places else ()
        columns = dict(zip(self.places, cooked, strict=True))
        number = block if self.numbers is None else self.numbers[block]
        check_rows(number, cooked, self.lengths[block], of=[self.names[p] for p in self.places])
        rows = slice(start, start + self.lengths[block])
        columns |= {place: column[rows] for place, column in self.kept.items()}
        return tuple(columns[place] for place in sorted(columns))


class Surveyor:
    """Looks at blocks before training, where the data lies: many blocks in few tasks.

    Parameters
    ----------
    client : Client or None
        Of the cluster; this process if None.
    """

    def __init__(self, client: Client | None) -> None:
        self._client = client
        self.keys: tuple[Any, ...] = ()
        self.values: dict[Any, Any] = {}
        self.futures: list[Any] = []
        self.literals: dict[Any, Any] = {}
        self._measured: dict[Any, Any] = {}

    @classmethod
    def of(cls, stream: Stream, futures: Sequence[Any], client: Client | None) -> Surveyor:
        """Look at the blocks of a stream whose shared parts are there already."""
        surveyor = cls(client)
        surveyor.keys, surveyor.values = stream.shared, dict(stream.values)
        surveyor.futures = list(futures)
        return surveyor

    def sizes(self, parts: Sequence[Delayed]) -> list[int]:
        """Compute some values, on the cluster if there is one, and tell their sizes in bytes."""
        if self._client is None:
            found = dict(zip([p.key for p in parts], dask.compute(*parts), strict=True))
            self._measured |= found
            return [sizeof(found[part.key]) for part in parts]
        futures = self._client.compute(list(parts))
        # Held until it is known what is shared: none of it is computed twice.
        self._measured |= {part.key: future for part, future in zip(parts, futures, strict=True)}
        return gather(self._client, self._client.map(sizeof, futures, pure=False))

    def share(self, shared: Sequence[Delayed | Future[Any] | Literal]) -> None:
        """Have what many blocks need computed or sent, once."""
        self.keys = tuple(part.key for part in shared)
        self.literals = {part.key: part.value for part in shared if isinstance(part, Literal)}
        lazy = [part for part in shared if isinstance(part, Delayed)]
        if self._client is None:
            missing = [part for part in lazy if part.key not in self._measured]
            self.values = {part.key: self._measured.get(part.key) for part in lazy} | dict(
                zip([part.key for part in missing], dask.compute(*missing), strict=True)
            )
            self.values |= self.literals
        else:
            futures = {part.key: part for part in shared if isinstance(part, Future)}
            futures |= dict(
                zip([part.key for part in lazy], self._client.compute(lazy), strict=True)
            )
            if self.literals:
                futures |= send(self._client, self.literals, broadcast=True)
            self.futures = [futures[key] for key in self.keys]
        self._measured = {}

    def keep(self, needed: AbstractSet[Any]) -> None:
        """Release shared parts that nothing needs any more."""
        kept = [place for place, key in enumerate(self.keys) if key in needed]
        self.keys = tuple(self.keys[place] for place in kept)
        self.values = {key: self.values[key] for key in self.keys if key in self.values}
        self.literals = {key: self.literals[key] for key in self.keys if key in self.literals}
        self.futures = [self.futures[place] for place in kept] if self.futures else []

    def look(
        self, function: Callable[[tuple[Array, ...]], Any], recipes: Sequence[Recipe], what: str
    ) -> list[Any]:
        """Apply a function to every block; what it returns comes to this process.

        Raises
        ------
        DataError
            If a block cannot be computed; names it, its worker, and gives the traceback.
        """
        numbered = list(enumerate(recipes))
        if self._client is None:
            values = [self.values[key] for key in self.keys]
            found = _look(cloudpickle.dumps((function, numbered, self.keys)), values)
        else:
            threads = sum(self._client.nthreads().values()) or 1
            size = max(1, -(-len(numbered) // (threads * TASKS_PER_THREAD)))
            token = uuid.uuid4().hex
            of_key = dict(zip(self.keys, self.futures, strict=True))
            futures = []
            for group in batched(numbered, size, strict=False):
                needed = needed_keys(recipe for _, recipe in group)
                futures.append(
                    self._client.submit(
                        _look,
                        cloudpickle.dumps((function, list(group), needed)),
                        [of_key[key] for key in needed],
                        key=f"dask-nn-survey-{token}-{group[0][0]}",
                    )
                )
            found = [value for part in gather(self._client, futures) for value in part]
        for value in found:
            if isinstance(value, Problem):
                raise value.error(what)
        return found


def needed_keys(recipes: Iterable[Recipe]) -> tuple[Any, ...]:
    """Give the shared parts that some blocks need: no more than that goes to their worker."""
    return tuple(dict.fromkeys(key for recipe in recipes for key in recipe.shared))


def _look(order: bytes, shared: list[Any]) -> list[Any]:
    function, numbered, keys = pickle.loads(order)  # noqa: S301 - the client's own
    values = dict(zip(keys, shared, strict=True))
    found: list[Any] = []
    for number, recipe in numbered:
        try:
            found.append(function(with_retries(partial(cook, recipe, values))))
        except Exception as error:
            found.append(Problem.of(number, error, this_worker()))
            break
    return found
