"""What Kubernetes says of pods: their troubles, and whether they can still start."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["StuckPods", "containers_in", "state_of", "troubles"]

# Of containers that will not start as they are.
STUCK = {"ErrImageNeverPull", "InvalidImageName"}
# A registry may be busy for a moment, and a secret not there yet. Between two tries to pull an
# image, the kubelet gives both of its reasons in turn.
STUCK_FOR_LONG = {
    "CreateContainerConfigError": "CreateContainerConfigError",
    "ErrImagePull": "ImagePullBackOff",
    "ImagePullBackOff": "ImagePullBackOff",
}
PATIENCE_S = 60
# A container may fail once.
ENOUGH_RESTARTS = 3


class StuckPods:
    """Tells which pods do not start, from what was seen of them one time after the other.

    What passes by itself now and then is waited for from the time when it was first seen. How old a
    pod is says nothing: it may have waited for its node.

    Parameters
    ----------
    clock : callable, default time.monotonic
        Gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[tuple[str, str], float] = {}

    def among(self, statuses: Mapping[str, dict[str, Any]]) -> set[str]:
        """Give the names of the pods that Kubernetes cannot start, or tried to often enough.

        Parameters
        ----------
        statuses : mapping
            The ``status`` of each pod that there is now, by its name.
        """
        now = self._clock()
        seen = {
            (name, STUCK_FOR_LONG[reason])
            for name, status in statuses.items()
            for reason, _ in map(state_of, containers_in(status))
            if reason in STUCK_FOR_LONG
        }
        self._since = {key: self._since.get(key, now) for key in seen}
        for_long = {name for (name, _), since in self._since.items() if now - since >= PATIENCE_S}
        return for_long | {
            name
            for name, status in statuses.items()
            if any(map(_will_not_start, containers_in(status)))
        }


def troubles(status: dict[str, Any]) -> list[str]:
    """Give what Kubernetes says of a pod that is not as it should be; nothing of a healthy one."""
    phase = status.get("phase", "unknown")
    said = [phase] if phase != "Running" else []
    said += [
        condition["message"]
        for condition in status.get("conditions", ())
        if condition.get("status") == "False" and condition.get("message")
    ]
    said += filter(None, (" ".join(state_of(one)).strip() for one in containers_in(status)))
    return said


def containers_in(status: dict[str, Any]) -> list[dict[str, Any]]:
    """Give the status of each container that shall run, or has to end well before others start."""
    before = [one for one in status.get("initContainerStatuses", ()) if not _ended_well(one)]
    return [*before, *status.get("containerStatuses", ())]


def state_of(container: dict[str, Any]) -> tuple[str, str]:
    """Give the reason why a container is not running, and what is said of it."""
    for state in container.get("state", {}).values():
        if isinstance(state, dict) and state.get("reason"):
            return state["reason"], state.get("message") or ""
    return "", ""


def _ended_well(container: dict[str, Any]) -> bool:
    terminated = container.get("state", {}).get("terminated")
    return isinstance(terminated, dict) and terminated.get("exitCode") == 0


def _will_not_start(container: dict[str, Any]) -> bool:
    reason, _ = state_of(container)
    return reason in STUCK or (
        reason == "CrashLoopBackOff" and container.get("restartCount", 0) >= ENOUGH_RESTARTS
    )
