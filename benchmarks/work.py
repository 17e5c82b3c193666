"""The arithmetic and the memory traffic that a step cannot do without, counted from the architecture.

Shapes: B batch, T query tokens, S key tokens, H heads, N / R / V content, rotary and value widths of a head, C latent
width, E routed experts, K experts a token, L layers. A multiplication with its addition counts as two operations.
"""

from dataclasses import dataclass

from torch import nn

from deepseek_hf.configuration import DeepseekV2Config


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes read from memory, of one phase of a step."""

    flops: float
    bytes: float

    def times(self, factor: float) -> "Work":
        """The same weights or keys, read and multiplied `factor` times."""
        return Work(self.flops * factor, self.bytes * factor)


def weights(module: nn.Module, config: DeepseekV2Config, tokens: int) -> Work:
    """Passing `tokens` tokens (over all rows) through all weight matrices of `module`, each read once.

    Of the routed experts (the matrices with three dimensions) a token takes K; the tokens together read those that any
    of them takes, E·(1 - (1 - K/E)^tokens) of E if all are equally likely. The embedding is a look-up: no work.
    """
    share = config.num_experts_per_tok / config.n_routed_experts
    flops = size = 0.0
    for name, parameter in module.named_parameters():
        if parameter.dim() == 3:
            flops += 2 * tokens * share * parameter.numel()
            size += parameter.nbytes * (1 - (1 - share) ** tokens)
        elif parameter.dim() == 2 and "embed_tokens" not in name:
            flops += 2 * tokens * parameter.numel()
            size += parameter.nbytes
    return Work(flops, size)


def latent_attention(config: DeepseekV2Config, batch: int, context: int, itemsize: int) -> Work:
    """One decoding step: each head's query against `context` latents of C + R numbers, in all layers (absorbed form).

    Flops B·L·H·S·2·(2C + R): scores over C + R, values over C; the C + R numbers are read once.
    """
    C, R, L = config.kv_lora_rank, config.qk_rope_head_dim, config.num_hidden_layers
    keys = batch * context * L
    return Work(2 * keys * config.num_attention_heads * (2 * C + R), keys * (C + R) * itemsize)


def causal_attention(config: DeepseekV2Config, batch: int, tokens: int, itemsize: int) -> Work:
    """Prefill: each token attends to itself and all before it, in all layers (expanded form).

    Flops B·L·H·T(T+1)/2·2·(N + R + V); queries, keys and values are read once.
    """
    width = config.qk_head_dim + config.v_head_dim
    heads = batch * config.num_hidden_layers * config.num_attention_heads
    return Work(heads * tokens * (tokens + 1) * width, heads * tokens * (width + config.qk_head_dim) * itemsize)
