"""The graphics cards of this machine that this process may use."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["VISIBLE", "check_cards", "give_a_card_to_each", "visible_cards"]

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_cards() -> list[str]:
    """Name the cards as ``CUDA_VISIBLE_DEVICES`` does: by number, or by UUID.

    Returns
    -------
    list of str
        What that variable allows; without it all cards, as PyTorch counts them.
    """
    allowed = os.environ.get(VISIBLE)
    if allowed is not None:
        cards = [card.strip() for card in allowed.split(",")]
        # CUDA itself takes the cards before the first that does not exist, as -1 does not.
        ends = [number for number, card in enumerate(cards) if card in {"", "-1"}]
        return cards[: min(ends, default=len(cards))]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def check_cards(workers: int, cards: list[str]) -> None:
    """Refuse more workers than cards.

    Raises
    ------
    ConfigurationError
        With the cards that there are.
    """
    if workers > len(cards):
        raise ConfigurationError(
            f"workers={workers} with a GPU each need {workers} of them, and this process may use "
            f"{len(cards)} ({VISIBLE}={','.join(cards)})"
        )


def give_a_card_to_each(cluster: Any, cards: list[str]) -> None:
    """Give each worker of a local cluster a card of its own, also those that are added later."""
    plain: Callable[[], dict[Any, Any]] = cluster.new_worker_spec

    def new_worker_spec() -> dict[Any, Any]:
        given = [spec["options"]["env"][VISIBLE] for spec in cluster.worker_spec.values()]
        check_cards(len(given) + 1, cards)
        [(name, spec)] = plain().items()
        card = next(card for card in cards if card not in given)
        env = {**spec["options"].get("env", {}), VISIBLE: card}
        return {name: {**spec, "options": {**spec["options"], "env": env}}}

    count = len(cluster.worker_spec)
    cluster.worker_spec = {}
    cluster.new_worker_spec = new_worker_spec
    for _ in range(count):
        cluster.worker_spec.update(new_worker_spec())
