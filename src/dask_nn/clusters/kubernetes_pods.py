"""Fields of the user's own, put into a pod as Kubernetes itself would merge them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["merge_pod"]

# Lists whose entries are known by a field; the same entry is meant by the same value. Tolerations
# have none, and a pod may have any number of them.
KEYS = {
    "containers": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "initContainers": "name",
    "ports": "containerPort",
    "tolerations": None,
    "volumeMounts": "mountPath",
    "volumes": "name",
}


def merge_pod(pod: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Merge further fields into the description of a pod, or of a part of one.

    Mappings are merged field by field. Of the lists that Kubernetes merges, entries are added to
    those that are there: containers with a name that is there already are merged into it, other
    entries take the place of those with the same name. Everything else is replaced.

    Parameters
    ----------
    pod : mapping
        What there is; it stays as it is.
    extra : mapping
        What is added, or takes its place.
    """
    merged = dict(pod)
    for name, value in extra.items():
        there = merged.get(name)
        if isinstance(there, Mapping) and isinstance(value, Mapping):
            merged[name] = merge_pod(there, value)
        elif name in KEYS and isinstance(there, list) and isinstance(value, list | tuple):
            merged[name] = _merge_lists(name, there, list(value))
        else:
            merged[name] = value
    return merged


def _merge_lists(name: str, there: list[Any], added: list[Any]) -> list[Any]:
    key = KEYS[name]
    if key is None:
        return [*there, *added]
    merged = list(there)
    places = {item.get(key): place for place, item in enumerate(there)}
    for item in added:
        place = places.get(item.get(key)) if isinstance(item, Mapping) else None
        if place is None:
            merged.append(item)
        else:
            merged[place] = merge_pod(merged[place], item) if name == "containers" else item
    return merged
