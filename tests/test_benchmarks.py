"""The benchmarks measure what they report."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import gpu, process, start
from benchmarks.document import DOCS, TABLES, merged, with_tables
from benchmarks.encoder import both_passes, measure_encoder
from benchmarks.measure import Ratio, one_thread, peak_bytes, ratio, time_by_operation, time_interleaved
from benchmarks.networks import SIZES, TINY_CLIP, Size, clip_models, diffusion_model, in_own_precision
from benchmarks.reference import Published, unet_settings
from benchmarks.report import as_text, compared_figures, encoder_table, figures, meets_target, plot, reference_table, table
from benchmarks.step import above_floor, attention_kernels, differences, largest_shares, store_result, with_context
from benchmarks.structure import Setting, checkpointed, explicit_attention, floor, library_step, plain_attention, reference_step
from blended_core.adm.unet import AttentionBlock, UNet
from blended_core.clip.towers import VisionTransformer
from blended_core.denoiser import DiffusionModel
from blended_core.device import DTYPES, DeviceContext
from blended_core.options import preset

from .test_gpu import Recorder
from .tiny import CONFIG

CPU = DeviceContext()


CLONE = os.environ.get("BLENDED_REFERENCE", "")


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting.build(Size("tiny", CONFIG, TINY_CLIP, batch=2, views=3), CPU)


def test_variants_are_measured_in_varying_order() -> None:
    order: list[str] = []
    seconds = time_interleaved({name: partial(order.append, name) for name in "abc"}, 5, CPU.device)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == ["abc", "cba", "bca", "acb", "cab", "bac"]  # the first round is a warm-up
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 5)


def test_the_clock_can_be_that_of_the_processor() -> None:
    ticks = iter(range(100))
    seconds = time_interleaved({"a": lambda: next(ticks), "b": lambda: None}, 2, CPU.device, warm=False, clock=lambda: next(ticks))
    assert seconds == {"a": [2, 2], "b": [1, 1]}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_ratio_is_the_median_over_rounds() -> None:
    result = ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0])
    assert result == Ratio(2.0, 1.5, 2.5, 3) and str(result) == "2.00 (1.50–2.50)"
    assert ratio([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5, 1)


def test_peak_memory_is_the_largest_sum_of_live_tensors() -> None:
    def work() -> None:
        a = torch.zeros(1 << 18)  # 1 MiB
        b = a + 1
        del a
        c = b * 2
        c.exp()  # b, c and the result are alive

    assert peak_bytes(work, CPU.device) == 3 << 20
    assert peak_bytes(lambda: None, CPU.device) == 0


def test_a_profile_reports_the_time_per_operation() -> None:
    a, b = torch.randn(300, 300), torch.randn(300)
    times = time_by_operation(lambda: (a @ a, b + b), CPU.device)
    assert times["aten::mm"] > times["aten::add"] > 0
    assert list(largest_shares({"mm": 3.0, "add": 1.0})) == ["mm", "add"] and largest_shares({"mm": 3.0, "add": 1.0})["mm"] == 0.75
    assert above_floor({"mm": 3.0, "warp": 1.0}, {"mm": 3.5, "add": 0.5}) == {"warp": 0.25, "mm": -0.125}


@pytest.mark.parametrize("new_order", [False, True])
def test_explicit_attention_equals_that_of_the_block(new_order: bool) -> None:
    block = AttentionBlock(64, 2, new_order).eval()
    torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    x = torch.randn(2, 64, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(explicit_attention(block, x), block(x), atol=1e-5)


def test_all_variants_compute_the_same_step(setting: Setting) -> None:
    with CPU.autograd():
        plain = reference_step(setting)
        assert not any(p.requires_grad for p in setting.model.network.parameters()), "gradients of the weights are disabled again"
        for result in (library_step(setting), library_step(setting, view_chunk=1), checkpointed(setting)()):
            difference = differences(plain, result)
            assert difference["x"] < 1e-4 and difference["gradient"] < 1e-3
        other = differences(plain, library_step(setting, "x0"))
        assert other["gradient"] > 1e-3  # the comparison detects another gradient


def test_forward_passes_of_each_variant(setting: Setting) -> None:
    calls: list[bool] = []
    hook = setting.model.network.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with CPU.autograd():
        reference_step(setting)
        assert calls == [False, True]
        library_step(setting)
        assert calls[2:] == [True]
        library_step(setting, "x0")
        assert calls[3:] == [False]
    hook.remove()


def test_x0_gradient_and_checkpointing_need_less_memory(setting: Setting) -> None:
    with CPU.autograd():
        memory = {g: peak_bytes(lambda g=g: library_step(setting, g), CPU.device) for g in ("x0", "unet")}  # type: ignore[misc]
        assert memory["x0"] < 0.6 * memory["unet"]
        assert peak_bytes(checkpointed(setting), CPU.device) < memory["unet"]


def test_the_floor_and_the_reference_disable_recomputation(setting: Setting) -> None:
    with CPU.autograd():
        assert peak_bytes(lambda: library_step(setting), CPU.device) < 0.7 * peak_bytes(partial(floor, setting), CPU.device)
        before = peak_bytes(lambda: library_step(setting), CPU.device)
        reference_step(setting)
        assert peak_bytes(lambda: library_step(setting), CPU.device) == before, "recomputation is enabled again"


def test_the_attention_kernel_is_reported(setting: Setting) -> None:
    with CPU.autograd():
        fused, plain = (time_by_operation(work, CPU.device, 1) for work in (lambda: library_step(setting), plain_attention(setting)))
    assert attention_kernels(fused) == ["flash_attention_for_cpu"] and attention_kernels(plain) == ["attention_math"]


def test_settings_in_another_precision_or_memory_format(setting: Setting) -> None:
    half, channels_last_setting = with_context(setting, dtype=torch.bfloat16), with_context(setting, channels_last=True)
    assert (
        half.clip is setting.clip
        and half.open_clip is setting.open_clip
        and half.context.dtype == torch.bfloat16
        and channels_last_setting.clip is not setting.clip
    )
    with CPU.autograd():
        results: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, other in (("own", setting), ("turned", channels_last_setting)):
            store_result(results, name, partial(library_step, other))
        difference = differences(results["own"], results["turned"])
        assert difference["x"] < 1e-4 and difference["gradient"] < 1e-3


@pytest.fixture
def tiny_session(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[gpu.Session, list[str]]]:
    """The session of a GPU, with tiny networks on the CPU."""
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    monkeypatch.setattr(gpu, "BATCHES", (1, 2))
    monkeypatch.setattr(gpu, "preset", lambda name, **changes: preset(name, **{**changes, "steps": "2", "views": 2}))
    monkeypatch.setattr(gpu, "peak_bytes", lambda work, _device: work() and 2**20)

    def run(seconds: float, **changes: object) -> tuple[gpu.Session, list[str]]:
        now, saved = [0.0], []

        def log(_text: str) -> None:
            now[0] += 1.0

        session = gpu.Session(lambda results: saved.append(json.dumps(results)), log, seconds, lambda: now[0])
        size = Size("tiny", CONFIG, TINY_CLIP, batch=2, views=2)
        gpu.measure_gpu(CPU.device, session, size, candidates=3, compiler="eager", **changes)  # type: ignore[arg-type]
        return session, saved

    return run


@pytest.mark.slow
def test_a_session_on_a_gpu_measures_everything(
    tiny_session: Callable[..., tuple[gpu.Session, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    session, saved = tiny_session(10_000.0)
    results = session.results
    assert results["failed"] == {} and results["left out"] == [] and json.loads(saved[-1]) == results
    assert recorder.replayed > 30, "the variants with CUDA graphs replay recordings"
    for gradient in gpu.GRADIENTS:
        step = results[f"step, gradient {gradient}, batch 2"]
        assert {"fp32", "automatic", "automatic, CUDA graphs", "automatic, compiled", "automatic, compiled with CUDA graphs"} <= set(step)
        assert {f"UNet {name}{last}, CLIP fp32" for name in DTYPES for last in ("", ", channels last")} <= set(step)
        assert step["fp32"]["difference"] == {"x": 0.0, "gradient": 0.0} == step["automatic, CUDA graphs"]["difference"]
        assert 0 < step["UNet bf16, CLIP fp32"]["difference"]["gradient"] < 0.1
        assert 0 < step["UNet fp32, CLIP bf16"]["difference"]["gradient"] < 0.1
        assert list(results[f"batch, gradient {gradient}, CUDA graphs"]) == ["1", "2"]
    assert list(results["edit"]) == ["gradient x0", "gradient x0, CUDA graphs", "gradient unet", "gradient unet, CUDA graphs"]
    edit = results["edit"]["gradient x0"]
    assert (edit["candidates"], edit["batch"], edit["steps"]) == (3, 3, 2) and edit["seconds"] > 0 and not edit["warnings"]
    text = "\n".join(gpu.gpu_table(results))
    assert "| edit | gradient unet, CUDA graphs |" in text and "for 3 candidates of 2 steps, 3 at once" in text


def test_a_session_keeps_to_its_budget_and_survives_failures(
    tiny_session: Callable[..., tuple[gpu.Session, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal instruction")

    monkeypatch.setattr(gpu, "waits", fails)
    session, saved = tiny_session(10.0)
    results = session.results
    assert results["failed"] == {f"waits of a step: {g}": "RuntimeError: CUDA error: an illegal instruction" for g in gpu.GRADIENTS}
    measured = sum(len(figures) for part, figures in results.items() if part not in ("left out", "failed"))
    # Every measurement takes a second of this clock, and the last one starts with five seconds left.
    assert measured == 4 and len(results["left out"]) > 20 and any("compiled" in name for name in results["left out"])
    assert len(saved) == 2 + measured + len(results["left out"])


def test_processes_alternate_and_differ_in_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None, str | None]] = []

    def run_python(_program: str, name: str, _steps: str, keep: str, environment: dict[str, str]) -> list[str]:
        calls.append((keep, environment.get("OMP_WAIT_POLICY"), environment.get("GOMP_SPINCOUNT")))
        assert name == "small" and environment["PATH"] == os.environ["PATH"]
        return [str({"keep": 1.0}.get(keep, 2.0 if environment.get("GOMP_SPINCOUNT") else 4.0)), str(300 * 2**20)]

    monkeypatch.setattr(process, "run_python", run_python)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # must not reach the measured processes
    result = process.measure_process("small", 2, lambda _line: None)
    variants = [("", None, None), ("", "PASSIVE", None), ("", "PASSIVE", "1000"), ("keep", "PASSIVE", "1000")]
    assert calls == [*reversed(variants), *variants]
    assert result["kept"]["median"] == 0.5 and result["ratios"]["the terminal / as torch comes"]["median"] == 0.25
    text = table({"process": [result]})
    assert "| x̂0 step, the terminal / as torch comes | small | 0.25 (0.25–0.25) |" in text
    assert "the terminal 300 | |" in text


@pytest.mark.skipif(sys.platform != "linux", reason="keeps freed memory only on Linux")
def test_a_process_prints_seconds_and_bytes() -> None:
    seconds, peak_memory = process.run_python(process.WORK, "small", "1", "keep")
    assert 0 < float(seconds) < 600 and float(peak_memory) > 100 * 2**20


def test_sizes_of_the_networks() -> None:
    assert list(SIZES) == ["small", "medium", "full"]
    small, full = SIZES["small"], SIZES["full"]
    assert (small.batch, small.views, small.unet.image_size) == (4, 8, 64) and full.unet.image_size == 256
    model = diffusion_model(replace(small, unet=replace(small.unet, model_channels=32)), CPU)
    assert isinstance(model, DiffusionModel)
    with torch.device("meta"):
        assert round(sum(p.numel() for p in UNet(full.unet).parameters()) / 1e6, 1) == 552.8


def test_the_report_marks_figures_that_meet_their_target(tmp_path: Path) -> None:
    values = vars(Ratio(1.7, 1.6, 1.8, 5))
    step = {
        "network": "small", "ratios": {"reference / exact": values, "exact / floor": vars(Ratio(1.2, 1.1, 1.3, 5))},
        "memory_ratios": {"x0 memory / forward": 1.0}, "memory_mib": {"exact": 320.0}, "difference": {"exact": {"x": 1e-7, "gradient": 2e-6}},
    }  # fmt: skip
    result = json.loads(json.dumps({"steps": [step]}))
    text = table(result)
    assert "1.70 (1.60–1.80) | ≥ 1.65" in text and "| exact 320 |" in text and as_text(values) in text
    marks = {what: meets_target(value, target) for (_, what), value, target in figures(result) if target}
    assert marks == {"reference / exact": True, "exact / floor": False, "x0 memory / forward": True}
    plot(tmp_path / "plot.png", result)
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 600


def test_the_report_shows_both_starts_and_the_bars_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str, bool]] = []

    def cpu_seconds(name: str, variables: dict[str, str]) -> float:
        folder = Path(variables["PYTHONPYCACHEPREFIX"])
        compiled = folder / start.ROOT.relative_to(start.ROOT.anchor) / "module.pyc"
        if "PYTHONDONTWRITEBYTECODE" not in variables:  # the round that compiles
            for path in (compiled, folder / "lib" / "site-packages" / "torch.pyc", folder / "lib" / "re.pyc"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        else:
            assert (folder / "lib" / "re.pyc").exists(), "the standard library is compiled in both"
            assert (folder / "lib" / "site-packages" / "torch.pyc").exists() == compiled.exists()
            calls.append((folder.name, name, compiled.exists()))
        return 8.0 if folder.name == start.FIRST else 2.0

    monkeypatch.setattr(start, "cpu_seconds", cpu_seconds)
    result = start.measure_start(2, lambda _line: None)
    assert {(which, found) for which, _, found in calls} == {(start.FIRST, False), (start.LATER, True)}
    assert len(calls) == 4 * len(result["seconds"][start.FIRST]) and set(start.PROGRAMS) <= set(result["seconds"][start.LATER])
    text = table({"start": result})
    assert "| CPU seconds, demo to the end of its first step | first start | 8.00 (8.00–8.00) | ≤ 7 |" in text
    assert "| CPU seconds, demo to the end of its first step | later start | 2.00 (2.00–2.00) |  |" in text


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the time of a process that has ended")
def test_the_time_of_a_process_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(start.TARGETS) - {start.PACK_IN_COMFYUI} <= set(start.PROGRAMS)
    assert 0 < start.cpu_seconds("edit with a missing picture", {}) < 60
    monkeypatch.setitem(start.PROGRAMS, "--version", "raise ValueError('broken')")
    with pytest.raises(RuntimeError, match="broken"):
        start.cpu_seconds("--version", {})


def test_both_encoders_have_the_same_weights(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(setting.clip.model.visual, VisionTransformer) and not isinstance(setting.open_clip.model.visual, VisionTransformer)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(setting.clip.encode_normalized(images), setting.open_clip.encode_normalized(images), atol=1e-5)
    monkeypatch.setattr("blended_core.clip.model.fast_precision", lambda device: torch.bfloat16)
    assert in_own_precision(setting.clip) is None, "too small"
    wide = {**TINY_CLIP, "vision_cfg": {**TINY_CLIP["vision_cfg"], "width": 512, "layers": 1}}
    clip = clip_models(replace(setting.size, clip=wide), CPU)[0]
    near = in_own_precision(clip)
    assert near is not None and near.image_dtype == torch.bfloat16 and clip.image_dtype == torch.float32


@pytest.mark.parametrize("half", [True, False])
def test_encoders_are_compared_in_time_of_the_processor(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.encoder.computes_bfloat16", lambda device: half)
    messages: list[str] = []
    result = measure_encoder(1, messages.append, (2,), {"tiny": TINY_CLIP})
    (entry,) = result["encoders"]
    assert set(entry["ratios"]) == {"float32 / open_clip", *(["bfloat16 / open_clip"] if half else [])} and len(messages) == 1
    assert entry["ratios"]["float32 / open_clip"]["median"] == entry["seconds"]["float32"][0] / entry["seconds"]["open_clip"][0]
    assert all(shares for shares in entry["operations"].values())
    assert "| float32 / open_clip | " in encoder_table({"encoder": result}) and "; to reach ≤ 0.7 |" in encoder_table({"encoder": result})
    gradient = both_passes(clip_models(SIZES["small"], CPU)[0].model.visual, torch.zeros(2, 3, 32, 32))  # type: ignore[arg-type]
    assert gradient.shape == (2, 3, 32, 32) and gradient.any()


def test_settings_of_guided_diffusion() -> None:
    given = unet_settings(SIZES["small"].unet)
    assert (given["attention_resolutions"], given["channel_mult"], given["num_head_channels"]) == ("16,8", "1,2,2,2", 32)
    assert unet_settings(SIZES["medium"].unet)["num_head_channels"] == -1  # guided-diffusion's word for none
    assert given["use_fp16"] is False


def test_another_folder_is_not_the_published_code(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a clone of https://github\.com/omriav/blended-diffusion"):
        Published(tmp_path, setting)


@pytest.mark.skipif(not CLONE, reason="BLENDED_REFERENCE names no clone of omriav/blended-diffusion")
def test_the_published_code_runs_with_the_same_networks(setting: Setting) -> None:
    published = Published(Path(CLONE), setting)
    assert max(published.differences().values()) < 1e-5
    calls: list[bool] = []
    published.editor.model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    rows: list[int] = []
    published.editor.clip_model.visual.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    assert published.step().shape == setting.x.shape
    assert calls == [False, True] and rows == [setting.size.batch * setting.size.views]
    assert published.editor.model.input_blocks[0][0].weight.requires_grad is False


def measured(network: str, value: float) -> dict[str, Any]:
    ratios = {"published code / x0": vars(Ratio(value, value, value, 4)), "exact / floor": vars(Ratio(1.02, 1.0, 1.1, 4))}
    return {"network": network, "ratios": ratios, "operations": {"x0": {"aten::mm": 0.5}}}


def test_tables_of_compared_code() -> None:
    result = {"reference": [measured("small", 3.2), measured("medium", 1.7)]}
    text = reference_table(result)
    assert "| | small | medium |" in text and "| small | x0 | mm 50.0% |" in text
    assert "| published code / x0 | 3.20 (3.20–3.20); to reach ≥ 3 | 1.70 (1.70–1.70); to reach ≥ 1.8 |" in text
    marks = [meets_target(value, target) for _, value, target in compared_figures(result) if target]
    assert marks == [True, True, False]


def test_runs_are_merged_by_part_and_network() -> None:
    record = {"reference": [measured("small", 3.0), measured("medium", 1.0)], "load": {"ratios": {}}, "machines": {"load": {"threads": 2}}}
    run = {"machine": {"threads": 1}, "reference": [measured("medium", 2.0), measured("full", 4.0)]}
    result = merged(record, run)
    values = {entry["network"]: entry["ratios"]["published code / x0"]["median"] for entry in result["reference"]}
    assert values == {"small": 3.0, "medium": 2.0, "full": 4.0} and result["load"] == record["load"] and "machine" not in result
    assert result["machines"] == {"load": {"threads": 2}, "reference, medium": {"threads": 1}, "reference, full": {"threads": 1}}


def test_the_tables_of_the_document_are_those_of_its_figures() -> None:
    text, record = (DOCS / "benchmarks.md").read_text("utf-8"), json.loads((DOCS / "benchmarks.json").read_text("utf-8"))
    assert with_tables(text, record) == text
    assert all(part.split(", ")[0] in record for part in record["machines"]) and len(TABLES) == 4
    with pytest.raises(ValueError, match="has 0 comments <!-- reference -->"):
        with_tables("no tables", record)
