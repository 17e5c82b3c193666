"""The comparison of recipes, for one step of one of them."""

import json

import compare_tuning
import pytest
from compare_tuning import DOCS, RECIPES, ROOT, TABLE, as_table, measure


def test_measured_row(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    held_out = ROOT / "examples/data/python_stdlib_instructions_heldout.jsonl"
    (tmp_path / "rows.jsonl").write_text("".join(held_out.read_text().splitlines(keepends=True)[:8]))
    rows = str(tmp_path / "rows.jsonl")
    options = ["--train_file", rows, "--eval_file", rows, "--max_steps", "2", "--warmup_steps", "0", "--use_cpu"]
    metrics = measure("attention_lora", tmp_path, options)
    results = json.loads((tmp_path / "attention_lora/all_results.json").read_text())
    row = as_table({"attention_lora": metrics}, max_steps=2).splitlines()[-1]
    assert row.endswith(f"| {results['eval_loss']:.3f} |")
    # Four bytes a parameter and the file's header.
    assert metrics["saved_bytes"] / 4 == pytest.approx(metrics["trained_parameters"], rel=0.05)


def test_page_has_the_recipes_and_the_place_for_the_table():
    assert len(TABLE.findall(DOCS.read_text())) == 1
    assert all((ROOT / f"finetune/recipes/{recipe}.yaml").exists() for recipe in RECIPES)
    assert compare_tuning.__doc__.splitlines()[2].strip() in DOCS.read_text()  # the command that makes it
