"""Reads configurations with transformers' own classes: `python transformers_own.py FOLDER...` → JSON, folder → fields.

A process of its own, because importing `deepseek_hf.modeling` puts this project's classes behind `AutoConfig`.
"""

import json
import sys

from transformers import AutoConfig

configs = {folder: AutoConfig.from_pretrained(folder) for folder in sys.argv[1:]}
assert all(type(config).__module__.startswith("transformers.models.") for config in configs.values())
print(json.dumps({folder: config.to_dict() for folder, config in configs.items()}))
