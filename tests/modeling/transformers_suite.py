"""Transformers' own model tests, taken from the source distribution of the installed version.

The wheel carries no tests; the source distribution on the package index carries the shared ones
(`tests/test_modeling_common.py`, the training, tensor-, expert- and FSDP-parallel mixins, the config tester).
They are downloaded once through pip into `DEEPSEEK_HF_TRANSFORMERS_SDIST`, by default `.cache/transformers-sdist`
in the repository, and imported from there: nothing of them is copied into this repository.

    python tests/modeling/transformers_suite.py      # download now (a later run of the tests is then offline)
"""

import atexit
import functools
import importlib
import multiprocessing.pool
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from filelock import FileLock

# The package name under which the tests are imported: our own `tests` folder keeps its name.
PACKAGE = "transformers_tests"
CACHE_VARIABLE = "DEEPSEEK_HF_TRANSFORMERS_SDIST"
DEFAULT_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "transformers-sdist"
RANK_TIMEOUT_SECONDS = 120


class SuiteUnavailable(RuntimeError):
    """The source distribution is neither in the cache folder nor to be had from the package index."""


def suite_folder() -> Path:
    """The `tests` folder of the installed transformers version; downloads and unpacks it when it is not cached.

    Raises:
        SuiteUnavailable: pip could not download it; the message says where to put the archive by hand.
    """
    release = f"transformers-{transformers.__version__}"
    cache = Path(os.environ.get(CACHE_VARIABLE, DEFAULT_CACHE)).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / release / "tests"
    with FileLock(cache / "download.lock"):  # the workers of pytest-xdist arrive here together
        if not folder.is_dir():
            archive = cache / f"{release}.tar.gz"
            if not archive.is_file():
                _download(transformers.__version__, archive)
            _unpack(archive, release)
    return folder


def _download(version: str, archive: Path) -> None:
    with tempfile.TemporaryDirectory(dir=archive.parent) as partial:
        # fmt: off
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers",
            "--dest", partial, f"transformers=={version}",
        ]
        # fmt: on
        done = subprocess.run(command, capture_output=True, text=True)
        downloaded = Path(partial) / archive.name
        if done.returncode or not downloaded.is_file():
            reason = (done.stderr.strip().splitlines() or ["no source distribution was downloaded"])[-1]
            raise SuiteUnavailable(
                f"pip could not download the source distribution of transformers {version} ({reason}). Put "
                f"{archive.name} into {archive.parent}, or name the folder that holds it in {CACHE_VARIABLE}."
            )
        downloaded.rename(archive)


def _unpack(archive: Path, release: str) -> None:
    with tempfile.TemporaryDirectory(dir=archive.parent) as partial, tarfile.open(archive) as tar:
        tests = [member for member in tar.getmembers() if member.name.startswith(f"{release}/tests/")]
        tar.extractall(partial, members=tests, filter="data")
        (Path(partial) / release / "tests" / "__init__.py").touch()  # the config tester loads the folder as a package
        (Path(partial) / release).rename(archive.parent / release)


def import_suite(module: str) -> types.ModuleType:
    """Import one module of the suite, e.g. `import_suite("test_modeling_common")`.

    The source distribution has no sub-folders of `tests`, so the four modules which its files import from there
    are stood in for: the two mixins (text generation, export) are empty classes, the rest is below.
    """
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(suite_folder())]
        sys.modules[PACKAGE] = package
        for name, contents in _STAND_INS.items():
            parent, _, _ = name.rpartition(".")
            if parent:
                sys.modules[f"{PACKAGE}.{parent}"] = types.ModuleType(f"{PACKAGE}.{parent}")
            stand_in = types.ModuleType(f"{PACKAGE}.{name}")
            vars(stand_in).update(contents)
            sys.modules[stand_in.__name__] = stand_in
    with warnings.catch_warnings():
        # pytest knows the suite's own marks (`is_fsdp_test`, ...) only from transformers' conftest.
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
        return importlib.import_module(f"{PACKAGE}.{module}")


def run_distributed(world_size: int):
    """Decorator: `run_distributed(n)(function)(*args)` calls `function(rank, *args)` on n processes over gloo."""

    def decorator(function):
        @functools.wraps(function)
        def run(*args):
            with tempfile.TemporaryDirectory() as folder:
                start_ranks(_in_process_group, (f"file://{folder}/rendezvous", world_size, function, args), world_size)

        return run

    return decorator


def start_ranks(function, args: tuple, nprocs: int) -> None:
    """Call `function(rank, *args)` on `nprocs` processes and wait; an exception in one of them is raised here."""
    # Pickled here and not by the pool: a new process sets the package up before it unpickles the suite's functions.
    payload = pickle.dumps((function, args))
    calls = [_process_of_rank(rank).apply_async(_call_as_rank, (rank, nprocs, payload)) for rank in range(nprocs)]
    try:
        _wait(calls)
    except BaseException:
        # The other ranks may wait for the failed one in a collective for ever: end them all, the next test starts anew.
        for rank in range(nprocs):
            _process_of_rank(rank).terminate()
        _process_of_rank.cache_clear()
        raise


def _wait(calls: list[multiprocessing.pool.AsyncResult]) -> None:
    """Until all have returned, or one of them has failed, whichever that is, or the time is over."""
    deadline = time.monotonic() + RANK_TIMEOUT_SECONDS
    while calls:
        for call in calls:
            if call.ready():
                call.get()
        calls = [call for call in calls if not call.ready()]
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(calls)} ranks did not return within {RANK_TIMEOUT_SECONDS} s")
        if calls:
            calls[0].wait(0.05)


@functools.cache
def _process_of_rank(rank: int) -> multiprocessing.pool.Pool:
    """One process a rank, kept from test to test: importing torch and transformers anew would take most of the time.

    It keeps its rank, too, since torch caches what it worked out for a rank's place in the device mesh.
    """
    imports = [name for name in ("deepseek_hf.modeling",) if name in sys.modules]  # they register with the Auto classes
    pool = multiprocessing.get_context("spawn").Pool(1, _prepare_rank, (imports,))
    atexit.register(pool.terminate)
    return pool


def _prepare_rank(imports: list[str]) -> None:
    torch.set_num_threads(1)  # the ranks share one machine's cores
    for module in imports:
        importlib.import_module(module)
    import_suite("test_fsdp_mixin")


def _call_as_rank(rank: int, world_size: int, payload: bytes) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    function, args = pickle.loads(payload)
    function(rank, *args)
    torch.use_deterministic_algorithms(False)  # the FSDP tests leave it switched on


def _in_process_group(rank: int, rendezvous: str, world_size: int, function, args: tuple) -> None:
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


_STAND_INS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    # Fields every config inherits, each with a value that is not its default.
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "architectures": ["DeepseekModel"],
            "chunk_size_feed_forward": 5,
            "dtype": "float16",
            "id2label": {0: "label"},
            "label2id": {"label": "0"},
            "output_attentions": True,
            "output_hidden_states": True,
            "problem_type": "regression",
            "return_dict": False,
        }
    },
    "distributed_testing_utils": {
        "run_distributed": run_distributed,
        "_start_rank_processes": start_ranks,
        "_get_distributed_backend": lambda: "gloo",
        "_get_distributed_device_type": lambda: "cpu",
        "_get_rank_device": lambda rank: torch.device("cpu"),
        "_set_rank_device": lambda rank: None,
    },
}

if __name__ == "__main__":
    print(suite_folder())
