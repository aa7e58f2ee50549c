"""The graphics cards of this machine that this process may use."""

from __future__ import annotations

import os

__all__ = ["VISIBLE", "visible_cards"]

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
