"""KV cache: keys and values of everything read so far, allocated once for the longest sequence of a request.

One row per sequence; guidance has two. Grouped-query attention keeps kv_heads of them, not one per query head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lance_quant.lance.config import LanceConfig


class CacheRow:
    """The cache of one sequence: `length` committed entries, and room behind them for the call in flight.

    keys, values: [layers, kv_heads, capacity, head_dim].
    mask: which entries that `extend` returns may be seen, bool [1, capacity]; None: all of them.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self._keys, self._values = keys, values
        self.length = 0
        self.mask: Tensor | None = None
        self._place: Tensor | None = None

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the call's keys and values, each [kv_heads, n, head_dim], behind the past.

        Returns:
            Keys and values of past and call, each [kv_heads, length + n, head_dim]; the whole capacity after `next_at`.
        """
        if self._place is not None:
            return (self._keys[layer].index_copy_(1, self._place, keys),
                    self._values[layer].index_copy_(1, self._place, values))
        end = self.length + keys.shape[1]
        assert end <= self._keys.shape[2], f"cache of {self._keys.shape[2]} entries cannot hold {end}"
        self._keys[layer, :, self.length:end] = keys
        self._values[layer, :, self.length:end] = values
        return self._keys[layer, :, :end], self._values[layer, :, :end]

    def commit(self, count: int) -> None:
        """Make the last call's `count` entries part of the past; without it the next call overwrites them."""
        self.length += count

    def reset(self) -> None:
        """Forget everything, and whatever `next_at` said."""
        self.length, self.mask, self._place = 0, None, None

    def next_at(self, place: Tensor) -> None:
        """Let the next call, of one token, go to `place` (int64 [1] on the device) and see everything up to there.

        `extend` then returns the whole capacity, so that every such call is the same work whatever the length, and
        the host need not know it. What is beyond the past must be finite (`allocate(..., zeroed=True)`).
        """
        self._place = place
        self.mask = torch.arange(self._keys.shape[2], device=place.device)[None] <= place


def allocate(config: LanceConfig, capacities: Sequence[int], dtype: torch.dtype, device: torch.device,
             zeroed: bool = False) -> list[CacheRow]:
    """One cache row per sequence, all in a single allocation.

    Args:
        capacities: entries that each row must hold, the call in flight included.
        zeroed: fill them with zeros, for `CacheRow.next_at`.

    Returns:
        One row each, of [layers, kv_heads, longest capacity, head_dim] keys and as many values.
    """
    capacity = max(capacities)
    store = (torch.zeros if zeroed else torch.empty)(
        len(capacities), 2, config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim,
        dtype=dtype, device=device)
    return [CacheRow(keys, values) for keys, values in store]
