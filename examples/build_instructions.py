"""Makes instruction rows from the functions and docstrings of Python's standard library.

    python examples/build_instructions.py --tokenizer examples/tiny-deepseek-v3 --output_dir examples/data

The modules are parsed, never imported. Training rows come from the modules that the tiny model was pretrained on,
held-out rows from those it was not. The files in `examples/data` were built with Python 3.11.
"""

import argparse
import ast
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from stdlib_corpus import load_corpus
from transformers import AutoTokenizer, PreTrainedTokenizerBase

MAX_TOKENS = 384
MAX_SOURCE_LINES = 25
TRAIN_ROWS, HELD_OUT_ROWS = 1000, 100
TRAIN_FILE = "python_stdlib_instructions.jsonl"
HELD_OUT_FILE = "python_stdlib_instructions_heldout.jsonl"

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: str) -> str:
    """ "json/decoder.py" -> "json.decoder", "json/__init__.py" -> "json"."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def functions(tree: ast.Module) -> Iterator[tuple[str, FunctionNode]]:
    """Functions of the module and methods of its classes, with their qualified names; none inside functions."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, FunctionNode]]:
        for node in body:
            if isinstance(node, FunctionNode):
                yield prefix + node.name, node
            elif isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{prefix}{node.name}.")

    return walk(tree.body, "")


def rows_of_module(path: str, text: str, dropped: Counter) -> Iterator[dict]:
    """One row per function and kind of instruction; `dropped` counts what gives none, by reason."""
    module = module_name(path)
    try:
        tree = ast.parse(text)
    except SyntaxError:
        dropped["modules that do not parse"] += 1
        return
    for qualname, node in functions(tree):
        docstring = ast.get_docstring(node)
        if not docstring:
            dropped["functions without a docstring"] += 1
            continue
        paragraph = " ".join(docstring.split("\n\n")[0].split())
        signature = f"{node.name}({ast.unparse(node.args)})"
        name = f"{module}.{qualname}"
        owner = f"class `{module}.{qualname.rpartition('.')[0]}`" if "." in qualname else f"module `{module}`"

        yield row(f"What does `{name}({ast.unparse(node.args)})` do?", paragraph, name)
        yield row(f"Give the signature of `{name}`.", f"{async_prefix(node)}def {signature}", name)
        source = source_without_docstring(node)
        if source is None:
            dropped["functions that are nothing but their docstring"] += 1
        elif source.count("\n") >= MAX_SOURCE_LINES:
            dropped[f"function sources above {MAX_SOURCE_LINES} lines"] += 1
        else:
            kind = "method" if "." in qualname else "function"
            yield row(f"Write the {kind} `{signature}` of {owner}: {first_sentence(paragraph)}", source, name)


def async_prefix(node: FunctionNode) -> str:
    return "async " if isinstance(node, ast.AsyncFunctionDef) else ""


def first_sentence(paragraph: str) -> str:
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + "." if stop else sentence


def source_without_docstring(node: FunctionNode) -> str | None:
    """The function's code in `ast.unparse`'s spelling (no comments), or None when nothing is left."""
    body = node.body[1:]
    return ast.unparse(ast.copy_location(_with_body(node, body), node)) if body else None


def _with_body(node: FunctionNode, body: list[ast.stmt]) -> FunctionNode:
    return type(node)(**{**dict(ast.iter_fields(node)), "body": body})


def row(instruction: str, answer: str, source: str) -> dict:
    messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "source": source}


def choose(modules: dict[str, str], wanted: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict], Counter]:
    """At most `wanted` rows of `modules`, and how many fell away for which reason.

    Which ones is decided by a hash of the instruction, and they stay in the library's order.
    """
    dropped = Counter()
    rows, seen = [], set()
    for path, text in sorted(modules.items()):
        for candidate in rows_of_module(path, text, dropped):
            instruction, answer = (message["content"] for message in candidate["messages"])
            key = (instruction.split("`")[0], answer)  # one answer to one kind of question, whatever the function
            if key in seen:
                dropped["rows whose answer another row gives"] += 1
            elif instruction in seen:  # a function that is defined twice, say once a platform
                dropped["rows whose instruction another row gives"] += 1
            elif len(tokenizer.apply_chat_template(candidate["messages"], return_dict=False)) > MAX_TOKENS:
                dropped[f"rows above {MAX_TOKENS} tokens"] += 1
            else:
                seen |= {key, instruction}
                rows.append(candidate)
    chosen = set(sorted(range(len(rows)), key=lambda index: _digest(rows[index]))[:wanted])
    dropped[f"rows beyond the {wanted} wanted"] = len(rows) - len(chosen)
    return [rows[index] for index in sorted(chosen)], dropped


def _digest(candidate: dict) -> bytes:
    return hashlib.sha256(candidate["messages"][0]["content"].encode()).digest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="examples/tiny-deepseek-v3", help="decides which rows are too long")
    parser.add_argument("--output_dir", type=Path, default=Path("examples/data"))
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    corpus = load_corpus()
    for file, modules, wanted in (
        (TRAIN_FILE, corpus.train, TRAIN_ROWS),
        (HELD_OUT_FILE, corpus.held_out, HELD_OUT_ROWS),
    ):
        rows, dropped = choose(modules, wanted, tokenizer)
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rows)
        (arguments.output_dir / file).write_text(lines, encoding="utf-8")
        print(f"{file}: {len(rows)} rows of {len(modules)} modules")
        for reason, count in sorted(dropped.items()):
            print(f"  left out, {reason}: {count}")


if __name__ == "__main__":
    main()
