"""Every recipe of the repository runs, on its own model, for a few steps and a little of its data."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepseek_hf.finetune import train
from deepseek_hf.finetune.esft import EXPERT_CONFIG_NAME, ExpertConfig, load_esft

ROOT = Path(train.__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "finetune/recipes").glob("*.yaml"))
BASE = ROOT / "examples/tiny-deepseek-v3"
PER_EXPERT = {"expert_lora", "esft_lora"}


@pytest.fixture(scope="module")
def excerpts(tmp_path_factory) -> dict[str, str]:
    """The first rows of the recipes' data."""
    folder = tmp_path_factory.mktemp("excerpts")
    for name, rows in (("train", 24), ("eval", 8)):
        source = f"python_stdlib_instructions{'_heldout' if name == 'eval' else ''}.jsonl"
        lines = (ROOT / "examples/data" / source).read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:rows]))
    return {f"{name}_file": str(folder / f"{name}.jsonl") for name in ("train", "eval")}


def changed_tensors(checkpoint: Path) -> set[str]:
    """The names of the tensors in which `checkpoint` differs from the base model."""
    base, trained = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (BASE, checkpoint))
    assert base.keys() == trained.keys()
    return {key for key, tensor in base.items() if not torch.equal(tensor, trained[key])}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore:lora_targets")
def test_recipe_runs(name, excerpts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    changes = excerpts | {"output_dir": str(tmp_path), "max_steps": "2", "sample_tokens": "0", "warmup_steps": "0"}
    changes |= {"disable_tqdm": "true", "eval_strategy": "no", "save_strategy": "no", "use_cpu": "true"}
    train.main([f"finetune/recipes/{name}.yaml", *(f"--{field}={value}" for field, value in changes.items())])
    metrics = json.loads((tmp_path / "all_results.json").read_text())
    # A draft head is trained beside the frozen model, whose own loss stays as it was.
    assert (metrics["eval_loss"] != metrics["eval_before_loss"]) == (name != "draft_head")
    printed = capsys.readouterr().out

    base = AutoModelForCausalLM.from_pretrained(BASE)
    mtp_layer = f"model.layers.{base.config.num_hidden_layers}."
    is_esft = name.startswith("esft")
    assert (tmp_path / EXPERT_CONFIG_NAME).exists() == (tmp_path / "expert_scores.png").exists() == is_esft
    if is_esft:
        chosen = ExpertConfig.read(tmp_path / EXPERT_CONFIG_NAME)
        assert f"ESFT trains {sum(map(len, chosen.experts.values()))} of " in printed
        load_esft(base, tmp_path)
    elif name == "draft_head":
        changed = changed_tensors(tmp_path)
        assert changed and all(key.startswith(mtp_layer) for key in changed)
    else:
        PeftModel.from_pretrained(base, tmp_path).merge_and_unload().save_pretrained(tmp_path / "merged")
        changed = changed_tensors(tmp_path / "merged")
        assert changed and any(key.startswith(mtp_layer) for key in changed) == (name == "all_mtp_lora")
    assert ("in all:" in printed) == (name not in ("esft", "draft_head"))
    assert (tmp_path / "per_expert/adapter_model.safetensors").exists() == (name in PER_EXPERT)
    if name in PER_EXPERT:
        tensors = load_file(tmp_path / "per_expert/adapter_model.safetensors")
        assert any(re.search(r"\.mlp\.experts\.\d+\.", key) for key in tensors)
