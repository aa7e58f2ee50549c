"""The one place that asks: client, scheduler and workers, every question with a deadline."""

from __future__ import annotations

import asyncio
import time
import urllib.error
import urllib.request
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dask_nn.controller.cluster import ask_workers, in_loop, scheduler_address
from dask_nn.diagnosis import links, probe
from dask_nn.diagnosis.facts import Clock, ClusterFacts, DataFacts, Link, ProcessFacts
from dask_nn.diagnosis.pairs import pairs_to_measure, targets_of
from dask_nn.diagnosis.probe import describe_process, in_thread
from dask_nn.diagnosis.read_data import with_places
from dask_nn.diagnosis.shipping import Shipped
from dask_nn.diagnosis.silence import CONNECT_TIMEOUT_S, why_silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distributed import Client

__all__ = ["gather"]

# What a rank and its worker import.
RANK_MODULES = ("dask_nn.controller.worker_side", "dask_nn.training.rank_main")
# The first page that a dashboard makes takes it seconds.
PAGE_TIMEOUT_S = 10.0
TRANSFER_BYTES = 4 << 20
PINGS = 3
# A worker that hangs, has left or has lost its connection did not fail at what it was asked.
NO_ANSWER = (TimeoutError, KeyError, OSError)
QUESTIONS = 8


def gather(
    client: Client,
    *,
    X: Any = None,
    data: DataFacts | None = None,
    modules: Sequence[str] = (),
    parameters: int = 10_000_000,
    gpus: int = 0,
    timeout_s: float = 60.0,
) -> ClusterFacts:
    """Ask a cluster for everything that the checks look at.

    Parameters
    ----------
    client : Client
        Of the cluster.
    X : collection, optional
        Whose blocks may be held by workers.
    data : DataFacts, optional
        What is known of it.
    modules : sequence of str
        Packages that workers need for the data.
    parameters : int
        Size of the model to make room for.
    gpus : int
        GPUs of each worker that were asked for: 0 or 1.
    timeout_s : float
        Deadline of one question; those that are put to all workers are put at once.
    """
    address = scheduler_address(client)
    if client.status == "closed":
        return ClusterFacts(address=address, problem="the client is closed")
    asked = in_loop(client, _Asker(client, timeout_s).ask(X, data, modules, parameters))
    try:
        facts = asked.result(QUESTIONS * (timeout_s + CONNECT_TIMEOUT_S))
        return replace(facts, gpus=gpus)
    except TimeoutError:
        asked.cancel()
        return ClusterFacts(address=address, problem="it stopped to answer while it was asked")


