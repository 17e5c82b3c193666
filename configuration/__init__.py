"""What a DeepSeek checkpoint says about itself: the three families' `config.json`, read, validated, written back."""

from .configuration_deepseek import DeepseekConfig, DeepseekV2Config, DeepseekV3Config

__all__ = ["DeepseekConfig", "DeepseekV2Config", "DeepseekV3Config"]
