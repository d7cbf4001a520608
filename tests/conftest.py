"""Marker handling: GPU tests run with --gpu and then fail, never skip, on a machine without a device."""

import shutil
from collections.abc import Iterator
from threading import Thread

import emulation
import pytest
import torch
import transformers.dynamic_module_utils

from hf_flashfftconv.adapters import evo2
from hf_flashfftconv.ops import cuda

# The models are tiny: more threads only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the tests that need a CUDA device (and only those)")


def pytest_configure(config: pytest.Config) -> None:
    # Files in their order: those with few tests, which several processes would start last, have the longest ones.
    config.option.loadscopereorder = False
    # Where several processes run all tests, none is to wait a minute for the emulation of the kernels to be compiled.
    several = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    all_tests = config.args_source != config.ArgsSource.ARGS and not config.option.gpu
    if several and all_tests and shutil.which("g++") and config.pluginmanager.has_plugin("cacheprovider"):
        Thread(target=emulation.build, args=[config.cache.mkdir("kernels")], daemon=True).start()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--gpu")
    selected = [item for item in items if (item.get_closest_marker("gpu") is not None) == wanted]
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected


@pytest.fixture(scope="session", autouse=True)
def _modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One folder for remote code in a process: Python looks for it where its package was first imported from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def transforms_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with kernels, where the 7 taps of Evo 2's shortest filters go through a transform too."""
    monkeypatch.setattr(evo2, "use_kernels", lambda *_: True)


@pytest.fixture
def without_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device whose blocks cannot share a transform: the kernels that serve it otherwise."""
    monkeypatch.setattr(cuda, "_clusters", lambda *_: 0)
