"""The cache of Multi-head Latent Attention: C + R numbers a token and layer (DeepSeek-V2 §2.1.3, table 1).

Shapes: B batch, S cached tokens, C latent width (`kv_lora_rank`), R rotary width (`qk_rope_head_dim`).

transformers' dynamic cache layer appends by concatenation and so copies the whole cache at every step. Here latents and
rotary keys each have a buffer, [B, 1, capacity, C] and [B, 1, capacity, R], that grows by blocks; `keys` [B, 1, S, C]
and `values` [B, 1, S, R] are views of the written parts, so everything that reads a `Cache` works as before.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache, DynamicLayer

GROWTH_BLOCK = 256  # tokens: one copy of the cache in 256 decoding steps, at most this much unused room


class LatentCacheLayer(DynamicLayer):
    """One layer's latents and rotary keys, in transformers' cache layer contract.

    While gradients are recorded it appends by concatenation, as its base class does: writing into a shared buffer would
    overwrite what an earlier step's backward pass needs.
    """

    def __init__(self):
        super().__init__()
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends latents [B, 1, T, C] and rotary keys [B, 1, T, R]; returns all, [B, 1, S, C] and [B, 1, S, R]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states = (key_states, value_states, self.keys, self.values)
        if torch.is_grad_enabled() and any(state.requires_grad for state in states):
            self._buffers = None
            return super().update(key_states, value_states)

        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        if self._buffers is None or length > self._buffers[0].shape[-2]:
            capacity = -(-length // GROWTH_BLOCK) * GROWTH_BLOCK
            self._buffers = tuple(_empty_buffer(states, capacity) for states in (key_states, value_states))
            if past:
                self._write(slice(past), self.keys, self.values)
        self._write(slice(past, length), key_states, value_states)
        self._show(length)
        return self.keys, self.values

    def _write(self, tokens: slice, *states: torch.Tensor) -> None:
        for buffer, written in zip(self._buffers, states, strict=True):
            buffer[..., tokens, :] = written

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[..., :length, :] for buffer in self._buffers)

    def _replace(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies `change` to the buffers, or to keys and values where there are none."""
        length = self.get_seq_length()
        if length == 0:
            return
        if self._buffers is None:
            self.keys, self.values = change(self.keys), change(self.values)
        else:
            self._buffers = tuple(change(buffer) for buffer in self._buffers)
            self._show(length)

    def reset(self) -> None:
        super().reset()
        self._buffers = None

    def offload(self) -> None:
        self._replace(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._replace(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._replace(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._replace(lambda tensor: tensor[indices, ...])


def _empty_buffer(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """An empty buffer for `capacity` tokens like `states` [B, 1, T, width]."""
    return states.new_empty(*states.shape[:2], capacity, states.shape[-1])


def use_latent_layers(cache: Cache) -> Cache:
    """Gives a dynamic cache that nothing was written to yet latent layers, and returns it.

    A cache reaches the model from many hands (the caller, `generate`, assisted generation), mostly as transformers'
    `DynamicCache`. Caches of other kinds (static, quantised) keep their layers and work all the same.
    """
    if cache.layer_class_to_replicate is DynamicLayer and not cache.layers:
        cache.layer_class_to_replicate = LatentCacheLayer
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = LatentCacheLayer()
    return cache
