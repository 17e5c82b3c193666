import ast
import json
import platform
from collections import Counter

import pytest
from build_instructions import (
    HELD_OUT_FILE,
    HELD_OUT_ROWS,
    MAX_SOURCE_LINES,
    MAX_TOKENS,
    TRAIN_FILE,
    TRAIN_ROWS,
    choose,
    rows_of_module,
)
from conftest import EXAMPLES

BUILT_WITH = "3.11.7"

SOURCE = '''
class A:
    async def get(self, key, default=None):
        """Return the value. Or the default.

        More.
        """
        return self.values.get(key, default)  # a comment

    def abstract(self):
        """Does nothing."""

def undocumented():
    pass
'''


def committed(file: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLES / "data" / file).read_text(encoding="utf-8").splitlines()]


def test_rows_of_a_module():
    dropped = Counter()
    rows = list(rows_of_module("pkg/__init__.py", SOURCE, dropped))
    pairs = [tuple(message["content"] for message in row["messages"]) for row in rows]
    assert pairs == [
        ("What does `pkg.A.get(self, key, default=None)` do?", "Return the value. Or the default."),
        ("Give the signature of `pkg.A.get`.", "async def get(self, key, default=None)"),
        (
            "Write the method `get(self, key, default=None)` of class `pkg.A`: Return the value.",
            "async def get(self, key, default=None):\n    return self.values.get(key, default)",
        ),
        ("What does `pkg.A.abstract(self)` do?", "Does nothing."),
        ("Give the signature of `pkg.A.abstract`.", "def abstract(self)"),
    ]
    assert {row["source"] for row in rows} == {"pkg.A.get", "pkg.A.abstract"}
    assert dropped == {"functions without a docstring": 1, "functions that are nothing but their docstring": 1}


def test_a_module_that_does_not_parse_is_counted():
    dropped = Counter()
    assert list(rows_of_module("broken.py", "def f(:\n", dropped)) == []
    assert dropped == {"modules that do not parse": 1}


@pytest.mark.parametrize(("file", "count"), [(TRAIN_FILE, TRAIN_ROWS), (HELD_OUT_FILE, HELD_OUT_ROWS)])
def test_committed_rows_are_valid(file, count, tokenizer):
    rows = committed(file)
    assert len(rows) == count
    assert len({row["messages"][0]["content"] for row in rows}) == count
    for row in rows:
        assert row.keys() == {"messages", "source"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        question, answer = (message["content"] for message in row["messages"])
        assert question and answer
        if question.startswith("Write "):
            ast.parse(answer)
            assert len(answer.splitlines()) <= MAX_SOURCE_LINES
        if platform.python_version() == BUILT_WITH:  # another library trains a slightly different tokenizer
            assert len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) <= MAX_TOKENS


def test_committed_rows_keep_to_their_side_of_the_split():
    # Qualified names may run into class names, so it is the longest prefix that is a module which counts.
    held_out_modules = {"chunk", "copyreg", "email", "sched", "venv", "multiprocessing.connection"}
    assert not [row["source"] for row in committed(TRAIN_FILE) if row["source"].rpartition(".")[0] in held_out_modules]
    assert {row["source"] for row in committed(TRAIN_FILE)}.isdisjoint(
        row["source"] for row in committed(HELD_OUT_FILE)
    )


@pytest.mark.skipif(
    platform.python_version() != BUILT_WITH,
    reason=f"the rows are those of Python {BUILT_WITH}'s library, this is {platform.python_version()}",
)
def test_committed_rows_can_be_built_again(corpus, tokenizer):
    assert choose(corpus.train, TRAIN_ROWS, tokenizer)[0] == committed(TRAIN_FILE)
    assert choose(corpus.held_out, HELD_OUT_ROWS, tokenizer)[0] == committed(HELD_OUT_FILE)
