"""FP8 checkpoints: block-wise scaled weights, dequantised on load (DeepSeek-V3 §3.3.2, arXiv 2412.19437).

A weight is stored in e4m3 with one scale for each block of 128×128 values: `<name>.weight` beside
`<name>.weight_scale_inv` [⌈rows/128⌉, ⌈columns/128⌉]. The weight is value times scale. Blocks at the lower and right
edge are cut short where the dimensions do not divide by 128.

transformers' own reader divides the weight evenly among the scales, which is right only for whole blocks. Here its
quantiser is kept and that one operation replaced, under a quantisation method of our own name.
"""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config, QuantizationConfigMixin

METHOD = "deepseek_block_fp8"


def block_size(quantization: dict) -> tuple[int, int]:
    """Rows and columns of a block, by a `quantization_config`. Raises `ValueError` where it gives no blocks."""
    size = quantization.get("weight_block_size", (128, 128))
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        raise ValueError(
            f"`quantization_config['weight_block_size']` is {size!r}; accepted: [rows, columns], two positive integers."
        )
    return tuple(size)


def scale_shape(weight_shape: tuple[int, int], block_size: tuple[int, int]) -> tuple[int, ...]:
    """[R, C] → [⌈R/b₀⌉, ⌈C/b₁⌉]: how many blocks a weight has, the last of a row or column cut short."""
    return tuple(-(-size // block) for size, block in zip(weight_shape, block_size, strict=True))


def dequantize_blocks(
    weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """`weight` [R, C] in FP8 and `scale` [⌈R/b₀⌉, ⌈C/b₁⌉] → the weight [R, C] in `dtype`.

    Raises `ValueError` where the scales do not cover the weight or are no numbers but bytes.
    """
    if not scale.is_floating_point():
        raise ValueError(f"`weight_scale_inv` is stored in {scale.dtype}; accepted: float32 or float8_e8m0fnu.")
    blocks = scale_shape(tuple(weight.shape), block_size)
    if tuple(scale.shape) != blocks:
        raise ValueError(
            f"`weight_scale_inv` has shape {tuple(scale.shape)}; accepted: {blocks}, one scale for each "
            f"{block_size[0]}×{block_size[1]} block of a weight of shape {tuple(weight.shape)}."
        )
    for dim, block in enumerate(block_size):
        scale = scale.float().repeat_interleave(block, dim=dim).narrow(dim, 0, weight.shape[dim])
    return (weight.float() * scale).to(dtype)


def is_fp8(config: PreTrainedConfig) -> bool:
    """Whether the configuration is that of a checkpoint in block-wise scaled FP8."""
    quantization = getattr(config, "quantization_config", None)
    return isinstance(quantization, dict) and quantization.get("quant_method") == "fp8"


def dequantizing(config: PreTrainedConfig, asked: QuantizationConfigMixin | None) -> PreTrainedConfig:
    """A copy of an FP8 checkpoint's `config` that names our reader.

    `asked` is the caller's `quantization_config`. Raises `ValueError` where it asks for anything but dequantised
    weights, or where the checkpoint's gives no blocks.
    """
    if asked is not None and not (isinstance(asked, FineGrainedFP8Config) and asked.dequantize):
        raise ValueError(
            f"`quantization_config` is {asked!r} and the checkpoint is in FP8; accepted: nothing, or "
            "`FineGrainedFP8Config(dequantize=True)`, as FP8 weights are dequantised on load. To quantise them in "
            "another way, save the loaded model and load that."
        )
    block_size(config.quantization_config)
    config = copy.deepcopy(config)
    config.quantization_config = config.quantization_config | {"quant_method": METHOD}
    return config


class DequantizeBlocks(Fp8Dequantize):
    """transformers' pairing of weights and scales, with blocks that may be cut short.

    What is not in FP8 passes through here too, and gets the model's dtype like the rest.
    """

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor] | torch.Tensor],
        full_layer_name: str | None = None,
        model: torch.nn.Module | None = None,
        **kwargs,
    ) -> dict[str, list[torch.Tensor] | torch.Tensor]:
        """Weights and scales by source pattern → weights. Raises `ValueError` for an FP8 weight without a scale."""
        dtype = self._get_target_dtype(model, full_layer_name)

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dtype.itemsize == 1:
                raise ValueError(f"{full_layer_name} is read from FP8 weights without `weight_scale_inv`.")
            return tensor.to(dtype)

        converted = super().convert(input_dict, full_layer_name=full_layer_name, model=model, **kwargs)
        return {
            name: [cast(tensor) for tensor in value] if isinstance(value, list) else cast(value)
            for name, value in converted.items()
        }

    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        blocks = tuple(self.hf_quantizer.quantization_config.weight_block_size)
        return dequantize_blocks(quantized, scales, blocks, output_dtype or torch.bfloat16)


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
