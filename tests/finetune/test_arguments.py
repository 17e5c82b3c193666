from pathlib import Path

import pytest
import yaml

from deepseek_hf.finetune import arguments
from deepseek_hf.finetune.arguments import parse_recipe

RECIPE = {
    "model_name_or_path": "some/model",
    "train_file": "rows.jsonl",
    "output_dir": "out",
    "learning_rate": "1e-4",  # YAML 1.1 reads 1e-4, without a dot, as text
    "lora_targets": ["attention", "experts"],
    "lora_config": {"use_rslora": True},
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "packing": True,
    "eval_file": None,
}


@pytest.fixture
def recipe(tmp_path):
    def write(**fields) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(RECIPE | fields))
        return str(path)

    return write


def test_recipe_and_command_line_become_typed_arguments(recipe):
    model, data, lora, training = parse_recipe(
        [recipe(), "--lora-targets", "all+mtp", "--no_lora", "--learning_rate=3e-4", "--max_steps", "-1"]
    )
    assert model.model_name_or_path == "some/model"
    assert (data.packing, data.eval_file) == (True, None)
    assert (lora.lora, lora.lora_targets) == (False, ["all+mtp"])
    assert (training.learning_rate, training.max_steps) == (3e-4, -1)
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert lora.peft_arguments == {"use_rslora": True}


def test_recipe_alone_keeps_its_values(recipe):
    _, _, lora, training = parse_recipe([recipe()])
    assert training.learning_rate == 1e-4
    assert lora.lora_targets == ["attention", "experts"]


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"learning_rat": 1}, [], "unknown field 'learning_rat'; did you mean learning_rate"),
        ({}, ["--trainfile", "x"], "command line: unknown field 'trainfile'; did you mean train_file"),
        ({}, ["--no_packin"], "unknown field 'packin'; did you mean packing"),
        ({}, ["stray"], "stray"),
        ({"max_length": "long"}, [], "invalid int value: 'long'"),
        ({"long_rows": "keep"}, [], "choose from error, drop, truncate"),
        ({"lora_targets": ["gate"]}, [], "choose from attention, experts, shared_experts, all, all+mtp, router"),
        ({"lora_config": "use_rslora"}, [], "lora_config: use_rslora is not a mapping"),
        ({"train_file": None}, [], "the following arguments are required: --train_file"),
    ],
)
def test_what_is_wrong_is_named(recipe, capsys, fields, options, message):
    with pytest.raises(SystemExit):
        parse_recipe([recipe(**fields), *options])
    error = capsys.readouterr().err
    assert message.replace("'", "") in error.replace("'", "")  # argparse quotes or not, by Python's version


def test_unknown_field_says_what_is_accepted(recipe, capsys):
    with pytest.raises(SystemExit):
        parse_recipe([recipe(), "--nonsense", "1"])
    error = capsys.readouterr().err
    for name in ("model_name_or_path", "train_file", "long_rows", "lora_r", "router_bias_speed", "TrainingArguments"):
        assert name in error


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n- b\n", "not list"), ("a: [1\n", "cannot read"), (None, "No such file")]
)
def test_unreadable_recipe(tmp_path, capsys, text, message):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit):
        parse_recipe([str(path)])
    error = capsys.readouterr().err
    assert message in error and str(path) in error


@pytest.mark.parametrize("path", sorted(Path(arguments.__file__).parent.glob("recipes/*.yaml")), ids=lambda p: p.name)
def test_shipped_recipes_parse(path):
    parse_recipe([str(path)])
