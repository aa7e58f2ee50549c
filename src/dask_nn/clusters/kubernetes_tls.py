"""Certificates in Kubernetes: a secret, mounted where scheduler and workers look for it."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from dask_nn.clusters.certificates import (
    ROLES,
    as_environment,
    pem_texts,
    security_of_texts,
    tls_settings,
)
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distributed import Security

__all__ = ["TLS_FOLDER", "security_in", "tls_environment", "tls_secret", "tls_volume"]

TLS_FOLDER = "/etc/dask-nn/tls"
# Which keys a pod holds. A worker's tasks may open clients.
KEYS_OF = {"scheduler": ("scheduler",), "worker": ("worker", "client")}


def tls_secret(name: str, security: Security) -> dict[str, Any]:
    """Describe the secret with the certificates of a cluster.

    Parameters
    ----------
    name : str
        Of the secret.
    security : distributed.Security
        With a certificate and key for each role, as PEM text or as names of files.

    Raises
    ------
    ConfigurationError
        If a certificate is missing or cannot be read.
    """
    held = pem_texts(security)
    texts = {"ca.crt": held["ca_file"]}
    for role in ROLES:
        texts[f"{role}.crt"] = held[f"{role}_cert"]
        texts[f"{role}.key"] = held[f"{role}_key"]
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name},
        "type": "Opaque",
        "stringData": texts,
    }


def security_in(secret: Mapping[str, Any]) -> Security:
    """Read the client's certificates from a secret.

    Parameters
    ----------
    secret : mapping
        As Kubernetes gives it, with values in base64.

    Raises
    ------
    ConfigurationError
        If one is missing.
    """
    data: Mapping[str, str] = secret.get("data") or {}
    names = {"ca_file": "ca.crt", "client_cert": "client.crt", "client_key": "client.key"}
    missing = [name for name in names.values() if name not in data]
    if missing:
        raise ConfigurationError(
            f"tls_secret {secret['metadata']['name']!r} has no {', '.join(missing)}; it has "
            f"{', '.join(sorted(data)) or 'nothing'}"
        )
    return security_of_texts(
        {field: base64.b64decode(data[name]).decode("ascii") for field, name in names.items()}
    )


def tls_volume(role: str, secret: str) -> dict[str, Any]:
    """Describe the volume that gives a pod the keys of its role, and no others."""
    names = ["ca.crt"]
    for held in KEYS_OF[role]:
        names += [f"{held}.crt", f"{held}.key"]
    items = [{"key": name, "path": name} for name in names]
    return {"name": "tls", "secret": {"secretName": secret, "items": items}}


def tls_environment(role: str) -> list[dict[str, str]]:
    """Say in environment variables of Dask's configuration where a pod finds its certificates."""
    certificates = {"ca_file": f"{TLS_FOLDER}/ca.crt"}
    for held in KEYS_OF[role]:
        certificates[f"{held}_cert"] = f"{TLS_FOLDER}/{held}.crt"
        certificates[f"{held}_key"] = f"{TLS_FOLDER}/{held}.key"
    variables = as_environment(tls_settings(certificates))
    return [{"name": name, "value": value} for name, value in variables.items()]
