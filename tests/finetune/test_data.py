import json

import pytest
from tiny_chat import ASSISTANT, BOS, EOS, UNMARKED, USER, conversation, write_rows

from deepseek_hf.finetune.data import IGNORED, encode, load_chat_dataset

TWO_TURNS = [{"role": "system", "content": "Be brief."}, *conversation(1, 2), *conversation(3, 4)]
GOOD = json.dumps({"messages": conversation(1, 2), "source": "sums"})


def messages(*turns: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "not a line of JSON"),
        ("", "not a line of JSON"),
        ("[1, 2]", 'expected an object with the field "messages", not [1, 2]'),
        ('{"conversation": []}', 'expected an object with the field "messages"'),
        ('{"messages": []}', "a list of at least one message, not []"),
        ('{"messages": "hello"}', 'a list of at least one message, not "hello"'),
        ('{"messages": [{"role": "user"}]}', 'messages[0] must have the fields "role" and "content"'),
        (messages(("user", "a"), ("bot", "b")), "messages[1] has the unknown role 'bot'; accepted: system, user"),
        (messages(("user", "a"), ("assistant", " \n")), "messages[1]: content must be text that is not blank"),
        (messages(("user", None), ("assistant", "b")), "messages[0]: content must be text"),
        (messages(("system", "a"), ("user", "b")), "no assistant turn"),
        (messages(("assistant", "a"), ("user", "b")), "messages[0] is an assistant turn that answers nothing"),
    ],
)
def test_bad_row_is_named_by_file_and_line(tmp_path, tokenizer, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError) as error:
        load_chat_dataset(str(path), tokenizer, 64)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def test_bytes_that_are_not_utf8(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + GOOD.encode().replace(b"plus", b"pl\xff"))
    with pytest.raises(ValueError, match=r"rows.jsonl:2: not a line of JSON"):
        load_chat_dataset(str(path), tokenizer, 64)


def test_empty_and_missing_file(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(FileNotFoundError, match=r"rows\.jsonl"):
        load_chat_dataset(str(path), tokenizer, 64)
    path.write_text("")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the file is empty"):
        load_chat_dataset(str(path), tokenizer, 64)


def test_only_answers_and_their_end_carry_loss(tokenizer):
    row = encode(TWO_TURNS, tokenizer)
    text = (
        f"{BOS}Be brief.{USER}What is 1 plus 2?{ASSISTANT}1 plus 2 is 3.{EOS}"
        f"{USER}What is 3 plus 4?{ASSISTANT}3 plus 4 is 7.{EOS}"
    )
    assert row["input_ids"] == tokenizer.encode(text, add_special_tokens=False)
    expected = []
    for part in (text.split("1 plus 2 is")[0], "1 plus 2 is 3." + EOS, f"{USER}What is 3 plus 4?{ASSISTANT}"):
        tokens = tokenizer.encode(part, add_special_tokens=False)
        expected += tokens if part.startswith("1") else [IGNORED] * len(tokens)
    expected += tokenizer.encode("3 plus 4 is 7." + EOS, add_special_tokens=False)
    assert row["labels"] == expected


@pytest.fixture
def other_template(tokenizer):
    """The tokenizer with another chat template."""
    marked = tokenizer.chat_template

    def replace(template):
        tokenizer.chat_template = template
        return tokenizer

    yield replace
    tokenizer.chat_template = marked


def test_template_without_generation_marks_gives_the_same_labels(tokenizer, other_template):
    expected = encode(TWO_TURNS, tokenizer)
    assert encode(TWO_TURNS, other_template(UNMARKED)) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        (UNMARKED.replace("message['content'] +", "(message['content'] if loop.last else '...') +"), "rewrites"),
        ("{{ messages[0]['content'] }}{% generation %}{% endgeneration %}", "leaves out what the assistant says"),
    ],
)
def test_template_that_hides_the_assistant(other_template, template, message):
    with pytest.raises(ValueError, match=message):
        encode(TWO_TURNS, other_template(template))


@pytest.fixture
def uneven(tmp_path, tokenizer):
    """Three conversations, the second longer than the others, and the length of the second's prompt and whole."""
    long = conversation(1, 2)
    long[1] = {"role": "assistant", "content": long[1]["content"] * 20}
    path = write_rows(
        tmp_path / "rows.jsonl", [{"messages": rows} for rows in (conversation(3, 4), long, conversation(5, 6))]
    )
    row = encode(long, tokenizer)
    return str(path), sum(label == IGNORED for label in row["labels"]), len(row["input_ids"])


def test_long_rows_are_an_error(uneven, tokenizer):
    path, _, length = uneven
    with pytest.raises(
        ValueError, match=rf"rows.jsonl:2: {length} tokens are more than max_length=40 \(true of 1 of 3"
    ):
        load_chat_dataset(path, tokenizer, 40)


def test_long_rows_are_dropped_and_counted(uneven, tokenizer):
    dataset, report = load_chat_dataset(uneven[0], tokenizer, 40, "drop")
    assert len(dataset) == 2
    assert report.endswith("longer than 40 tokens: 0 truncated, 1 dropped")


def test_long_rows_are_truncated_and_counted(uneven, tokenizer):
    path, _, length = uneven
    dataset, report = load_chat_dataset(path, tokenizer, 40, "truncate")
    whole, _ = load_chat_dataset(path, tokenizer, length)
    assert [len(row["input_ids"]) for row in dataset][1] == 40
    assert dataset["labels"][1] == whole["labels"][1][:40]
    assert report.endswith("longer than 40 tokens: 1 truncated, 0 dropped")


def test_row_truncated_before_its_answer_is_dropped(tmp_path, tokenizer):
    question = [{"role": "user", "content": "What is 1 plus 2? " * 20}, conversation(1, 2)[1]]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": question}, {"messages": conversation(1, 2)}])
    dataset, report = load_chat_dataset(str(path), tokenizer, 40, "truncate")
    assert len(dataset) == 1
    assert report.endswith("0 truncated, 1 dropped")
    with pytest.raises(ValueError, match="none of the 2 rows has an answer within max_length=3"):
        load_chat_dataset(str(path), tokenizer, 3, "truncate")
