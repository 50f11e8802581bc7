"""The path of a GPU. What needs a device is skipped without one; its logic is tested on the CPU.

A step on the device 'meta' has no values, so whatever would wait for a GPU (``item``, ``nonzero``, a boolean index) raises an error there. CUDA graphs
are imitated by a function that keeps its inputs and outputs in fixed places, as a recording does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from blended_core import device as device_module
from blended_core import graphs
from blended_core.adm import recompute
from blended_core.clip.model import load_clip
from blended_core.device import DeviceContext, fast_precision, prefers_channels_last
from blended_core.edit import edit_picture
from blended_core.errors import BlendedWarning
from blended_core.graphs import GraphedNetwork
from blended_core.losses import ClipLoss
from blended_core.mask import EditMask
from blended_core.memory import MOST_FITTING, USUAL_BATCH, GuidedWork, MemoryLimits, fitting_batch, memory_needed
from blended_core.options import PRESETS, EditOptions, GuidanceOptions, preset
from blended_core.random import SeededRandom
from blended_core.sample import Models, Step, blended_diffusion, guided_step, with_batch

from . import tiny
from .test_exact import on, step

SIZE = tiny.SIZE
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def square() -> Tensor:
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 3:13, 3:13] = 1
    return mask


def apart_by(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value: random networks leave −1..1."""
    return float((found - expected).abs().max() / expected.abs().max())


def picture() -> Tensor:
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


