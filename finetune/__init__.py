"""From a base DeepSeek checkpoint to a tuned one: `accelerate launch finetune/train.py recipe.yaml`.

`arguments` reads the recipe, `data` the conversations; `adapter` adds LoRA, `expert_scores` and `esft` choose the
experts that a task uses and train those alone, `per_expert` writes adapters for other engines; `trainer` and
`router_bias` are what the Trainer lacks for mixtures of experts, and `train` is the script that puts them together.
"""

from .adapter import add_adapter, load_adapter
from .data import load_chat_dataset
from .esft import ExpertConfig, load_esft, save_esft, specialize
from .expert_scores import collect_expert_scores
from .per_expert import export_per_expert, import_per_expert
from .router_bias import RouterBiasCallback
from .trainer import DeepseekTrainer

__all__ = [
    "DeepseekTrainer",
    "ExpertConfig",
    "RouterBiasCallback",
    "add_adapter",
    "collect_expert_scores",
    "export_per_expert",
    "import_per_expert",
    "load_adapter",
    "load_chat_dataset",
    "load_esft",
    "save_esft",
    "specialize",
]
