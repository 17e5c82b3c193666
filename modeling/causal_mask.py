"""Which keys a query may attend to: for long inputs the mask is made for a block of queries at a time, never T×S whole.

Shapes: B batch, T query tokens, S key tokens (cached and new).

torch's SDPA needs no mask to be causal over T = S tokens. Padding, packed documents and a filled cache do need one, and
whole it would take B·T·S numbers where attention itself, by a flash kernel, takes T. A block of it takes
`QUERY_BLOCK`·S.
"""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from transformers import AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, sdpa_mask

from deepseek_hf.configuration.configuration_deepseek import DeepseekConfigBase

QUERY_BLOCK = 512  # queries; rows enough to keep matrix products busy, few enough for a small mask


class QueryBlock(NamedTuple):
    """The queries `start` … `end`-1, which see none but the first `visible` keys, and of those what `mask`
    [B or 1, 1, end-start, visible] says: True (or 0, if it is additive) for visible. `None`: all of them."""

    start: int
    end: int
    visible: int
    mask: torch.Tensor | None


class QueryBlockMasks:
    """The causal mask of T queries on S keys, as the masks of blocks of queries."""

    def __init__(self, num_queries: int, num_keys: int, first_position: int, make_mask: Callable[..., torch.Tensor]):
        self.num_queries = num_queries
        self.num_keys = num_keys
        self.first_position = first_position  # of the first query, counted in keys
        self.make_mask = make_mask

    def blocks(self, device: torch.device) -> Iterator[QueryBlock]:
        for start in range(0, self.num_queries, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, self.num_queries)
            position = self.first_position + start
            visible = min(self.num_keys, self.first_position + end)
            mask = self.make_mask(q_length=end - start, q_offset=position, kv_length=visible)
            yield QueryBlock(start, end, visible, mask.to(device))


def query_block_masks(
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    attention_mask: torch.Tensor | None,
    allow_is_causal_skip: bool,
    **kwargs,
) -> QueryBlockMasks | None:
    """A mask function for transformers' `AttentionMaskInterface`; `attention_mask` [B, S] tells padding, the rest is as
    `sdpa_mask` takes it. `None` where SDPA's own causality says everything: no padding and nothing cached."""
    first_position = int(q_offset)
    unpadded = attention_mask is None or bool(attention_mask[:, :q_length].all())
    if allow_is_causal_skip and first_position == 0 and unpadded:
        return None

    def make_mask(**block) -> torch.Tensor:
        return sdpa_mask(**block, attention_mask=attention_mask, allow_is_causal_skip=False, **kwargs)

    return QueryBlockMasks(q_length, kv_length, first_position, make_mask)


AttentionMaskInterface.register("sdpa_by_query_blocks", query_block_masks)


def causal_mask(
    config: DeepseekConfigBase,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor,
    layer_idx: int | None = None,
) -> torch.Tensor | QueryBlockMasks | None:
    """transformers' `create_causal_mask`, by blocks where SDPA is to attend with more than `QUERY_BLOCK` queries.

    Args:
        inputs_embeds: [B, T, H].
        attention_mask: [B, S], 1 for real tokens, or a prepared 4-D mask, which is returned as it is.
        position_ids: [B or 1, T]; where they restart within a row, a new document begins.
        layer_idx: a layer whose cache has another length than the first's.
    """
    if config._attn_implementation == "sdpa" and inputs_embeds.shape[1] > QUERY_BLOCK:
        config = copy.copy(config)
        config._attn_implementation = "sdpa_by_query_blocks"
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        layer_idx=layer_idx,
    )


def query_blocks(
    attention_mask: torch.Tensor | QueryBlockMasks | None,
    num_queries: int,
    num_keys: int,
    device: torch.device,
    block_size: int = QUERY_BLOCK,
) -> Iterator[QueryBlock]:
    """Any mask that `causal_mask` returns for the kernels of SDPA and eager attention, by blocks of queries.

    No mask stands for causality from the first key on: a static cache may have room beyond the last.
    """
    if isinstance(attention_mask, QueryBlockMasks):
        yield from attention_mask.blocks(device)
        return
    for start in range(0, num_queries, block_size):
        end = min(start + block_size, num_queries)
        if attention_mask is not None:
            yield QueryBlock(start, end, num_keys, attention_mask[:, :, start:end, :num_keys])
        elif num_queries == 1:
            yield QueryBlock(start, end, num_keys, None)
        else:
            yield QueryBlock(start, end, end, torch.ones(end - start, end, dtype=torch.bool, device=device).tril(start))
