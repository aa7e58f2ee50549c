"""The end of a cluster's machines at EC2: asked for until it is seen, or said that it was not."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from dask_nn.errors import DaskNNError

if TYPE_CHECKING:
    from dask_nn.clusters.aws_account import Account

__all__ = ["GONE", "TAG", "describe", "end_machines", "is_schedulers"]

logger = logging.getLogger(__name__)

TAG = "dask-nn-cluster"
GONE = {"shutting-down", "terminated"}
SEE_TIMEOUT_S = 60.0
LOOK_EVERY_S = 2.0
# AWS tells of a machine some time after it was made: one look that shows none proves nothing.
LOOKS_THAT_AGREE = 2
FAILURES = 3


def end_machines(
    account: Account,
    token: str,
    *,
    timeout_s: float = SEE_TIMEOUT_S,
    look_every_s: float = LOOK_EVERY_S,
) -> None:
    """End the machines of a cluster, and look until they are gone.

    It raises nothing, as it is called while other errors are on their way: what may be left is
    logged, with the command that ends it.

    Parameters
    ----------
    account : Account
        Whose machines they are.
    token : str
        Value of their tag.
    timeout_s : float
        How long they may take.
    look_every_s : float
        Time between two looks.
    """
    deadline = time.monotonic() + timeout_s
    left: list[str] = []
    agree = failed = 0
    while True:
        try:
            left = _end(account, token)
        except DaskNNError as error:
            failed += 1
            if failed == FAILURES:
                return _warn(account, token, left, str(error))
        else:
            agree, failed = (0 if left else agree + 1), 0
        if agree == LOOKS_THAT_AGREE:
            return None
        if time.monotonic() > deadline:
            return _warn(account, token, left, f"not gone within {timeout_s:g} s")
        time.sleep(look_every_s)


def _end(account: Account, token: str) -> list[str]:
    """Ask for the end of all machines that are there; give their ids."""
    found = account.instances(TAG, token)
    names = [item["InstanceId"] for item in found if item["State"]["Name"] not in GONE]
    if names:
        account.ask("ec2", lambda client: client.terminate_instances(InstanceIds=names))
    return names


def _warn(account: Account, token: str, left: list[str], reason: str) -> None:
    logger.warning(
        "machines of EC2 may still run, %s tagged %s=%s: %s; end them: aws ec2 describe-instances "
        "--region %s --filters Name=tag:%s,Values=%s --query 'Reservations[].Instances[]"
        ".InstanceId' --output text | xargs aws ec2 terminate-instances --region %s --instance-ids",
        ", ".join(left) or "those",
        TAG,
        token,
        reason,
        account.region,
        TAG,
        token,
        account.region,
    )


def is_schedulers(instance: dict[str, Any]) -> bool:
    """Tell by its name whether a machine was made for the scheduler."""
    return any(name.endswith("-scheduler") for name in _names(instance))


def describe(instance: dict[str, Any]) -> str:
    """Say of a machine its id, its name, its state and the reason for that."""
    reason = instance.get("StateReason", {}).get("Message", "")
    parts = (instance["InstanceId"], *_names(instance), instance["State"]["Name"], reason)
    return " ".join(filter(None, parts))


def _names(instance: dict[str, Any]) -> list[str]:
    return [tag["Value"] for tag in instance.get("Tags", ()) if tag["Key"] == "Name"]
