"""The source files of Python's standard library, as a text corpus every machine with Python already has.

    python examples/stdlib_corpus.py

prints what the corpus holds. The files are those of the running interpreter, so another Python version gives a slightly
different corpus. The library is under the PSF licence.
"""

import hashlib
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

HELD_OUT_SHARE = 0.03

# Folders that are not the library itself (third-party packages, tests, an application) or hold data written as Python.
LEFT_OUT_FOLDERS = {"site-packages", "test", "tests", "idle_test", "idlelib", "pydoc_data", "__pycache__"}
# Tables that a program wrote.
GENERATED_FILES = {"html/entities.py", "stringprep.py"}


@dataclass
class Corpus:
    """`train` and `held_out` map a path relative to the library's folder ("json/decoder.py") to its source text."""

    train: dict[str, str] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)  # reason -> number of files

    def __str__(self) -> str:
        lines = [
            f"{name}: {len(files)} files, {sum(map(len, files.values())):,} characters"
            for name, files in (("train", self.train), ("held-out", self.held_out))
        ]
        lines += [f"left out, {reason}: {count} files" for reason, count in sorted(self.left_out.items())]
        return "\n".join(lines)


def is_held_out(path: str) -> bool:
    """Decides by a hash of the relative path alone, so a module keeps its side when other modules come and go."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_SHARE


def load_corpus() -> Corpus:
    """Reads every library module once; what is not used is counted in `Corpus.left_out` with its reason."""
    corpus = Corpus()
    for path, file in _library_files(corpus.left_out):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            corpus.left_out["unreadable as UTF-8"] += 1
            continue
        if reason := _reason_to_leave_out(path, text):
            corpus.left_out[reason] += 1
            continue
        (corpus.held_out if is_held_out(path) else corpus.train)[path] = text
    if not corpus.train or not corpus.held_out:
        raise RuntimeError(
            f"no standard library sources found in {sysconfig.get_paths()['stdlib']!r}: "
            "this needs a Python that was installed with its .py files"
        )
    return corpus


def _library_files(left_out: Counter) -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if folders := LEFT_OUT_FOLDERS.intersection(PurePosixPath(path).parts[:-1]):
            left_out[f"in {min(folders)}/"] += 1
        else:
            yield path, file


def _reason_to_leave_out(path: str, text: str) -> str | None:
    if not text.strip():
        return "empty"
    is_code_page = path.startswith("encodings/") and "codecs.charmap_encode" in text
    if is_code_page or path in GENERATED_FILES or path.startswith(("_sysconfigdata", "config-")):
        return "generated table"
    return None


if __name__ == "__main__":
    print(load_corpus())