class _Asker:
    """Puts the questions, in the client's event loop."""

    def __init__(self, client: Client, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s

    async def ask(
        self, X: Any, data: DataFacts | None, modules: Sequence[str], parameters: int
    ) -> ClusterFacts:
        address = scheduler_address(self._client)
        facts = ClusterFacts(address=address, parameters=parameters, timeout_s=self._timeout_s)
        try:
            began = time.monotonic()
            async with asyncio.timeout(self._timeout_s):
                scheduler: Any = self._client.scheduler
                identity = await scheduler.identity(n_workers=-1)
        except (OSError, TimeoutError):
            problem, tls = await why_silent(address)
            return replace(facts, problem=problem, tls=tls)
        facts = replace(
            facts,
            latency_s=time.monotonic() - began,
            registered=tuple(identity["workers"]),
            dashboard=self._client.dashboard_link if "dashboard" in identity["services"] else "",
            now_s=time.time(),
        )
        here, there, reached, dashboard_problem = await asyncio.gather(
            describe_process(modules, RANK_MODULES),
            self._of_scheduler(probe, "describe_process"),
            self._of_scheduler(links, "try_links", facts.registered, CONNECT_TIMEOUT_S),
            in_thread(_read_page, facts.dashboard, min(self._timeout_s, PAGE_TIMEOUT_S)),
        )
        facts = replace(
            facts,
            client=ProcessFacts(**here),
            scheduler=None if there is None else ProcessFacts(**there),
            reached=_links(address, reached or {}),
            dashboard_problem=dashboard_problem,
        )
        facts = await self._ask_workers(facts, modules)
        if data is not None and X is not None:
            data = await with_places(data, X, self._client, self._timeout_s)
        return replace(facts, data=data)

    async def _ask_workers(self, facts: ClusterFacts, modules: Sequence[str]) -> ClusterFacts:
        able = [
            address
            for address in facts.registered
            if address not in facts.reached or facts.reached[address].connected
        ]
        describe = Shipped(probe, "describe_process")
        answers = await self._of_workers(describe, able, tuple(modules))
        awake = [address for address, found in answers.items() if isinstance(found, dict)]
        # Imports come second: where they take too long, the rest is known.
        loaded = await self._of_workers(describe, awake, tuple(modules), RANK_MODULES)
        workers = [
            ProcessFacts(**found)
            if isinstance(found, dict)
            else _not_loaded(answers[address], _silence(found, self._timeout_s))
            for address, found in loaded.items()
        ]
        facts = replace(
            facts,
            workers=tuple(workers),
            silent={
                address: facts.reached[address].problem
                if address not in answers
                else _silence(answers[address], self._timeout_s)
                for address in facts.registered
                if not isinstance(answers.get(address), dict)
            },
        )
        facts = replace(facts, clocks=await self._clocks(awake))
        facts = replace(facts, links=await self._links(facts, awake))
        facts = replace(facts, speeds=await self._speeds(facts))
        return await self._fingerprints(facts)

    async def _of_scheduler(self, module: Any, name: str, *arguments: Any) -> dict[str, Any] | None:
        """Call a function on the scheduler; None where that is not allowed, or fails."""
        try:
            async with asyncio.timeout(self._timeout_s):
                answer: dict[str, Any] = await self._client._run_on_scheduler(  # noqa: SLF001
                    Shipped(module, name), *arguments
                )
        except Exception:
            return None
        return answer

    async def _of_workers(
        self, function: Any, addresses: Sequence[str], *arguments: Any
    ) -> dict[str, Any]:
        answers = ask_workers(
            self._client, function, addresses, *arguments, timeout_s=self._timeout_s
        )
        return await asyncio.wrap_future(answers)

    async def _clocks(self, addresses: Sequence[str]) -> dict[str, Clock]:
        """Compare clocks; of several messages the fastest knows best."""
        best: dict[str, Clock] = {}

        async def ask(address: str) -> None:
            began, at = time.monotonic(), time.time()
            answer = (await self._of_workers(time.time, [address]))[address]
            half = (time.monotonic() - began) / 2
            if isinstance(answer, float) and (address not in best or half < best[address].error_s):
                best[address] = Clock(offset_s=answer - at - half, error_s=half)

        for _ in range(PINGS):
            await asyncio.gather(*map(ask, addresses))
        return best

    async def _links(self, facts: ClusterFacts, awake: Sequence[str]) -> tuple[Link, ...]:
        targets = targets_of(facts.registered)
        function = Shipped(links, "try_links")
        asked = []
        for address in awake:
            tried = [*targets[address], facts.address]
            asked.append(self._of_workers(function, [address], tried, CONNECT_TIMEOUT_S))
        found: list[Link] = []
        for answers in await asyncio.gather(*asked):
            for address, answer in answers.items():
                if isinstance(answer, dict):
                    found += _links(address, answer).values()
        return tuple(found)

    async def _speeds(self, facts: ClusterFacts) -> dict[tuple[str, str], float]:
        """Measure a few pairs, one after another: together they would share the network."""
        function = Shipped(links, "measure_speed")
        working = {(link.source, link.target) for link in facts.links if not link.problem}
        found: dict[tuple[str, str], float] = {}
        deadline = time.monotonic() + self._timeout_s
        for source, target in pairs_to_measure(facts.workers, working):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            arguments = (target, TRANSFER_BYTES, min(left, CONNECT_TIMEOUT_S))
            answer = (await self._of_workers(function, [source], *arguments))[source]
            found[source, target] = answer if isinstance(answer, float) else 0.0
        return found

    async def _fingerprints(self, facts: ClusterFacts) -> ClusterFacts:
        if facts.client.problems:
            module, reason = next(iter(facts.client.problems.items()))
            return replace(facts, fingerprints_unknown={"": f"{module}: {reason}"})
        from dask_nn.diagnosis.canary import standard_fingerprint

        unknown = {
            worker.address: "PyTorch is not imported there"
            for worker in facts.workers
            if worker.spared or worker.problems
        }
        able = [worker.address for worker in facts.workers if worker.address not in unknown]

        async def compute_here() -> Any:
            try:
                return await standard_fingerprint()
            except Exception as error:
                return error

        here, answers = await asyncio.gather(
            compute_here(), self._of_workers(standard_fingerprint, able)
        )
        hashes, errors = {}, {}
        for address, found in {"": here, **answers}.items():
            if isinstance(found, str):
                hashes[address] = found
            elif isinstance(found, NO_ANSWER):
                unknown[address] = _silence(found, self._timeout_s)
            else:
                errors[address] = _first_line(found)
        return replace(
            facts,
            fingerprints=hashes,
            fingerprint_errors=errors,
            fingerprints_unknown=unknown,
        )


def _links(source: str, answers: dict[str, dict[str, Any]]) -> dict[str, Link]:
    return {
        target: Link(source=source, target=target, **answer) for target, answer in answers.items()
    }


def _not_loaded(answer: dict[str, Any], reason: str) -> ProcessFacts:
    facts = ProcessFacts(**answer)
    return replace(facts, problems=facts.problems | {"PyTorch": f"import {reason}"})


def _silence(answer: Any, timeout_s: float) -> str:
    if isinstance(answer, TimeoutError):
        return f"hangs: no answer within {timeout_s:g} s"
    if isinstance(answer, KeyError):
        return "left the cluster"
    return _first_line(answer)


def _read_page(link: str, timeout_s: float) -> str:
    """Read a page of the dashboard; say why that fails."""
    if not link:
        return ""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(link, timeout=timeout_s) as answer:
            answer.read(1)
    except urllib.error.HTTPError as error:
        return f"HTTP status {error.code}"
    except (OSError, ValueError) as error:
        return _first_line(getattr(error, "reason", error))
    return ""


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
