"""Keys and values of a clean prefix: computed once, then read by any number of noised passes and never changed.

transformers' own dynamic cache grows on every forward, even with use_cache=False; this one is written by one prefill,
frozen, and from then on hands out stored + new without keeping the new (docs/models.md).
"""

from torch import Tensor, cat
from transformers.cache_utils import Cache, DynamicLayer


class _PrefixLayer(DynamicLayer):
    """One layer's keys and values, each [b, heads, l, d]."""

    frozen = False

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.frozen:
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self.stored()
        return cat([keys, key_states], dim=-2), cat([values, value_states], dim=-2)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix."""
        if self.keys is None or self.values is None:
            raise ValueError("the prefix cache is empty: run one forward with use_cache=True before it is read")
        return self.keys, self.values


class PrefixCache(Cache):
    """Write once through a forward with `use_cache=True`, then `freeze`."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_PrefixLayer)

    def freeze(self) -> "PrefixCache":
        """From now on forwards read the prefix and leave it as it is."""
        for layer in self._prefix_layers():
            layer.frozen = True
        return self

    def rows(self, index: Tensor) -> "PrefixCache":
        """A frozen cache whose row i is a copy of row index[i] of this one (a sample appears once per pass)."""
        chosen = PrefixCache()
        for layer in self._prefix_layers():
            keys, values = layer.stored()
            copy = _PrefixLayer()
            copy.lazy_initialization(keys, values)
            here = index.to(keys.device)  # a teacher's layers may lie on several devices
            copy.keys, copy.values = keys[here], values[here]
            chosen.layers.append(copy)
        return chosen.freeze()

    def _prefix_layers(self) -> list[_PrefixLayer]:
        return [layer for layer in self.layers if isinstance(layer, _PrefixLayer)]
