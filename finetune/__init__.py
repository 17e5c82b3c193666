"""From a base DeepSeek checkpoint to a tuned one: `accelerate launch finetune/train.py recipe.yaml`.

`arguments` reads the recipe, `data` the conversations; `adapter` adds LoRA, `trainer` and `router_bias` are what the
Trainer lacks for mixtures of experts, and `train` is the script that puts them together.
"""

from .adapter import add_adapter
from .data import load_chat_dataset
from .router_bias import RouterBiasCallback
from .trainer import DeepseekTrainer

__all__ = ["DeepseekTrainer", "RouterBiasCallback", "add_adapter", "load_chat_dataset"]
