"""FP8 checkpoints: block-wise scaled weights, dequantised on load (DeepSeek-V3 §3.3.2, arXiv 2412.19437).

A weight is stored in e4m3 with one scale for each block of 128×128 values: `<name>.weight` beside
`<name>.weight_scale_inv` [⌈rows/128⌉, ⌈columns/128⌉]. The weight is value times scale. Blocks at the lower and right
edge are cut short where the dimensions do not divide by 128.

transformers' own reader divides the weight evenly among the scales, which is right only for whole blocks. Here its
quantiser is kept and that one operation replaced, under a quantisation method of our own name.
"""

import torch
from transformers import PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config

METHOD = "deepseek_block_fp8"


def dequantize_blocks(
    weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """`weight` [R, C] in FP8 and `scale` [⌈R/b₀⌉, ⌈C/b₁⌉] → the weight [R, C] in `dtype`.

    Raises `ValueError` where the scales do not cover the weight.
    """
    blocks = tuple(-(-size // block) for size, block in zip(weight.shape, block_size, strict=True))
    if tuple(scale.shape) != blocks:
        raise ValueError(
            f"`weight_scale_inv` has shape {tuple(scale.shape)}; accepted: {blocks}, one scale for each "
            f"{block_size[0]}×{block_size[1]} block of a weight of shape {tuple(weight.shape)}."
        )
    for dim, block in enumerate(block_size):
        scale = scale.float().repeat_interleave(block, dim=dim).narrow(dim, 0, weight.shape[dim])
    return (weight.float() * scale).to(dtype)


class DequantizeBlocks(Fp8Dequantize):
    """transformers' pairing of weights and scales, with blocks that may be cut short."""

    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        block_size = self.hf_quantizer.quantization_config.weight_block_size
        return dequantize_blocks(quantized, scales, tuple(block_size), output_dtype or torch.bfloat16)


@register_quantization_config(METHOD)
class BlockFp8Config(FineGrainedFP8Config):
    """`quantization_config` of an FP8 checkpoint that is dequantised on load."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs | {"quant_method": METHOD, "dequantize": True})


@register_quantizer(METHOD)
class BlockFp8Quantizer(FineGrainedFP8HfQuantizer):
    """Loads FP8 weights into the model's own dtype, on any device; the loaded model is an ordinary one."""

    def get_load_operations(self) -> dict:
        return {"dequantize": DequantizeBlocks}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> PreTrainedModel:
        # Saved, the model is like any other. transformers (read in 5.23) would undo the conversions that loading
        # used, scales and all, which it keeps in this private attribute; without it, those of the model type apply.
        vars(model).pop("_weight_conversions", None)
        return model

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype
