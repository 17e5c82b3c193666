import pytest
from jinja2.exceptions import TemplateError
from tiny_tokenizer import ASSISTANT, BOS, EOS, PAD, USER
from transformers import AutoTokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Write f.\n"},
    {"role": "assistant", "content": "def f():\n    pass"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye"},
]


def test_special_tokens_and_size(tokenizer):
    assert len(tokenizer) == 4096
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)
    for token in (BOS, EOS, PAD, USER, ASSISTANT):
        assert tokenizer.encode(token, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(token)]


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x\n\n\nclass A:\n\tpass\r\n",
        "  leading, inner   and trailing spaces  ",
        "12345.678e-9 __init__ _private snake_case a__b __ ___",
        "Größe → 尺寸 🐍 \x00\x7f",
        "",
    ],
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_round_trip_of_unseen_sources(tokenizer, corpus):
    for text in corpus.held_out.values():
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_begin_token_comes_by_itself(tokenizer):
    assert tokenizer.encode("x") == [tokenizer.bos_token_id, *tokenizer.encode("x", add_special_tokens=False)]


def test_indentation_is_one_token(tokenizer):
    for indentation in ("\n    ", "\n        ", "\n            ", "\n\n    "):
        assert len(tokenizer.encode(indentation + "return", add_special_tokens=False)) == 2


def test_chat_template(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == (f"{BOS}Be brief.{USER}Write f.\n{ASSISTANT}def f():\n    pass{EOS}{USER}Thanks{ASSISTANT}Bye{EOS}")
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == f"{BOS}Be brief.{USER}Write f.\n{ASSISTANT}"
    assert text.startswith(prompt)


def test_chat_template_marks_what_the_assistant_says(tokenizer):
    encoded = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == f"def f():\n    pass{EOS}Bye{EOS}"
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1


def test_chat_template_refuses_other_roles(tokenizer):
    with pytest.raises(TemplateError, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return x == 1000\n"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)
