"""What the README tells people to paste is run as it stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^(<!--[^\n]*-->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCED.findall((ROOT / "README.md").read_text())
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def command(marker):
    return next(text for comment, _, text in BLOCKS if marker in comment)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder that looks like a clone, where blocks may write without touching this one."""
    for folder in ("examples", "finetune"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_blocks_in_order(clone):
    blocks = [(language, text) for comment, language, text in BLOCKS if not comment and language in ("python", "bash")]
    assert {language for language, _ in blocks} == {"python", "bash"}
    namespace = {}
    for language, text in blocks:
        if language == "python":
            exec(compile(text, "README.md", "exec"), namespace)
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True, env=ENVIRONMENT)
    saved = json.loads((clone / "output/merged/config.json").read_text())
    assert saved["architectures"] == ["DeepseekV3ForCausalLM"] and saved["num_nextn_predict_layers"] == 1


def test_the_main_job(clone):
    """The command behind the installation: the tuned model must fit held-out answers better than the base."""
    _, _, job = command("the main job").rpartition("&& .venv/bin/")
    assert job.startswith("accelerate launch ")
    done = subprocess.run(["bash", "-c", job], check=True, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    results = next(clone.rglob("all_results.json"))
    metrics = json.loads(results.read_text())
    assert metrics["eval_loss"] < metrics["eval_before_loss"] - 0.3
    assert "Before" in done.stdout and "After" in done.stdout
    assert (results.parent / "adapter_model.safetensors").exists()


def test_test_command_is_what_ci_runs():
    extracted = subprocess.run(
        ["sed", "-n", "/<!-- the tests -->/,/^```$/p", ROOT / "README.md"], capture_output=True, text=True, check=True
    ).stdout
    assert command("the tests").strip() in extracted and "pytest" in command("the tests")
