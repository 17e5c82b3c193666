"""From conversations in a JSON Lines file to token ids and labels.

One row is `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`; its
other fields are left alone. Only what the assistant says, and the token that ends it, carries loss.
"""

import json
import re
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
IGNORED = -100  # the label that torch's cross-entropy skips


def read_conversations(path: str) -> Dataset:
    """Reads and checks a file of conversations.

    Returns:
        A dataset with the columns `line` (its number in the file, from 1) and `messages`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row is not a conversation to learn from; the message begins with `path:line:`.
    """
    rows = []
    with open(path, "rb") as file:  # bytes: a line that is not UTF-8 then fails by itself, with its number
        for line, text in enumerate(file, start=1):
            try:
                row = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}:{line}: not a line of JSON: {error}") from None
            if problem := _problem(row):
                raise ValueError(f"{path}:{line}: {problem}")
            rows.append({"line": line, "messages": row["messages"]})
    if not rows:
        raise ValueError(f'{path}:1: the file is empty; expected one {{"messages": [...]}} a line.')
    return Dataset.from_list(rows)


def _problem(row: Any) -> str | None:
    """What keeps `row` from being a conversation to learn from, or `None`."""
    if not isinstance(row, dict) or "messages" not in row:
        return f'expected an object with the field "messages", not {_shorten(row)}'
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return f'"messages" must be a list of at least one message, not {_shorten(messages)}'
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            return f'messages[{index}] must have the fields "role" and "content", not {_shorten(message)}'
        role, content = message["role"], message["content"]
        if role not in ROLES:
            return f"messages[{index}] has the unknown role {role!r}; accepted: {', '.join(ROLES)}"
        if not isinstance(content, str) or not content.strip():
            return f"messages[{index}]: content must be text that is not blank, not {_shorten(content)}"
    if all(message["role"] != "assistant" for message in messages):
        return "no assistant turn, so there is nothing to learn"
    if messages[0]["role"] == "assistant":
        return "messages[0] is an assistant turn that answers nothing"
    return None


def _shorten(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]


def encode(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Writes a conversation with the tokenizer's chat template and labels what the assistant says.

    Returns:
        `input_ids` and `labels`, T integers each: a label is its token's id where it carries loss, else -100.

    Raises:
        ValueError: the tokenizer has no chat template, or one that does not show where the assistant speaks.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template; put one beside it, in a file "
            "chat_template.jinja."
        )
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        encoding = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        input_ids, carries_loss = encoding["input_ids"], encoding["assistant_masks"]
    else:
        input_ids, carries_loss = _encode_by_prefixes(messages, tokenizer)
    if not any(carries_loss):
        raise ValueError(f"The chat template of {tokenizer.name_or_path} leaves out what the assistant says.")
    labels = [token if loss else IGNORED for token, loss in zip(input_ids, carries_loss, strict=True)]
    return {"input_ids": input_ids, "labels": labels}


def _encode_by_prefixes(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """For templates without `{% generation %}`, such as those of DeepSeek's own checkpoints: the assistant's
    part is what a turn adds to the prompt before it."""

    def render(turns: int, **kwargs) -> str:
        return tokenizer.apply_chat_template(messages[:turns], tokenize=False, **kwargs)

    text = render(len(messages))
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, answered = render(index, add_generation_prompt=True), render(index + 1)
            if not (answered.startswith(prompt) and text.startswith(answered)):
                raise ValueError(
                    f"The chat template of {tokenizer.name_or_path} rewrites earlier turns, so it does not "
                    "show where the assistant speaks; mark that with {% generation %} ... {% endgeneration %}."
                )
            spans.append((len(prompt), len(answered)))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    carries_loss = [
        any(first < end and start < last for start, end in spans) for first, last in encoding["offset_mapping"]
    ]
    return encoding["input_ids"], carries_loss


def load_chat_dataset(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    long_rows: Literal["error", "drop", "truncate"] = "error",
) -> tuple[Dataset, str]:
    """Reads, checks and tokenises the conversations of a JSON Lines file.

    Args:
        max_length: tokens that a conversation may have.
        long_rows: what happens to longer ones. With `"truncate"`, those that would lose every answer are
            dropped.

    Returns:
        A dataset with the columns `input_ids` and `labels`; and a line of text that says how many rows and
        tokens it holds and how many rows were truncated or dropped.

    Raises:
        FileNotFoundError, ValueError: see `read_conversations` and `encode`; and if a row is too long when
            `long_rows` is `"error"`, or no row is left.
    """
    rows = read_conversations(path).map(
        lambda row: encode(row["messages"], tokenizer), remove_columns="messages", desc=f"Tokenising {path}"
    )
    lengths = [len(ids) for ids in rows["input_ids"]]
    n_long = sum(length > max_length for length in lengths)
    if n_long and long_rows == "error":
        longest = max(range(len(rows)), key=lengths.__getitem__)
        raise ValueError(
            f"{path}:{rows['line'][longest]}: {lengths[longest]} tokens are more than max_length={max_length} "
            f"(true of {n_long} of {len(rows)} rows); raise max_length or set long_rows to drop or truncate."
        )
    if long_rows == "truncate":
        rows = rows.map(lambda row: {key: row[key][:max_length] for key in ("input_ids", "labels")})
    kept = rows.filter(
        lambda row: len(row["input_ids"]) <= max_length and any(label != IGNORED for label in row["labels"])
    )
    if not len(kept):
        raise ValueError(f"{path}: none of the {len(rows)} rows has an answer within max_length={max_length}.")

    tokens = sum(len(ids) for ids in kept["input_ids"])
    learned = sum(label != IGNORED for labels in kept["labels"] for label in labels)
    dropped = len(rows) - len(kept)
    report = f"{path}: {len(kept)} conversations, {tokens} tokens, {learned} of them with loss"
    if n_long:
        report += f"; longer than {max_length} tokens: {n_long - dropped} truncated, {dropped} dropped"
    return kept.remove_columns("line"), report
