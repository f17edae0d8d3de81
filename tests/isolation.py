"""Tests leave this process as they found it, so that they pass in any order.

Some things are put back without a word: environment variables and logging, which a command sets up for a process that
it takes to be its own, and compiled code. Whatever else a test changes and leaves is an error of that test, in its
teardown. The comparison spans the fixtures of files and sessions too, since it begins before they are made.
"""

import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SECONDS_TO_END = 5.0
"""For processes and threads that were told to end."""

_LASTING = (
    "multiprocessing.resource_tracker",
    "multiprocessing.forkserver",
    "torch/_inductor/compile_worker",
    "tests.training.warm_start",
)
"""Helpers that are started once, for as long as the process lives."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """Remember the process before any fixture is made."""
    item.stash[_BEFORE] = (dict(os.environ), _logging(), _state())
    torch.manual_seed(0)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Have torch draw the same numbers in every order, whichever fixtures were made just now."""
    torch.manual_seed(1)
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Compare with what is left behind the last fixture."""
    result = yield
    environment, loggers, before = item.stash[_BEFORE]
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)
    _put_logging_back(loggers)
    if (dynamo := sys.modules.get("torch._dynamo.convert_frame")) is not None and dynamo.input_codes.seen:
        torch.compiler.reset()
    if left := _left_behind(before):
        _put_back(before)
        pytest.fail("This test leaves behind:\n" + "\n".join(left), pytrace=False)
    return result


_BEFORE = pytest.StashKey[tuple[dict[str, str], dict[str, Any], dict[str, Any]]]()


def _state() -> dict[str, Any]:
    """What would make another test fail or pass, by name."""
    state: dict[str, Any] = {
        "working directory": os.getcwd(),
        # setuptools puts its own packages there when it is imported, as a compiler of torch does
        "sys.path": tuple(path for path in sys.path if not path.endswith("setuptools/_vendor")),
        "sys.argv": tuple(sys.argv),
        "sys.excepthook": sys.excepthook,
        "threads": {thread for thread in threading.enumerate() if not thread.daemon} - _compiler_threads(),
        "processes": _children(),
        "way to start processes": multiprocessing.get_start_method(),
        "way to share tensors": torch.multiprocessing.get_sharing_strategy(),
        "torch threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly detection": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "precision of products": torch.get_float32_matmul_precision(),
        "process group": torch.distributed.is_initialized(),
    }
    state |= {signal.Signals(number).name: signal.getsignal(number) for number in _SIGNALS}
    return state | {name: read() for module, name, read in _OF_MODULES if module in sys.modules}


_OF_MODULES: tuple[tuple[str, str, Callable[[], Any]], ...] = (
    ("PIL.Image", "PIL's limit of pixels", lambda: sys.modules["PIL.Image"].MAX_IMAGE_PIXELS),
    ("PIL.ImageFile", "PIL's truncated images", lambda: sys.modules["PIL.ImageFile"].LOAD_TRUNCATED_IMAGES),
    ("torch._dynamo.config", "recompile limit", lambda: sys.modules["torch._dynamo.config"].recompile_limit),
    (
        "transformers.modeling_utils",
        "replaced attention kernels",
        lambda: dict(sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS._local_mapping),
    ),
    (
        "transformers.integrations.deepspeed",
        "DeepSpeed's configuration",
        lambda: sys.modules["transformers.integrations.deepspeed"].is_deepspeed_zero3_enabled(),
    ),
    ("wandb", "wandb's run", lambda: sys.modules["wandb"].run),
    ("wandb", "wandb's console", lambda: {**_wandb_console()._stdout_callbacks, **_wandb_console()._stderr_callbacks}),
)


def _wandb_console() -> Any:
    return sys.modules["wandb.sdk.lib.console_capture"]


def _compiler_threads() -> set[threading.Thread]:
    """Threads of torch's compiler, which starts them once, for as long as the process lives."""
    compiler = sys.modules.get("torch._inductor.async_compile")
    if compiler is None or not compiler.AsyncCompile.pool.cache_info().currsize:
        return set()
    return set(compiler.AsyncCompile.pool()._threads)


def _children() -> set[str]:
    """Processes that were started here and run, but for helpers that last."""
    found = set()
    for number in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        try:
            state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
            command = Path(f"/proc/{number}/cmdline").read_text()
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z" and not any(name in command for name in _LASTING):
            found.add(number)
    return found


def _left_behind(before: dict[str, Any]) -> list[str]:
    """Say what differs; what waits for the garbage collector, or is about to end, does not count."""
    until = time.monotonic() + _SECONDS_TO_END
    while differences := _differences(before, _state()):
        if time.monotonic() > until:
            return differences
        gc.collect()
        for process in multiprocessing.active_children():  # collects those that have ended
            process.join(0)
        differences = _differences(before, _state())
        if not any(line.startswith(("threads", "processes")) for line in differences):
            return differences
        time.sleep(0.05)
    return []


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in after.items():
        old = before.get(name, _AT_IMPORT.get(name, value))
        if isinstance(value, set):
            lines += [f"{name}: {new}" for new in value - old]
        elif value != old:
            lines.append(f"{name}: {value}, was {old}")
    return lines


_AT_IMPORT: dict[str, Any] = {
    "wandb's run": None,
    "wandb's console": {},
    "replaced attention kernels": {},
}
"""What a module that a test imports first begins with, where a test may change it at once."""


def _put_back(before: dict[str, Any]) -> None:
    """Undo what can be undone, so that one test's fault is reported once."""
    os.chdir(before["working directory"])
    sys.path[:] = before["sys.path"]
    torch.set_num_threads(before["torch threads"])
    torch.set_default_dtype(before["default dtype"])
    torch.set_grad_enabled(before["gradients"])
    torch.use_deterministic_algorithms(before["deterministic algorithms"])
    for number in _SIGNALS:
        signal.signal(number, before[signal.Signals(number).name])
    if "wandb" in sys.modules:
        _wandb_console()._stdout_callbacks.clear()
        _wandb_console()._stderr_callbacks.clear()
    if torch.distributed.is_initialized() and not before["process group"]:
        torch.distributed.destroy_process_group()


def _logging() -> dict[str, Any]:
    """Root logger and loggers of packages: what a command sets up anew."""
    return {name: _look(logging.getLogger(name)) for name in _packages()} | {
        "captures warnings": logging._warnings_showwarning is not None
    }


def _packages() -> list[str]:
    return ["", *(name for name in logging.Logger.manager.loggerDict if "." not in name)]


def _look(logger: logging.Logger) -> Any:
    handlers = [(handler, list(handler.filters), handler.formatter) for handler in logger.handlers]
    return logger.level, logger.propagate, logger.disabled, handlers


def _put_logging_back(before: dict[str, Any]) -> None:
    for name in _packages():
        if name not in before:
            continue
        logger = logging.getLogger(name)
        level, logger.propagate, logger.disabled, handlers = before[name]
        if logger.level != level:
            logger.setLevel(level)
        logger.handlers[:] = [handler for handler, _, _ in handlers]
        for handler, filters, formatter in handlers:
            handler.filters[:] = filters
            handler.setFormatter(formatter)
    logging.captureWarnings(before["captures warnings"])
