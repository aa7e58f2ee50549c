"""Why there is no cluster to look at, and who can tell more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dask_nn.diagnosis.report import Line, fail

if TYPE_CHECKING:
    from dask_nn.diagnosis.facts import ClusterFacts

__all__ = ["check_start"]

QUEUES = {
    "slurm": "squeue --me",
    "pbs": "qstat -u $USER",
    "lsf": "bjobs",
    "sge": "qstat",
    "oar": "oarstat -u",
    "htcondor": "condor_q",
}
REMEDIES = {
    kind: f"ask for less, wait longer (--start-timeout), or look at what the batch system says: "
    f"{command}, and the jobs' logs (docs/clusters/slurm.md)"
    for kind, command in QUEUES.items()
} | {
    "local": "its workers are processes of this Python on this machine: mend what is named here, "
    "ask for fewer (--workers), or wait longer (--start-timeout)",
    "ssh": "log in to each host with ssh, without a password, and run its Python there "
    "(remote_python), which needs the same dask-nn and torch (docs/clusters/ssh.md)",
    "kubernetes": "look at its pods and events (kubectl get pods,events -n NAMESPACE): whether "
    "this machine may ask, Dask's operator runs, the image can be pulled, and a node has room "
    "(docs/clusters/kubernetes.md)",
    "aws": "look at the credentials and the region, the account's quotas, and whether the machines "
    "can pull the image and reach each other (docs/clusters/aws.md)",
    "address": "start more workers there (dask worker ADDRESS), or ask for fewer (--workers)",
}


def check_start(facts: ClusterFacts) -> Line:
    """Say what kept a cluster from starting."""
    return fail("cluster", facts.not_started, REMEDIES[facts.kind])
