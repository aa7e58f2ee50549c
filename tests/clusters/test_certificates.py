from __future__ import annotations

import dask
from distributed import Security

from dask_nn.clusters.certificates import (
    as_environment,
    pem_texts,
    security_of_texts,
    tls_settings,
)


def test_what_is_written_as_environment_variables_dask_reads_as_the_same_settings() -> None:
    settings = tls_settings(pem_texts(Security.temporary()))
    read = dask.config.collect_env(as_environment(settings))
    assert {name: dask.config.get(name, config=read) for name in settings} == settings


def test_certificates_given_as_texts_are_those_of_every_role() -> None:
    texts = pem_texts(Security.temporary())
    assert pem_texts(security_of_texts(texts)) == texts


def test_a_role_without_a_certificate_has_no_setting() -> None:
    settings = tls_settings({"ca_file": "ca", "worker_cert": "cert", "worker_key": "key"})
    assert {name for name in settings if ".tls." in name} == {
        "distributed.comm.tls.ca-file",
        "distributed.comm.tls.worker.cert",
        "distributed.comm.tls.worker.key",
    }
