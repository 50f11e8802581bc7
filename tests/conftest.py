"""Fixtures: tiny networks of random weights, and the embedded ones, loaded once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from blended_core.adm import cache
from blended_core.cli import edit as cli
from blended_core.cli.process import STOP_SIGNALS
from blended_core.clip.model import ClipModel
from blended_core.denoiser import DiffusionModel
from blended_core.device import DeviceContext
from blended_core.sample import Models

from . import tiny
from .server import ROOT, Server, started

# More threads than cores make small networks slower, not faster; beside another worker there is one core.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay on one worker, and all that need ComfyUI on the same one: its server starts once."""
    with_server = {item.path for item in items if "comfyui" in getattr(item, "fixturenames", ())}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("comfyui" if item.path in with_server else item.path.stem))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decisions of the probe are kept for this run alone."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(cache, "user_cache_path", lambda *_, **__: folder)
        yield


@pytest.fixture
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run uses the tiny networks."""
    monkeypatch.setattr(cli, "load_models", lambda request: tiny.tiny_models())


@pytest.fixture
def heeded_signals() -> Iterator[None]:
    """No signal is ignored, as it is in a test run that was started with nohup."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def model() -> DiffusionModel:
    """A tiny unconditional UNet of 16 px that predicts ε and a variance."""
    return tiny.tiny_model()


@pytest.fixture
def clip() -> ClipModel:
    """A tiny differentiable stand-in for CLIP."""
    return tiny.tiny_clip()


@pytest.fixture
def models() -> Models:
    """Both of them, with a rough perceptual distance."""
    return tiny.tiny_models()


@pytest.fixture(scope="session")
def embedded() -> Models:
    """The networks of the package."""
    from blended_core.adm.load import load_ddpm
    from blended_core.clip.model import load_clip

    context = DeviceContext()
    with context.autograd():
        return Models(load_ddpm(context), load_clip(context), None, context)


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One real ComfyUI for all tests that need a server, with a node that loads the latent test bed."""
    folder = tmp_path_factory.mktemp("comfyui")
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "latent_loader.py").symlink_to(ROOT / "tests" / "latent_loader.py")
    with started(folder) as server:
        yield server
