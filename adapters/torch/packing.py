"""Padded batches as packed sequences, with static shapes: no value is waited for, so that a GPU never is."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Packing(NamedTuple):
    """Where the tokens of a padded batch go: those kept first, in their order, the others behind the last boundary."""

    order: torch.Tensor  # [batch * len]: the padded place of each packed token
    place: torch.Tensor  # [batch * len]: the packed place of each padded token
    cu_seqlens: torch.Tensor  # int32 [batch + 1]

    @classmethod
    def of(cls, kept: torch.Tensor) -> Packing:
        """From a boolean mask [batch, len]."""
        flat = kept.flatten()
        numbered = flat.cumsum(0)
        place = torch.where(flat, numbered - 1, numbered[-1:] + (~flat).cumsum(0) - 1)
        order = torch.empty_like(place).scatter_(0, place, torch.arange(len(place), device=place.device))
        ends = kept.sum(1).cumsum(0)
        return cls(order, place, torch.nn.functional.pad(ends, (1, 0)).int())

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, len, ...] -> [batch * len, ...]."""
        return x.flatten(0, 1).index_select(0, self.order)

    def unpack(self, x: torch.Tensor, batch: int) -> torch.Tensor:
        """[batch * len, ...] -> [batch, len, ...]; rows of attention that are no kept token's are 0."""
        return x.index_select(0, self.place).unflatten(0, (batch, len(self.place) // batch))


def equal_lengths(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """The boundaries of a batch without padding: int32 [batch + 1]."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length
