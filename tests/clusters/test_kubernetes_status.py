from __future__ import annotations

from typing import Any

import pytest

from dask_nn.clusters.kubernetes_status import PATIENCE_S, StuckPods, troubles

READY = {"type": "Ready", "status": "True"}
RUNNING = {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
COMPLETED = {"state": {"terminated": {"reason": "Completed", "exitCode": 0}}}
FAILED = {"state": {"terminated": {"reason": "Error", "exitCode": 1}}}
SHORT_OF_PATIENCE_S = PATIENCE_S - 0.5


def waiting(reason: str, restarts: int = 0) -> dict[str, Any]:
    return {"state": {"waiting": {"reason": reason, "message": "why"}}, "restartCount": restarts}


def pod(*containers: Any, before: tuple[Any, ...] = (), phase: str = "Running") -> dict[str, Any]:
    return {
        "phase": phase,
        "conditions": [READY],
        "initContainerStatuses": list(before),
        "containerStatuses": list(containers),
    }


class Watched:
    """Pods that are looked at by a clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._stuck = StuckPods(lambda: self.now_s)

    def after(self, seconds: float, *reasons: str, name: str = "a") -> bool:
        """Tell whether the pod is stuck that has these reasons so much later."""
        self.now_s += seconds
        return name in self._stuck.among({name: pod(*map(waiting, reasons), phase="Pending")})


@pytest.mark.parametrize(
    "reason", ["CreateContainerConfigError", "ErrImagePull", "ImagePullBackOff"]
)
def test_what_may_pass_is_waited_for_from_when_it_was_first_seen(reason: str) -> None:
    watched = Watched()
    assert not watched.after(0, "ContainerCreating")
    assert not watched.after(10 * PATIENCE_S, reason)
    assert not watched.after(SHORT_OF_PATIENCE_S / 2, reason)
    assert not watched.after(SHORT_OF_PATIENCE_S / 2, reason)
    assert watched.after(0.5, reason)


def test_what_has_passed_is_forgotten() -> None:
    watched = Watched()
    assert not watched.after(0, "ImagePullBackOff")
    assert not watched.after(PATIENCE_S / 2, "ContainerCreating")
    assert not watched.after(PATIENCE_S / 2, "ImagePullBackOff")
    assert not watched.after(SHORT_OF_PATIENCE_S, "ImagePullBackOff")
    assert watched.after(0.5, "ImagePullBackOff")


def test_a_failed_pull_and_the_back_off_after_it_are_one_trouble() -> None:
    watched = Watched()
    assert not watched.after(0, "ErrImagePull")
    assert not watched.after(SHORT_OF_PATIENCE_S, "ImagePullBackOff")
    assert watched.after(0.5, "ErrImagePull")


def test_another_reason_or_another_pod_has_a_patience_of_its_own() -> None:
    watched = Watched()
    assert not watched.after(0, "ImagePullBackOff")
    assert not watched.after(PATIENCE_S, "CreateContainerConfigError")
    assert not watched.after(SHORT_OF_PATIENCE_S, "CreateContainerConfigError")
    assert not watched.after(PATIENCE_S, "CreateContainerConfigError", name="b")


@pytest.mark.parametrize("reason", ["ErrImageNeverPull", "InvalidImageName"])
def test_what_never_passes_is_not_waited_for(reason: str) -> None:
    assert Watched().after(0, reason)


@pytest.mark.parametrize(("restarts", "stuck"), [(2, set()), (3, {"a"})])
def test_a_container_may_fail_a_few_times(restarts: int, stuck: set[str]) -> None:
    failing = waiting("CrashLoopBackOff", restarts)
    assert StuckPods().among({"a": pod(failing), "b": pod(RUNNING)}) == stuck
    assert StuckPods().among({"a": pod(RUNNING, before=(failing,))}) == stuck


def test_restarts_of_a_container_that_runs_now_are_no_matter() -> None:
    assert not StuckPods().among({"a": pod(RUNNING | {"restartCount": 9})})


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (pod(RUNNING), []),
        (pod(RUNNING, before=(COMPLETED,)), []),
        (pod(COMPLETED), ["Completed"]),
        (pod(RUNNING, before=(FAILED, COMPLETED)), ["Error"]),
        (
            pod(waiting("PodInitializing"), before=(COMPLETED, RUNNING), phase="Pending"),
            ["Pending", "PodInitializing why"],
        ),
        ({}, ["unknown"]),
    ],
)
def test_troubles_are_those_of_containers_that_should_run_or_have_failed(
    status: dict[str, Any], said: list[str]
) -> None:
    assert troubles(status) == said
