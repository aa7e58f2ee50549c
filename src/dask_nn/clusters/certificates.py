"""The certificates and keys of a cluster with TLS, as files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Security

from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ROLES",
    "as_environment",
    "pem_texts",
    "security_of_files",
    "security_of_texts",
    "tls_settings",
]

ROLES = ("client", "scheduler", "worker")


def pem_texts(security: Security) -> dict[str, str]:
    """Give all certificates and keys, whether the Security holds them itself or names files.

    Returns
    -------
    dict
        From ``"ca_file"``, ``"worker_cert"``, ``"worker_key"``, ... to PEM texts.

    Raises
    ------
    ConfigurationError
        If one is missing or cannot be read.
    """
    texts = {"ca_file": _text("tls_ca_file", security.get_tls_config_for_role("client")["ca_file"])}
    for role in ROLES:
        config = security.get_tls_config_for_role(role)
        # The key may be in the file of the certificate.
        texts |= {
            f"{role}_{part}": _text(f"tls_{role}_{part}", config[part] or config["cert"])
            for part in ("cert", "key")
        }
    return texts


def security_of_texts(texts: Mapping[str, str]) -> Security:
    """Hold certificates and keys in memory, named as `pem_texts` names them."""
    return Security(
        require_encryption=True, **{f"tls_{name}": text for name, text in texts.items()}
    )


def security_of_files(folder: Path, texts: dict[str, str]) -> Security:
    """Write certificates and keys to a folder, for its owner alone to read, and name them there."""
    for name, text in texts.items():
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
    paths = {f"tls_{name}": str(folder / name) for name in texts}
    return Security(require_encryption=True, **paths)


def tls_settings(certificates: Mapping[str, str]) -> dict[str, Any]:
    """Give Dask's settings for TLS.

    Parameters
    ----------
    certificates : mapping of str to str
        Texts or paths, named as `pem_texts` names them; those of some roles may be missing.

    Returns
    -------
    dict
        For ``dask.config.set``.
    """
    settings = {
        "distributed.comm.default-scheme": "tls",
        "distributed.comm.require-encryption": True,
        "distributed.comm.tls.ca-file": certificates["ca_file"],
    }
    for role in ROLES:
        for part in ("cert", "key"):
            if (name := f"{role}_{part}") in certificates:
                settings[f"distributed.comm.tls.{role}.{part}"] = certificates[name]
    return settings


def as_environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """Write settings of Dask as the environment variables that it reads them from."""
    return {
        f"DASK_{name.replace('.', '__').replace('-', '_').upper()}": str(value)
        for name, value in settings.items()
    }


def _text(field: str, text_or_path: str | None) -> str:
    if not text_or_path:
        raise ConfigurationError(
            f"security has no {field}; a cluster with TLS needs a certificate and a key for the "
            "scheduler, the workers and the client: give them, or security=True for temporary ones"
        )
    if "\n" in text_or_path:
        return text_or_path
    try:
        return Path(text_or_path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"security.{field} is {text_or_path!r}, expected a PEM file: {error}"
        ) from error