# --- nothing in a step waits for the device ---------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Whether each copy from the CPU to another device was queued."""

    def __init__(self) -> None:
        super().__init__()
        self.queued: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        from_cpu = any(isinstance(value, Tensor) and value.device.type == "cpu" and value.ndim for value in args)
        if from_cpu and isinstance(out, Tensor) and out.device.type == "meta":
            self.queued.append(bool((kwargs or {}).get("non_blocking")))
        return out


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Models:
    """The tiny networks on a device without values, on which copies are queued as on CUDA."""
    monkeypatch.setattr(recompute, "normalizes_groups", lambda _device: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # does not know the device
    monkeypatch.setattr(device_module, "copies_in_queue", lambda device: device.type == "meta")
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    models = tiny.tiny_models(tiny.tiny_model(num_classes=5))
    assert models.clip is not None
    for network in (models.ddpm.network, models.clip.model):
        network.to("meta")
    models.clip.mean, models.clip.std = models.clip.mean.to("meta"), models.clip.std.to("meta")
    return replace(models, context=DeviceContext(torch.device("meta")))


@pytest.mark.parametrize("gradient", ["unet", "x0"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp-2m"])
def test_no_step_of_the_loop_waits_for_the_device(meta: Models, monkeypatch: pytest.MonkeyPatch, gradient: str, sampler: str) -> None:
    settled: list[Step] = []
    monkeypatch.setattr(Step, "settled", lambda self: settled.append(self) or self)
    options = preset(
        "best", steps="4", strength=1.0, gradient=gradient, sampler=sampler, eta=1.0, views=4, view_chunk=3, class_choice="random",
        tone_match="off",  # it solves its equation around the mask, whose place it must know
    )  # fmt: skip
    prompt = tiny.tiny_models().clip.prompt("a tree")  # type: ignore[union-attr]
    prompt = replace(prompt, embeddings=prompt.embeddings.to("meta"))
    source, mask = torch.zeros(1, 3, SIZE, SIZE, device="meta"), EditMask.of(square())
    mask = mask.with_values(mask.values.to("meta"))
    with Copies() as copies, torch.no_grad():
        steps = list(blended_diffusion(meta, source, mask, prompt, options, SeededRandom(0), range(2)))
    assert len(steps) == 4 and all(step.x.device.type == "meta" for step in steps)
    # The random numbers of every step: noise of the step (none at the last), noise of the background, classes, and views.
    assert len(copies.queued) > 4 * 4 and all(copies.queued)
    assert len(settled) == 4, "the numbers of a step are read once, when all of its work is queued"


def test_a_step_that_waits_is_found(meta: Models) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        Step((0,), 0, 1, 1, torch.zeros(1), torch.zeros(1), shift=torch.zeros((), device="meta")).settled()


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


class Recorder:
    """Imitates ``torch.cuda.make_graphed_callables`` on the CPU: inputs, outputs and gradients have fixed places, which each call overwrites."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = self.replayed = 0
        self.error: Exception | None = None
        self.streams: list[object] = []
        monkeypatch.setattr(graphs, "RECORDED_ON", "cpu")
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", self.make)
        monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: "stream of before")
        monkeypatch.setattr(torch.cuda, "set_stream", self.streams.append)

    def make(self, call: Callable[..., Tensor], places: tuple[Tensor, ...], num_warmup_iters: int) -> Callable[..., Tensor]:
        if self.error is not None:
            raise self.error
        self.made += 1
        differentiable, recorder = places[0].requires_grad, self
        with torch.set_grad_enabled(differentiable):
            output = call(*places).detach().clone()
        gradient, kept = torch.zeros_like(places[0]), {}

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Tensor) -> Tensor:
                recorder.replayed += 1
                for place, value in zip(places, inputs, strict=True):
                    place.data.copy_(value)
                with torch.set_grad_enabled(differentiable):
                    kept["graph"] = call(*places)
                output.copy_(kept["graph"].detach())
                return output.detach()

            @staticmethod
            def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
                gradient.copy_(torch.autograd.grad(kept["graph"], places[0], cotangent)[0])
                return gradient.detach(), *[None] * (len(places) - 1)

        return lambda *inputs: Graphed.apply(*inputs)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def inputs(batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)), torch.full((batch,), 300.0)


def with_gradient(call: Callable[..., Tensor], x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    output = call(x, timesteps)
    return output.detach(), torch.autograd.grad(output.square().sum(), x)[0].clone()


def test_a_recording_gives_what_the_network_gives(recorder: Recorder) -> None:
    network = tiny.tiny_unet()
    graphed = GraphedNetwork(network)
    for seed in range(4):
        x, timesteps = inputs(seed=seed)
        with torch.no_grad():
            assert torch.equal(graphed(x, timesteps), network(x, timesteps))
        for found, expected in zip(with_gradient(graphed, x, timesteps), with_gradient(network, x, timesteps), strict=True):
            assert torch.equal(found, expected)
    assert recorder.made == 2 and recorder.replayed == 6, "the first call of each kind is not recorded"
    assert recorder.streams == ["stream of before"] * 2


def test_an_output_is_not_overwritten_by_the_next_replay(recorder: Recorder) -> None:
    graphed = GraphedNetwork(tiny.tiny_unet())
    with torch.no_grad():
        graphed(*inputs())
        first = graphed(*inputs(seed=1))
        before = first.clone()
        graphed(*inputs(seed=2))
    assert recorder.replayed == 2 and torch.equal(first, before)


def test_each_kind_of_inputs_has_its_own_recording(recorder: Recorder) -> None:
    network = tiny.tiny_unet(num_classes=3)
    graphed = GraphedNetwork(network)
    x, timesteps = inputs()
    kinds = [
        (x, timesteps, torch.tensor([0, 1])), (x[:1], timesteps[:1], torch.tensor([0])), (x, timesteps, torch.zeros(2, 4 * 32)),
        (x.to(memory_format=torch.channels_last), timesteps, torch.tensor([0, 1])),
    ]  # fmt: skip
    with torch.no_grad():
        for _ in range(3):
            for kind in kinds:
                assert torch.equal(graphed(*kind), network(*kind))
        assert recorder.made == graphs.MOST_RECORDINGS == 4
        network.set_compute_dtype(torch.bfloat16)  # also moves the weights
        for _ in range(2):
            assert torch.equal(graphed(*kinds[0]), network(*kinds[0]))
    assert recorder.made == 5 and len(graphed._recordings) == 1


def test_changed_weights_are_read_and_moved_weights_are_recorded_again(recorder: Recorder) -> None:
    network = tiny.tiny_unet()
    graphed = GraphedNetwork(network)
    x, timesteps = inputs()
    with torch.no_grad():
        for _ in range(2):
            graphed(x, timesteps)
        network.out[2].weight.mul_(2.0)  # type: ignore[operator, union-attr]
        assert torch.equal(graphed(x, timesteps), network(x, timesteps)) and recorder.made == 1
        parameter = network.get_parameter("out.2.weight")
        parameter.data = 3 * parameter.data  # as a network that was moved to the CPU and back has its weights elsewhere
        for _ in range(2):
            assert torch.equal(graphed(x, timesteps), network(x, timesteps))
    assert recorder.made == 2 and recorder.replayed == 3


@pytest.mark.parametrize("why", ["checkpointing", "hook", "trained", "another device", "compiled"])
def test_what_cannot_be_recorded_is_called(recorder: Recorder, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    network = tiny.tiny_unet()
    graphed, seen = GraphedNetwork(network), []
    if why == "checkpointing":
        network.gradient_checkpointing = True
    elif why == "hook":
        network.middle_block[0].register_forward_hook(lambda *_: seen.append(1))
    elif why == "trained":
        network.get_parameter("out.2.bias").requires_grad_(True)
    elif why == "another device":
        monkeypatch.setattr(graphs, "RECORDED_ON", "cuda")
    else:
        network.compile(backend="eager")  # type: ignore[no-untyped-call]
        monkeypatch.setattr(network, "_compiled_call_impl", network._call_impl)
    with torch.no_grad():
        for _ in range(3):
            assert graphed(*inputs()).shape == (2, 6, SIZE, SIZE)
    assert recorder.made == 0 and len(seen) == (3 if why == "hook" else 0)


def test_a_recording_that_fails_is_told_once(recorder: Recorder) -> None:
    recorder.error = RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with …")
    network = tiny.tiny_unet()
    graphed = GraphedNetwork(network)
    with (
        torch.no_grad(),
        pytest.warns(BlendedWarning, match=r"CUDA graph \(CUDA error: operation not .* capturing\); it runs without") as told,
    ):
        for _ in range(4):
            assert torch.equal(graphed(*inputs()), network(*inputs()))
    assert len(told) == 1 and recorder.streams == ["stream of before"]


def test_when_memory_runs_out_recordings_go_first(recorder: Recorder) -> None:
    network = tiny.tiny_unet()
    graphed = GraphedNetwork(network)
    limits, options = MemoryLimits(), GuidanceOptions()
    work = GuidedWork(4, options, network, guided=True, views=True, graphs=graphed)
    with torch.no_grad():
        for _ in range(2):
            graphed(*inputs())
        assert "without CUDA graphs" in limits.lower(work) and limits.rows is None and not graphed._recordings
        graphed(*inputs())
        assert recorder.made == 1 and "2 of 4 images" in limits.lower(work)


@pytest.mark.parametrize("changes", [{"sampler": "dpmpp-2m"}, {"gradient": "unet"}, {"candidates": 3, "batch": 2}], ids=str)
def test_an_edit_with_graphs_is_the_same_edit(recorder: Recorder, changes: dict[str, Any]) -> None:
    options = preset("best", **{"steps": "4", "strength": 1.0, "candidates": 2, "batch": 2, "views": 2, **changes})
    models = tiny.tiny_models()
    plain = edit_picture(picture(), square(), "a tree", models, options)
    recorded = replace(models, context=DeviceContext(cuda_graphs=True))
    with_graphs = edit_picture(picture(), square(), "a tree", recorded, options)
    assert recorder.replayed >= 3 and recorded.ddpm.graphs is None, "the recordings belong to one edit"
    for a, b in zip(plain.candidates, with_graphs.candidates, strict=True):
        assert torch.equal(a.edited, b.edited) and a.score == b.score


def test_recordings_are_released_when_an_edit_fails(recorder: Recorder) -> None:
    models = replace(tiny.tiny_models(), context=DeviceContext(cuda_graphs=True))
    kept: list[Models] = []
    with pytest.raises(KeyboardInterrupt), models.recorded() as own, torch.no_grad():
        kept.append(own)
        assert own.ddpm.graphs is not None
        for _ in range(2):
            own.ddpm.graphs(*inputs())
        assert own.ddpm.graphs._recordings
        raise KeyboardInterrupt
    assert kept[0].ddpm.graphs is not None and not kept[0].ddpm.graphs._recordings


# --- precision and layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "capability", "expected"), [
    ("NVIDIA H200", (9, 0), torch.bfloat16), ("NVIDIA GeForce RTX 3060", (8, 6), torch.bfloat16),
    ("NVIDIA GeForce RTX 2080 Ti", (7, 5), torch.float16), ("Tesla V100-SXM2-16GB", (7, 0), torch.float16),
    ("NVIDIA GeForce GTX 1660 SUPER", (7, 5), torch.float32), ("NVIDIA GeForce GTX 1080", (6, 1), torch.float32),
])  # fmt: skip
def test_the_precision_of_each_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], expected: torch.dtype) -> None:
    asked: list[torch.device] = []

    class Current:
        def __init__(self, device: torch.device) -> None:
            asked.append(device)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    second = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0) and asked == [second])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability if device == second else (0, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name if device == second else "")
    assert fast_precision(second) == expected
    assert prefers_channels_last(second, expected) == (expected != torch.float32)


@pytest.mark.parametrize("kind", ["mps", "xpu", "cpu"])
def test_no_question_of_cuda_is_asked_of_other_devices(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a question of CUDA")

    for name in ("device", "is_bf16_supported", "get_device_capability", "mem_get_info", "empty_cache", "synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    emptied: list[str] = []
    if kind != "cpu":
        monkeypatch.setattr(getattr(torch, kind), "empty_cache", lambda: emptied.append(kind))
    chosen = torch.device(kind)
    context = DeviceContext(chosen)
    context.release()
    assert emptied == ([] if kind == "cpu" else [kind])
    assert not prefers_channels_last(chosen, torch.float16) and not device_module.copies_in_queue(chosen)
    if kind != "cpu":
        assert fast_precision(chosen) == torch.float32
    if kind != "xpu":
        assert context.free_bytes() is None


@pytest.mark.parametrize(("name", "limit"), [("bf16", 0.06), ("fp16", 0.01)])
def test_guidance_of_clip_in_half_precision(name: str, limit: float) -> None:
    exact, half = load_clip(DeviceContext()), load_clip(DeviceContext()).in_precision(name)
    pooled = torch.rand(2, 3, exact.image_size, exact.image_size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    views = SeededRandom(0).views(5, range(2), 3, exact.image_size, True)
    prompt = exact.prompt("an apple")
    expected, found = (ClipLoss(clip, prompt, views=4).pooled_gradient(pooled, views)[0] for clip in (exact, half))
    assert 0 < float((found - expected).norm() / expected.norm()) < limit


# --- the batch that fits into free memory -----------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "image", "candidates", "expected"), [
    (None, 1, 8, USUAL_BATCH), (None, 1, 3, 3), (None, 1, 5, 3), (1000, 100, 8, 8), (1000, 100, 9, 5), (1000, 300, 8, 2), (100, 1000, 8, 1),
    (10**12, 1, 64, MOST_FITTING), (10**12, 1, 66, 22), (0, 100, 4, 1),
])  # fmt: skip
def test_the_batch_that_fits(free: int | None, image: int, candidates: int, expected: int) -> None:
    """All batches of an edit are about equal: 9 candidates of which 8 fit are 5 and 4, not 8 and 1."""
    assert fitting_batch(free, image, candidates) == expected


def test_an_edit_chooses_its_batch_from_free_memory() -> None:
    models = tiny.tiny_models()
    options = EditOptions(steps="2", strength=1.0, candidates=6, batch=0, guidance=GuidanceOptions(views=2))
    image = memory_needed(models.ddpm, models.clip, SIZE**2, options.guidance, 4, torch.device("cpu"))

    class Small(DeviceContext):
        def free_bytes(self) -> int | None:
            return int(image * 2.6)  # of which two images are 0.77

    small = replace(models, context=Small())
    assert with_batch(options, small, True).batch == 2
    assert with_batch(options, small, False).batch == 3, "no memory for CLIP is needed without a prompt"
    coupled = replace(options, guidance=PRESETS["official"].guidance)
    coupled = replace(coupled, guidance=replace(coupled.guidance, background_scale=1.0))
    assert with_batch(coupled, small, True).batch == USUAL_BATCH, "a loss over the batch must not depend on free memory"
    seen: list[tuple[int, ...]] = []
    result = edit_picture(picture(), square(), "a tree", small, options, lambda step: seen.append(step.images))
    assert seen[::2] == [(0, 1), (2, 3), (4, 5)] and result.options.batch == 2
    one = edit_picture(picture(), square(), "a tree", models, replace(options, batch=1))
    expected = {candidate.index: candidate.edited for candidate in one.candidates}
    assert len(result.candidates) == 6
    assert all(apart_by(candidate.edited, expected[candidate.index]) < 1e-4 for candidate in result.candidates)


def test_free_memory_counts_what_the_allocator_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"mem_get_info": (1000, 9000), "memory_reserved": 500, "memory_allocated": 200}
    asked = []
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: asked.append(device) or value)
    assert DeviceContext(torch.device("cuda:1")).free_bytes() == 1300 and asked == [torch.device("cuda:1")] * 3


# --- on a device ------------------------------------------------------------------------------------------------------


@pytest.fixture
def exact_matrices() -> Iterator[None]:
    """Convolutions in float32, not in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def apart(found: Step, expected: Step) -> tuple[float, float]:
    """The difference of x relative to its deviation, and that of the gradient relative to its norm."""
    assert found.gradient is not None and expected.gradient is not None
    x, gradient = expected.x.cpu(), expected.gradient.cpu()
    return (
        float((found.x.cpu() - x).square().mean().sqrt() / x.std()),
        float((found.gradient.cpu() - gradient).norm() / gradient.norm()),
    )


def placed(dtype: torch.dtype = torch.float32, **changes: Any) -> Models:
    models = on("cuda", dtype=dtype, **changes)
    models.ddpm.network.set_compute_dtype(dtype)  # type: ignore[operator]
    return models


@needs_cuda
@pytest.mark.parametrize(("dtype", "channels_last", "limits"), [
    (torch.float32, False, (1e-4, 1e-3)), (torch.float32, True, (1e-4, 1e-3)), (torch.float16, True, (0.01, 0.05)),
    (torch.bfloat16, True, (0.05, 0.2)),
])  # fmt: skip
@pytest.mark.usefixtures("exact_matrices")
def test_cuda_and_the_cpu_agree(dtype: torch.dtype, channels_last: bool, limits: tuple[float, float]) -> None:
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("the device has no bfloat16")
    found = apart(step(placed(dtype, channels_last=channels_last)), step(on("cpu")))
    assert found[0] <= limits[0] and found[1] <= limits[1]


@needs_cuda
@pytest.mark.parametrize("gradient", ["unet", "x0"])
@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp-2m"])
def test_an_edit_with_cuda_graphs_is_the_same_edit(gradient: str, sampler: str) -> None:
    options = preset("best", steps="6", strength=1.0, candidates=3, batch=2, views=3, gradient=gradient, sampler=sampler)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", BlendedWarning)  # a recording that failed
        for use in (False, True):
            models = placed()
            results.append(
                edit_picture(picture(), square(), "a tree", replace(models, context=replace(models.context, cuda_graphs=use)), options)
            )
    plain, recorded = ({candidate.index: candidate.edited for candidate in result.candidates} for result in results)
    assert plain.keys() == recorded.keys() and all(apart_by(recorded[i], plain[i]) < 1e-4 for i in plain)


@needs_cuda
def test_recordings_follow_weights_that_moved() -> None:
    network = placed().ddpm.network
    graphed = GraphedNetwork(network)
    x, timesteps = (value.cuda() for value in inputs())
    with torch.no_grad():
        for _ in range(3):
            graphed(x, timesteps)
        network.cpu()
        ballast = [torch.empty_like(p, device="cuda") for p in network.parameters()]
        network.cuda()
        for _ in range(3):
            assert float((graphed(x, timesteps) - network(x, timesteps)).abs().max()) <= 1e-5
    del ballast
    graphed.clear()


@needs_cuda
def test_a_step_on_cuda_waits_only_for_constants_of_the_warps() -> None:
    """kornia copies a matrix of constants to the device twice a warp."""
    models = placed()
    step(models)
    options = preset("best", steps="10", gradient="unet", views=1, batch=4)
    schedule, prompt = models.ddpm.config.respaced("10"), models.clip.prompt("a tree")  # type: ignore[union-attr]
    x, mask = torch.randn(4, 3, SIZE, SIZE, device="cuda"), square().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = guided_step(models, x, 5, schedule, options, prompt, mask, SeededRandom(0), range(4), wait=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(found.shift) > 0


@needs_cuda
def test_half_of_a_batch_that_does_not_fit_gives_the_same() -> None:
    models, whole = placed(), step(placed())

    def limited(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if len(arguments[0]) > 2:
            torch.empty(2**60, dtype=torch.uint8, device="cuda")  # out of memory

    models.ddpm.network.register_forward_pre_hook(limited)
    with pytest.warns(BlendedWarning, match="2 of 4 images"):
        parts = step(models)
    assert models.limits.rows is not None and float((parts.x - whole.x).abs().max()) <= 1e-4


@needs_cuda
def test_the_batch_is_chosen_from_the_memory_of_the_device() -> None:
    options = EditOptions(steps="2", strength=1.0, candidates=40, batch=0)
    models = placed()
    assert models.context.free_bytes() > 2**20 and with_batch(options, models, True).batch == 20  # type: ignore[operator]
