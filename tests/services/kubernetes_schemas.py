"""The schemas of the Dask operator's resources, read as strictly as an API server can."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any

import jsonschema
import yaml

CRDS = "operator/deployment/helm/dask-kubernetes-operator/crds"
# What every resource has; the API server knows these fields without a schema.
METADATA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 63, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


def errors_of(resource: dict[str, Any]) -> list[str]:
    """Say what an API server with strict field validation would refuse."""
    validator = jsonschema.Draft202012Validator(_strict_schema(resource["kind"]))
    return sorted(
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator.iter_errors(resource)
    )


@functools.cache
def _strict_schema(kind: str) -> dict[str, Any]:
    text = (files("dask_kubernetes") / CRDS / f"{kind.lower()}.yaml").read_text()
    [crd] = yaml.safe_load_all(text)
    [version] = crd["spec"]["versions"]
    schema = _strict(version["schema"]["openAPIV3Schema"])
    group = crd["spec"]["group"]
    schema["properties"] |= {
        "apiVersion": {"const": f"{group}/{version['name']}"},
        "kind": {"const": kind},
        "metadata": METADATA,
    }
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return schema


def _strict(schema: Any) -> Any:
    """Refuse unknown fields everywhere, as strict field validation does."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(part) for name, part in schema.items()}
    if schema.get("x-kubernetes-int-or-string") is True:
        strict.pop("type", None)
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") is True
    if isinstance(schema.get("properties"), dict) and not open_ended:
        strict.setdefault("additionalProperties", False)
    return strict
