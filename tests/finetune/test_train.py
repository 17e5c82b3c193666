"""The training script as people start it, in processes of its own."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepseek_hf.finetune import train
from deepseek_hf.finetune.data import load_chat_dataset
from deepseek_hf.finetune.esft import ExpertConfig
from deepseek_hf.finetune.expert_scores import collect_expert_scores
from deepseek_hf.modeling import DeepseekV3ForCausalLM

ROOT = Path(train.__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
IDS = torch.arange(5, 45).unsqueeze(0)


@pytest.fixture
def recipe(base, files, tmp_path):
    """Writes a recipe of a few steps and returns its path."""
    fields = {
        "model_name_or_path": str(base),
        "train_file": str(files[0]),
        "eval_file": str(files[1]),
        "output_dir": str(tmp_path / "out"),
        "sample_tokens": 8,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }

    def write(**changes) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(fields | changes))
        return str(path)

    return write


def run(*command: str) -> str:
    """Runs `command` from the root of the repository and returns what it printed."""
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launch(*arguments: str) -> str:
    # The launcher of this interpreter's environment, which need not be the activated one.
    return run(str(Path(sys.executable).with_name("accelerate")), "launch", *arguments)


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


LOAD_ON_TRANSFORMERS_OWN = """
import sys, torch
from peft import PeftModel
from transformers import DeepseekV3ForCausalLM
base, adapter, result = sys.argv[1:]
model = PeftModel.from_pretrained(DeepseekV3ForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    torch.save(model(torch.arange(5, 45).unsqueeze(0)).logits, result)
assert not any(name.startswith("deepseek_hf") for name in sys.modules)
"""


def test_adapter_from_start_to_use(recipe, base, tmp_path):
    printed = launch("finetune/train.py", recipe(lora_targets=["all"]), "--max_steps", "30", "--eval_strategy", "epoch")
    out = tmp_path / "out"
    metrics = json.loads((out / "all_results.json").read_text())
    assert metrics["eval_loss"] < metrics["eval_before_loss"] - 0.3  # from ln(300) = 5.7 with a frozen random head
    assert f"Held-out loss: {metrics['eval_before_loss']:.3f} → {metrics['eval_loss']:.3f}" in printed
    assert printed.index("Question:\nWhat is 0 plus 0?") < printed.index("Before:") < printed.index("After:")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert {"loss", "mtp_loss", "aux_loss", "max_vio"} <= history[0].keys()
    for file in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / file).exists()
    assert not (out / "model.safetensors").exists()

    untuned = logits(AutoModelForCausalLM.from_pretrained(base))
    ours = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out))
    run(sys.executable, "-c", LOAD_ON_TRANSFORMERS_OWN, str(base), str(out), str(tmp_path / "logits.pt"))
    theirs = torch.load(tmp_path / "logits.pt")
    assert (ours - untuned).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # float32, another order of summation


def test_module_trains_all_weights(recipe, base, tmp_path):
    run(
        *(sys.executable, "-m", "deepseek_hf.finetune.train", recipe(lora=False, router_bias_speed=0.01)),
        *("--activation_checkpointing", "--packing", "--bf16"),
    )
    tuned = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, start in DeepseekV3ForCausalLM.from_pretrained(base).state_dict().items():
        if name != "model.embed_tokens.weight":  # the rows of unseen tokens stay
            assert not torch.equal(tuned[name], start), name


def test_two_processes_save_one_adapter(recipe, base, files, tokenizer, tmp_path):
    """Of the experts that the two have chosen together, each by scoring its half of the data."""
    two = ("--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    printed = launch(*two, "finetune/train.py", recipe(lora_targets=["experts"], esft_top_p=0.5))
    out = tmp_path / "out"
    rows, _ = load_chat_dataset(str(files[0]), tokenizer, 1024)
    batches = ({"input_ids": torch.tensor([row["input_ids"]])} for row in rows)
    scores = collect_expert_scores(DeepseekV3ForCausalLM.from_pretrained(base), batches, 10**6)
    written = json.loads((out / "expert_scores.json").read_text())["token_scores"]["1"]
    assert list(written.values()) == pytest.approx(scores.shares("token")[1].tolist(), abs=1e-3)  # padding, rounding
    assert ExpertConfig.read(out / "expert_cfg.json").experts == scores.choose("token", 0.5)

    assert {path.name for path in out.iterdir()} == {
        *("expert_cfg.json", "expert_scores.json", "expert_scores.png"),
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "all_results.json", "loss.png"),
        *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "trainer_state.json"),
        *("training_args.bin", "checkpoint-2", "checkpoint-4"),
    }
    assert (out / "checkpoint-4" / "rng_state_1.pth").exists()  # there was a second process
    assert printed.count("Held-out loss:") == 1


RANK = """
import sys, torch
from deepseek_hf.finetune import DeepseekTrainer, RouterBiasCallback
from deepseek_hf.finetune.arguments import FinetuningArguments
from deepseek_hf.modeling import DeepseekV3ForCausalLM
base, out, batch_size = sys.argv[1:]
torch.manual_seed(0)
ids = torch.randint(5, 300, (24, 16)).tolist()
targets = (4, 16)
labels = [row[: targets[i % 2]] + [-100] * (16 - targets[i % 2]) for i, row in enumerate(ids)]
rows = [{"input_ids": row, "labels": row_labels} for row, row_labels in zip(ids, labels)]
model = DeepseekV3ForCausalLM.from_pretrained(base)
args = FinetuningArguments(out, max_steps=3, logging_steps=1, save_strategy="no", use_cpu=True,
                           per_device_train_batch_size=int(batch_size), learning_rate=1e-3)
trainer = DeepseekTrainer(model=model, args=args, train_dataset=rows, callbacks=[RouterBiasCallback(0.125)])
trainer.train()
result = f"{out}/rank{args.process_index}-of-{args.world_size}.pt"
torch.save((model.state_dict(), trainer.state.log_history[:3]), result)
"""


def test_two_processes_train_as_one(base, tmp_path, monkeypatch):
    """Two processes with batches of 4 against one with batches of 8: the same weights and figures if losses are
    divided by the number of targets on both ranks together, the same biases if loads are summed over ranks."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    monkeypatch.setattr(sys, "argv", [str(script), str(base), str(tmp_path), "8"])
    runpy.run_path(str(script))
    two = ("--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    launch(*two, str(script), str(base), str(tmp_path), "4")
    (one, log), *ranks = (torch.load(tmp_path / f"rank{name}.pt") for name in ("0-of-1", "0-of-2", "1-of-2"))
    torch.testing.assert_close(ranks[0][0], ranks[1][0], rtol=0, atol=0)
    for name, expected in one.items():
        # biases are sums of ±0.125, exact; AdamW shows float32 noise in small gradients as about 1e-5 in weights
        tolerance = 0 if name.endswith("e_score_correction_bias") else 5e-5
        torch.testing.assert_close(ranks[0][0][name], expected, rtol=0, atol=tolerance, msg=name)
    for entry, expected in zip(ranks[0][1], log, strict=True):
        for key in ("loss", "mtp_loss", "max_vio"):
            assert entry[key] == pytest.approx(expected[key], rel=1e-4), key


WHAT_IS_TRAINED = {
    "adapter": (),
    "all weights": ("--lora", "false", "--router_bias_speed", "0.01"),
    "chosen experts": ("--lora", "false", "--esft_top_p", "0.5"),
    "chosen experts' adapter": ("--lora_targets", "experts", "--esft_top_p", "0.5"),
}


@pytest.mark.parametrize("options", WHAT_IS_TRAINED.values(), ids=WHAT_IS_TRAINED)
def test_resumed_run_ends_where_the_whole_one_does(recipe, tmp_path, options):
    train.main([recipe(), *options])
    resumed = [
        "--output_dir",
        str(tmp_path / "resumed"),
        "--resume_from_checkpoint",
        str(tmp_path / "out/checkpoint-2"),
    ]
    train.main([recipe(), *options, *resumed])
    logged = json.loads((tmp_path / "resumed/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logged if "loss" in entry] == [1, 2, 3, 4]  # 1 and 2 come from the checkpoint
    assert not (tmp_path / "resumed/checkpoint-2").exists()
    file = "model.safetensors" if "--lora" in options else "adapter_model.safetensors"
    whole, rest = load_file(tmp_path / "out" / file), load_file(tmp_path / "resumed" / file)
    torch.testing.assert_close(rest, whole, rtol=0, atol=1e-6)  # the same operations, but for threads' order


def test_last_checkpoint_is_resumed_in_place(recipe, tmp_path):
    train.main([recipe()])
    train.main([recipe(), "--resume_from_checkpoint", "true", "--max_steps", "5"])
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4, 5]


def test_earlier_results_are_not_overwritten_unasked(recipe, tmp_path, capsys):
    old = tmp_path / "out/checkpoint-900"
    old.mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"out is not empty.*resume_from_checkpoint.*overwrite_output_dir"):
        train.main([recipe()])
    assert old.exists()
    train.main([recipe(max_steps=1), "--overwrite_output_dir"])
    assert not old.exists()
    assert f"deleting {old}" in capsys.readouterr().out


@pytest.fixture
def adapter_run(recipe):
    """A finished run of one step."""
    train.main([recipe(max_steps=1, save_steps=1, eval_file=None)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--train_file", "nowhere.jsonl"], FileNotFoundError, "nowhere.jsonl"),
        (["--router_bias_speed", "0.1"], ValueError, "router_bias_speed=0.1"),
        (["--esft_top_p", "1.5"], ValueError, "esft_top_p=1.5; accepted: above 0, up to 1"),
        (["--esft_top_p", "0.5"], ValueError, r"lora_targets=\['attention'\]; accepted with ESFT: \[experts\]"),
        (["--lora", "false", "--expert_config", "nowhere.json"], FileNotFoundError, "nowhere.json"),
        (["--expert_config", "a.json", "--esft_top_p", "0.5"], ValueError, "set one of the two"),
        (["--lora", "false", "--per_expert_adapter"], ValueError, "per_expert_adapter is true and lora false"),
        (["--output_dir", "elsewhere", "--resume_from_checkpoint", "true"], FileNotFoundError, "no such checkpoint"),
        (["--resume_from_checkpoint", "nowhere"], FileNotFoundError, "no such checkpoint"),
    ],
)
def test_error_before_any_work(recipe, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        train.main([recipe(), *options])
    assert not (tmp_path / "out").exists()


def test_named_experts(recipe, tmp_path, capsys):
    path = tmp_path / "experts.json"
    path.write_text('{"experts": {"1": [2]}, "shared_experts": true, "non_expert_modules": false}')
    options = ["--expert_config", str(path), "--max_steps", "1"]
    train.main([recipe(lora=False), *options])
    assert "ESFT trains 1 of 4 experts (1 to 1 a layer); shared experts: True" in capsys.readouterr().out
    prefix, names = "layers.1.mlp.", load_file(tmp_path / "out/model.safetensors").keys()
    modules = ("experts.2", "shared_experts")
    assert names == {f"{prefix}{m}.{p}_proj.weight" for m in modules for p in ("gate", "up", "down")}
    with pytest.raises(ValueError, match=r"expert_config has shared_experts=True .* accepted with lora: false"):
        train.main([recipe(lora_targets=["experts"]), *options, "--overwrite_output_dir"])


def test_adapter_of_another_base_is_refused(recipe, adapter_run, base, tmp_path):
    resume = ["--resume_from_checkpoint", "true"]
    other = shutil.copytree(base, tmp_path / "other")
    with pytest.raises(ValueError, match=r"its adapter has base_model_name_or_path=.*base.*, and this run .*other"):
        train.main([recipe(), *resume, "--model_name_or_path", str(other)])
    with pytest.raises(ValueError, match="its adapter has r=16, and this run 4"):
        train.main([recipe(), *resume, "--lora_r", "4"])
    with pytest.raises(ValueError, match="was not made by ESFT; leave out expert_config or esft_top_p"):
        train.main([recipe(lora_targets=["experts"], esft_top_p=0.5), *resume])
    with pytest.raises(ValueError, match="holds an adapter; set lora to true"):
        train.main([recipe(), *resume, "--lora", "false"])


def test_other_architecture_is_refused(recipe, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type='llama'; accepted: deepseek, deepseek_v2, deepseek_v3"):
        train.main([recipe(), "--model_name_or_path", str(tmp_path)])
