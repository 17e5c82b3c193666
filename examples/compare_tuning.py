"""What can be adapted, compared: the held-out loss of the recipes after equally many steps on the tiny model.

    python examples/compare_tuning.py

Runs the recipes one after the other (about a minute each on two cores) and rewrites the table in `finetune/README.md`.
"""

import json
import re
import sys
from pathlib import Path

from deepseek_hf.finetune import train

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "finetune" / "README.md"
TABLE = re.compile(r"(<!-- comparison -->\n).*?(<!-- end of comparison -->)", re.DOTALL)
RECIPES = {
    "attention_lora": "LoRA on attention",
    "expert_lora": "LoRA on the routed experts",
    "esft": "ESFT, full weights of the chosen experts",
    "esft_lora": "ESFT, LoRA on the chosen experts",
    "all_mtp_lora": "LoRA on everything, MTP layer included",
}


def measure(recipe: str, folder: Path, options: list[str]) -> dict[str, float]:
    """Runs `recipe` and returns its metrics, with the bytes of the tensors that it saved as `saved_bytes`."""
    output = folder / recipe
    arguments = ["--output_dir", str(output), "--overwrite_output_dir", "--sample_tokens", "0", *options]
    train.main([str(ROOT / f"finetune/recipes/{recipe}.yaml"), *arguments])
    metrics = json.loads((output / "all_results.json").read_text())
    return metrics | {"saved_bytes": sum(path.stat().st_size for path in output.glob("*.safetensors"))}


def as_table(results: dict[str, dict[str, float]], max_steps: int) -> str:
    before = next(iter(results.values()))["eval_before_loss"]
    lines = [
        f"Held-out loss of the tiny model's answers, {before:.3f} before, after {max_steps} steps of 8 conversations:",
        "",
        "| recipe | what is trained | parameters | saved | held-out loss |",
        "| --- | --- | --- | --- | --- |",
    ]
    for recipe, metrics in results.items():
        lines.append(
            f"| [`{recipe}`](recipes/{recipe}.yaml) | {RECIPES[recipe]} | {metrics['trained_parameters']:,.0f} | "
            f"{metrics['saved_bytes'] / 1e6:.2f} MB | {metrics['eval_loss']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main(options: list[str]) -> None:
    """`options` are added to every run, as `--max_steps 20`."""
    results = {recipe: measure(recipe, ROOT / "output" / "comparison", options) for recipe in RECIPES}
    state = json.loads((ROOT / "output/comparison" / next(iter(RECIPES)) / "trainer_state.json").read_text())
    table = as_table(results, state["global_step"])
    DOCS.write_text(TABLE.sub(lambda marks: f"{marks[1]}{table}{marks[2]}", DOCS.read_text()))
    print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
