"""The cache of Multi-head Latent Attention: C + R numbers a token and layer (DeepSeek-V2 §2.1.3, table 1).

Shapes: B batch, S cached tokens, C latent width (`kv_lora_rank`), R rotary width (`qk_rope_head_dim`).

transformers' dynamic cache layer appends by concatenation and so copies the whole cache at every step. Here latents and
rotary keys lie side by side in one buffer [B, 1, capacity, C + R] that grows by blocks; `keys` [B, 1, S, C] and
`values` [B, 1, S, R] are views of its written part, so everything that reads a `Cache` works as before.
"""

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
        self._buffer: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends latents [B, 1, T, C] and rotary keys [B, 1, T, R]; returns all, [B, 1, S, C] and [B, 1, S, R]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states = (key_states, value_states, self.keys, self.values)
        if torch.is_grad_enabled() and any(state.requires_grad for state in states):
            self._buffer = None
            return super().update(key_states, value_states)

        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        if self._buffer is None or length > self._buffer.shape[-2]:
            self._grow(length, key_states, value_states)
        new = self._buffer[..., past:length, :]
        new[..., : key_states.shape[-1]].copy_(key_states)
        new[..., key_states.shape[-1] :].copy_(value_states)
        self._show(length, key_states.shape[-1])
        return self.keys, self.values

    def _grow(self, length: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """A buffer for `length` tokens, rounded up to whole blocks, that holds what was cached."""
        capacity = -(-length // GROWTH_BLOCK) * GROWTH_BLOCK
        width = key_states.shape[-1] + value_states.shape[-1]
        buffer = key_states.new_empty(*key_states.shape[:2], capacity, width)
        if past := self.get_seq_length():
            torch.cat([self.keys, self.values], dim=-1, out=buffer[..., :past, :])
        self._buffer = buffer

    def _show(self, length: int, latent_width: int) -> None:
        self.keys = self._buffer[..., :length, :latent_width]
        self.values = self._buffer[..., :length, latent_width:]

    def _replace_buffer(self, change) -> None:
        """Applies `change` to the buffer, or to keys and values where there is none."""
        if self.get_seq_length() == 0:
            return
        if self._buffer is None:
            self.keys, self.values = change(self.keys), change(self.values)
        else:
            length, latent_width = self.keys.shape[-2:]
            self._buffer = change(self._buffer)
            self._show(length, latent_width)

    def reset(self) -> None:
        super().reset()
        self._buffer = None

    def offload(self) -> None:
        self._replace_buffer(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._replace_buffer(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._replace_buffer(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace_buffer(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._replace_buffer(lambda tensor: tensor[indices, ...])


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
