"""The examples are scripts that import each other by file name, so their folder must be on the path."""

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(scope="session")
def corpus():
    from stdlib_corpus import load_corpus

    return load_corpus()


@pytest.fixture(scope="session")
def tokenizer(corpus):
    """The tiny model's own: trained on the whole train split, which takes two seconds."""
    from tiny_tokenizer import train_tokenizer

    return train_tokenizer(corpus.train.values())
