"""Run by ComfyUI's own Python (tests/test_core_model.py): DDPM as MODEL with core's samplers and memory manager. Prints the observations as JSON."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from contract import NAME, pack
from torch import Tensor

SIZE = 16
OBJECTIVES = ("eps", "v", "x0")
SCHEDULES = (("linear", 1000), ("cosine", 1000), ("linear", 250), ("cosine", 4000))


class Pack:
    """The modules of the pack and of core that the checks use."""

    def __init__(self) -> None:
        pack()
        for name in ("load", "model", "memory", "runtime", "scene", "extension"):
            setattr(self, name, importlib.import_module(f"{NAME}.nodes.{name}"))
        for name in ("denoiser", "diffusion", "device", "options", "random", "errors", "schedule"):
            setattr(self, name, importlib.import_module(f"{NAME}.blended_core.{name}"))
        self.steps = importlib.import_module(f"{NAME}.blended_core.sample")
        # tests/tiny.py with the classes of the pack.
        for name in [name for name in sys.modules if name.startswith(f"{NAME}.blended_core")]:
            sys.modules[name.removeprefix(f"{NAME}.")] = sys.modules[name]
        self.tiny = importlib.import_module("tiny")
        self.mm = importlib.import_module("comfy.model_management")
        self.sampling = importlib.import_module("comfy.sample")
        self.samplers = importlib.import_module("comfy.samplers")
        self.nodes = importlib.import_module("nodes")
        self.noise_of = importlib.import_module("comfy.k_diffusion.sampling").default_noise_sampler

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def loaded(self, process: Any = None, dtype: torch.dtype = torch.float32, **unet: Any) -> Any:
        """A tiny network of random weights in a BLENDED_DDPM socket."""
        with self.runtime.library_scope("Load DDPM"):
            model = self.tiny.tiny_model(process, **unet)
            model.network.set_compute_dtype(dtype)
        return self.socket(model, dtype)

    def socket(self, model: Any, dtype: torch.dtype = torch.float32) -> Any:
        """A model in a BLENDED_DDPM socket, as Load DDPM puts it there."""
        with self.runtime.library_scope("Load DDPM"):
            context = replace(self.memory.device_context("fp32"), dtype=dtype)
            return self.memory.LoadedDDPM(model, self.memory.manage(self.model.CoreModel(model, context)), context)

    def as_model(self, ddpm: Any, class_choice: str = "zero") -> Any:
        """The outputs of the node."""
        return self.model.DDPMAsModel.execute(ddpm, class_choice).result

    def sample(
        self, out: Any, latent: dict[str, Any], name: str = "euler", steps: int = 3, scheduler: str = "normal", **more: Any
    ) -> Tensor:
        """KSampler."""
        values = {"cfg": 1.0, "positive": out[1], "negative": out[2], "denoise": 0.75, "seed": 3, **more}
        model = values.pop("model", out[0])
        seed, cfg = values.pop("seed"), values.pop("cfg")
        positive, negative = values.pop("positive"), values.pop("negative")
        result = self.nodes.common_ksampler(model, seed, steps, cfg, name, scheduler, positive, negative, latent, **values)
        return result[0]["samples"]  # type: ignore[no-any-return]


def picture(batch: int = 1, size: int = SIZE) -> Tensor:
    """[B, 3, size, size] in −1..1."""
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(5)) * 2 - 1


def masked(batch: int = 1, size: int = SIZE, value: float = 1.0) -> dict[str, Any]:
    """A LATENT with a noise mask."""
    mask = torch.zeros(1, 1, size, size)
    mask[..., 4:12, 4:12] = value
    return {"samples": picture(batch, size), "noise_mask": mask}


def sentence(work: Callable[[], Any]) -> str:
    """The error of a call."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@contextlib.contextmanager
def watched(network: Any) -> Iterator[list[tuple[list[float], list[int]]]]:
    """Records timesteps and labels of every call of a network."""
    calls: list[tuple[list[float], list[int]]] = []
    forward = network.forward

    def recording(x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        calls.append((timesteps.tolist(), [] if labels is None else labels.tolist()))
        return forward(x, timesteps, labels)  # type: ignore[no-any-return]

    network.forward = recording
    try:
        yield calls
    finally:
        del network.forward


class Plausible(torch.nn.Module):
    """A network whose predictions fit their input, as those of a trained one do: the exact denoiser of independent normal pixels, and a random UNet
    that moves x̂0 by a part of what is unknown. (x̂0 of random weights alone is no function of x, so that the ε of it grows without limit.)"""

    def __init__(self, process: Any, unet: Any) -> None:
        super().__init__()
        self.unet, self.process = unet, process
        self.alphas = torch.from_numpy(process.respaced(process.steps).alphas_cumprod).float()
        self.unit = 1000 / process.steps if process.rescale_timesteps else 1

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """[B, 3 or 6, H, W]."""
        alpha = self.alphas[(timesteps / self.unit).round().long()].view(-1, 1, 1, 1)
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        first, *variance = self.unet(x, timesteps).split(3, dim=1)
        x0 = signal * 0.25 * x / (alpha * 0.25 + 1 - alpha) + 0.3 * noise * first.tanh()
        eps = (x - signal * x0) / noise
        return torch.cat([{"eps": eps, "v": signal * eps - noise * x0, "x0": x0}[self.process.objective], *variance], dim=1)


def plausible(core: Pack, process: Any) -> Any:
    """:class:`Plausible` with its process."""
    learned = process.variance == "learned_range"
    with core.runtime.library_scope("Load DDPM"):
        network = Plausible(process, core.tiny.tiny_unet(out_channels=6 if learned else 3))
        return core.denoiser.DiffusionModel(network, process, SIZE)


def equalities(core: Pack) -> dict[str, Any]:
    """KSampler, 30 steps at denoise 0.75, against the pack's own loop, respacing 40 at strength 0.75: distance and timesteps."""
    found = {}
    for objective in OBJECTIVES:
        for schedule, steps in SCHEDULES:
            for learned in (False, True):
                process = core.diffusion.DiffusionConfig(
                    schedule, steps, objective=objective, variance="learned_range" if learned else "fixed_small"
                )
                ddpm = core.socket(plausible(core, process))
                out = core.as_model(ddpm)
                for name in ("euler", "ddpm"):
                    with watched(ddpm.model.network) as theirs:
                        result = core.sample(out, {"samples": picture()}, name, 30)
                    with watched(ddpm.model.network) as ours:
                        expected = own_loop(core, ddpm.model, name)
                    found[f"{objective} {schedule} {steps} {'learned' if learned else 'fixed'} {name}"] = [
                        distance(result, expected), [t for t, _ in theirs] == [t for t, _ in ours], len(theirs), distance(expected, picture()),
                    ]  # fmt: skip
    embedded = core.load.LoadDDPM.execute("embedded").result[0]
    for name in ("euler", "ddpm"):
        result = core.sample(core.as_model(embedded), {"samples": picture(size=64)}, name, 6)
        expected = own_loop(core, embedded.model, name, 8, 64)
        found[f"embedded {name}"] = [distance(result, expected), True, 30, distance(expected, picture(size=64))]
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return float((a - b).abs().max())


def own_loop(core: Pack, model: Any, name: str, steps: int = 40, size: int = SIZE) -> Tensor:
    """The pack's steps of DDIM (η 0) or DDPM (fixed_small) at strength 0.75, with KSampler's noise."""
    d, schedule = core.diffusion, model.config.respaced(steps)
    start = schedule.start_index(0.75)
    noise = torch.randn(1, 3, size, size, generator=torch.manual_seed(3))
    x = d.q_sample(picture(size=size), start, noise, schedule)
    draw = core.noise_of(x, seed=3)
    with torch.no_grad():
        for index in range(start, -1, -1):
            prediction = model.predict(x, index, schedule)
            if name == "euler":
                x = d.ddim_step(x, prediction.x0, index, None, schedule)
                continue
            variance, log = d.log_variance(None, index, schedule, "fixed_small", x)
            small = replace(prediction, variance=variance, log_variance=log)
            x = d.ddpm_step(small, index, draw(None, None) if index else x)
    return x


def levels(core: Pack) -> dict[str, Any]:
    """percent_to_sigma at the steps of processes of several lengths, and the levels of every scheduler."""
    found: dict[str, Any] = {"percent": [], "schedulers": {}}
    for schedule, steps in SCHEDULES:
        process = core.diffusion.DiffusionConfig(schedule, steps)
        sampling = core.model.levels_of(process)
        sigmas = process.respaced(steps).sqrt_recipm1_alphas_cumprod
        found["percent"] += [
            abs(sampling.percent_to_sigma(1 - i / (steps - 1)) / sigmas[i] - 1) for i in (1, steps // 3, steps // 2, steps - 2)
        ]
        found["ends"] = [sampling.percent_to_sigma(0.0), sampling.percent_to_sigma(1.0)]
        for name in core.samplers.SCHEDULER_NAMES:
            values = core.samplers.calculate_sigmas(sampling, name, 7)
            found["schedulers"][f"{name} {schedule} {steps}"] = bool(
                (values[:-1] >= values[1:]).all() and values.isfinite().all() and len(values) > 1
            )
        same = core.samplers.calculate_sigmas(sampling, "normal", 40)[:-1].flip(0)
        own = process.respaced("40")
        found.setdefault("normal", []).append(float((same / torch.from_numpy(own.sqrt_recipm1_alphas_cumprod).float() - 1).abs().max()))
    return found


def all_samplers(core: Pack) -> dict[str, Any]:
    """Every sampler on a masked picture: the largest difference outside of the mask and the mean one inside, or the error."""
    out, latent = core.as_model(core.loaded()), masked()
    outside = (latent["noise_mask"] == 0).expand(1, 3, -1, -1)
    found: dict[str, Any] = {}
    for name in core.samplers.KSampler.SAMPLERS:
        for scheduler in ("normal", "karras") if name in ("euler", "dpmpp_2m") else ("normal",):
            try:
                change = (core.sample(out, latent, name, 3, scheduler) - latent["samples"]).abs()
                found[f"{name} {scheduler}"] = [float(change[outside].max()), float(change[~outside].mean()), bool(change.isfinite().all())]
            except Exception as error:
                found[f"{name} {scheduler}"] = f"{type(error).__name__}: {error}"
    return found


def masks(core: Pack) -> dict[str, Any]:
    """Differential Diffusion with a ramp, a LATENT that keeps noise, a batch."""
    out, found = core.as_model(core.loaded()), {}
    differential = importlib.import_module("comfy_extras.nodes_differential_diffusion").DifferentialDiffusion.execute(out[0]).result[0]
    latent = masked(2)
    latent["noise_mask"] = torch.linspace(-0.3, 1, SIZE).clamp(min=0).expand(1, 1, SIZE, SIZE).clone()
    change = (core.sample(out, latent, "euler", 8, model=differential) - latent["samples"]).abs().mean((0, 1, 2))
    found["ramp"] = change.tolist()
    found["black"] = int((latent["noise_mask"][0, 0, 0] == 0).sum())
    noisy = core.sample(out, masked(), "euler", 8, denoise=1.0, start_step=2, last_step=5)
    found["noise left outside"] = float((noisy - picture())[..., :4, :].abs().min(dim=0).values.mean())
    sigmas = core.samplers.calculate_sigmas(out[0].get_model_object("model_sampling"), "normal", 3)
    sampler = core.samplers.sampler_object("uni_pc")
    core.sampling.sample_custom(out[0], picture(), 1.0, sampler, sigmas, out[1], out[2], masked()["samples"])
    found["last sigma"] = float(sigmas[-1])
    return found


def classes(core: Pack) -> dict[str, Any]:
    """A class-conditional network: positive, negative, CFG in one pass, a text, classes that do not exist."""
    process = core.diffusion.DiffusionConfig(variance="learned_range")
    with torch.inference_mode(False):
        ddpm = core.loaded(process, num_classes=5, use_scale_shift_norm=True)
        torch.nn.init.normal_(ddpm.model.network.label_emb.weight, std=3, generator=torch.Generator().manual_seed(1))
    out, zero, latent = core.as_model(ddpm, "3"), core.as_model(ddpm), {"samples": picture(2)}
    found: dict[str, Any] = {}
    sampling, step = out[0].get_model_object("model_sampling"), 500
    noise = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))

    def x0(which: Any, cfg: float = 1.0, positive: Any = None) -> Tensor:
        """x̂0 at one level."""
        sigmas = torch.tensor([sampling.sigmas[step], 0.0])
        sampler = core.samplers.sampler_object("dpmpp_2m")
        result: Tensor = core.sampling.sample_custom(
            which[0], noise, cfg, sampler, sigmas, positive or which[1], which[2], latent["samples"]
        )
        return result

    with watched(ddpm.model.network) as calls:
        three, none, both = x0(out), x0(zero), x0(out, 2.0)
        text = x0(out, positive=[[torch.randn(1, 77, 768), {"pooled_output": torch.randn(1, 768)}]])
    found["calls"] = calls
    found["moved"] = distance(three, none)
    found["cfg"] = distance(both, none + 2 * (three - none))
    found["text"] = distance(text, none)
    with torch.inference_mode(False), torch.no_grad():
        schedule = ddpm.model.config.respaced(1000)
        x = core.diffusion.q_sample(latent["samples"].clone(), step, noise.clone(), schedule)
        found["own"] = [
            distance(three, ddpm.model.predict(x, step, schedule, torch.tensor([3, 3])).x0),
            distance(none, ddpm.model.predict(x, step, schedule, torch.zeros(2, ddpm.model.label_dim)).x0),
        ]
    found["too high"] = sentence(lambda: core.as_model(ddpm, "5"))
    found["a word"] = sentence(lambda: core.as_model(ddpm, "cat"))
    found["random"] = sentence(lambda: core.as_model(ddpm, "random"))
    small = core.loaded(process, num_classes=2)
    found["of another model"] = sentence(lambda: core.sample(core.as_model(small), latent, positive=out[1]))
    plain = core.loaded()
    found["unconditional"] = distance(core.sample(core.as_model(plain, "3"), latent), core.sample(core.as_model(plain), latent))
    return found


def precisions(core: Pack) -> dict[str, Any]:
    """Half precision inside, float32 outside; a picture of another size; nothing but noise; an RGBA image."""
    out = core.as_model(core.loaded())
    latent = {"samples": picture()}
    reference, found = core.sample(out, latent), {}
    half = core.sample(core.as_model(core.loaded(dtype=torch.bfloat16)), latent)
    found["bf16"] = [float((half - reference).abs().mean()), str(half.dtype)]
    found["wide"] = list(core.sample(out, {"samples": torch.zeros(1, 3, 12, 40) + 0.1}).shape)
    empty = core.nodes.EmptyLatentImage().generate(SIZE, SIZE)[0]
    found["empty"] = list(core.sample(out, empty, denoise=1.0).shape)
    vae, image = out[3], torch.rand(2, SIZE, SIZE, 4)
    with mock.patch.object(core.mm, "vae_dtype", return_value=torch.bfloat16):  # as on most GPUs
        found["vae dtype"] = str(core.as_model(core.loaded())[3].vae_dtype)
    encoded = core.nodes.VAEEncode().encode(vae, image)[0]["samples"]
    found["encoded"] = [list(encoded.shape), float((encoded - (image[..., :3].movedim(-1, 1) * 2 - 1)).abs().max())]
    found["decoded"] = float((core.nodes.VAEDecode().decode(vae, {"samples": encoded})[0] - image[..., :3]).abs().max())
    args = importlib.import_module("comfy.cli_args").args
    args.bf16_vae = True  # core's own choice for a VAE on many GPUs
    vae, levels = core.as_model(core.loaded())[3], (torch.arange(256) / 255).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    args.bf16_vae = False
    back = core.nodes.VAEDecode().decode(vae, core.nodes.VAEEncode().encode(vae, levels)[0])[0]
    found["levels"] = [float((back - levels).abs().max()), int((np.uint8(255.0 * back.numpy()) != np.uint8(255.0 * levels.numpy())).sum())]
    previewer = importlib.import_module("latent_preview").Latent2RGBPreviewer(out[0].get_model_object("latent_format").latent_rgb_factors)
    shown = torch.from_numpy(np.array(previewer.decode_latent_to_preview(picture())))
    found["preview"] = float((shown - (picture()[0].movedim(0, -1) + 1) * 127.5).abs().max())
    found["size"] = out[4]
    return found


def others(core: Pack) -> dict[str, Any]:
    """Weight patches by name, merges, wrappers around the network, a ControlNet, timestep ranges."""
    ddpm = core.loaded()
    out, latent, found = core.as_model(ddpm), {"samples": picture()}, {}
    network = ddpm.model.network
    keys = set(out[0].model.state_dict())
    found["names"] = keys >= {f"diffusion_model.{name}" for name in network.state_dict()}
    found["lora"] = len(set(importlib.import_module("comfy.lora").model_lora_keys_unet(out[0].model, {}).values()))
    plain = core.sample(out, latent)
    other = core.loaded()
    with torch.inference_mode(False), torch.no_grad():
        other.model.network.out[2].weight.mul_(2)
    merge = importlib.import_module("comfy_extras.nodes_model_merging").ModelMergeSimple()
    merged = merge.merge(out[0], core.as_model(other)[0], 0.0)[0]
    found["merged"] = float((core.sample(out, latent, model=merged) - core.sample(core.as_model(other), latent)).abs().max())
    found["not merged"] = float((core.sample(out, latent) - plain).abs().max())

    calls: list[int] = []
    wrapped = out[0].clone()

    def around(executor: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        calls.append(len(args))
        return executor(x, *args, **options)

    wrapped.add_wrapper_with_key("diffusion_model", "test", around)
    found["wrapped"] = [float((core.sample(out, latent, model=wrapped) - plain).abs().max()), len(calls)]
    cached = importlib.import_module("comfy_extras.nodes_easycache").EasyCacheNode.execute(out[0], 0.2, 0.15, 0.95, False).result[0]
    found["cached"] = bool(core.sample(out, latent, steps=6, model=cached).isfinite().all())

    renormalized = importlib.import_module("comfy_extras.nodes_lumina2").RenormCFG.execute(out[0], 100.0, 1.0).result[0]
    found["RenormCFG"] = bool(core.sample(out, latent, cfg=2.0, model=renormalized).isfinite().all())

    control = importlib.import_module("comfy.controlnet")

    class StandIn(control.ControlBase):  # type: ignore[misc, name-defined]
        """A ControlNet as core calls it."""

        asked = 0

        def get_control(self, x: Tensor, *args: Any) -> dict[str, list[Any]]:
            self.asked += 1
            return {"input": [], "middle": [torch.zeros_like(x)], "output": []}

        def inference_memory_requirements(self, dtype: Any) -> int:
            return 0

    stand_in = StandIn()
    positive = [[out[1][0][0], {**out[1][0][1], "control": stand_in, "control_apply_to_uncond": True}]]
    found["control"] = [float((core.sample(out, latent, positive=positive) - plain).abs().max()), stand_in.asked]
    short = core.as_model(core.loaded(core.diffusion.DiffusionConfig("linear", 250, variance="learned_range")))
    setter = core.nodes.ConditioningSetTimestepRange()
    early = setter.set_range(out[1], 0.0, 0.5)[0]
    late = setter.set_range(out[1], 0.5, 1.0)[0]
    found["ranges"] = distance(core.sample(short, latent, steps=6, positive=early + late), core.sample(short, latent, steps=6))
    return found


def guided(core: Pack, ddpm: Any) -> tuple[Tensor, Tensor]:
    """A guided step of the pack with the gradient through the network: the sample and the gradient."""
    options = core.options.preset("best", steps="6", batch=1, gradient="unet", scale=1000.0)
    with core.runtime.library_scope("Load DDPM"):
        clip, context = core.tiny.tiny_clip(), core.memory.load_to_device(ddpm, None)
        models = core.steps.Models(ddpm.model, clip, None, context, ddpm.limits)
        step = core.steps.guided_step(
            models, picture().clone(), 3, ddpm.model.config.respaced("6"), options, clip.prompt("a"), torch.ones(1, 1, SIZE, SIZE),
            core.random.SeededRandom(0), range(1),
        )  # fmt: skip
    return step.x, step.gradient


def memory(core: Pack) -> dict[str, Any]:
    """One network in both sockets, weight patches, what stays on the MODEL, /free."""
    mm, found = core.mm, {}
    mm.unload_all_models()
    ddpm = core.loaded()
    network = ddpm.model.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    out, latent = core.as_model(ddpm), {"samples": picture()}
    state = repr(state_of(out[0]))
    plain = core.sample(out, latent)
    found["state"] = repr(state_of(out[0])) == state
    found["left on it"] = sorted(name for name, value in vars(out[0].model).items() if name == "current_patcher" and value is not None)
    patched = out[0].clone()
    change = torch.randn(before["input_blocks.0.0.weight"].shape, generator=torch.Generator().manual_seed(0))
    patched.add_patches({"diffusion_model.input_blocks.0.0.weight": (change,)}, 0.5)

    first = core.sample(out, latent, model=patched)
    found["patch"] = float((first - plain).abs().mean())
    x, gradient = guided(core, ddpm)
    found["restored"] = all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    found["inference"] = sum(value.is_inference() for value in network.parameters())
    found["entries"] = sum(entry.model.model is ddpm.patcher.model for entry in mm.current_loaded_models)
    found["bytes"] = [sum(entry.model.loaded_size() for entry in mm.current_loaded_models), ddpm.patcher.model_size()]
    again = core.sample(out, latent, model=patched)
    y, other = guided(core, ddpm)
    found["either order"] = [torch.equal(first, again), torch.equal(x, y) and torch.equal(gradient, other), float(gradient.abs().max())]
    found["as before"] = torch.equal(core.sample(out, latent), plain)

    core.sample(out, latent, model=patched)
    mm.unload_all_models()
    found["unloaded"] = [
        len(mm.current_loaded_models),
        ddpm.patcher.loaded_size(),
        all(torch.equal(v, before[n]) for n, v in network.state_dict().items()),
    ]
    found["inference after /free"] = sum(value.is_inference() for value in network.parameters())
    found["without a GPU"] = pretended_gpu(core, patched, out, latent)
    mm.unload_all_models()
    gone = [weakref.ref(thing) for thing in (network, out[0].model, out[0], patched)]
    del ddpm, network, out, patched
    gc.collect()
    mm.cleanup_models_gc()
    found["alive"] = [ref() is not None for ref in gone]
    return found


def pretended_gpu(core: Pack, patched: Any, out: Any, latent: dict[str, Any]) -> dict[str, Any]:
    """Sampling in each of the manager's modes, which have no effect on a CPU unless the manager takes it for a GPU."""
    mm, found = core.mm, {}
    before = mm.vram_state, mm.is_device_cpu
    for state in (mm.VRAMState.NORMAL_VRAM, mm.VRAMState.LOW_VRAM, mm.VRAMState.NO_VRAM):
        mm.unload_all_models()
        try:
            mm.vram_state, mm.is_device_cpu = state, lambda _device: False
            result = core.sample(out, latent, model=patched)
            whole = patched.loaded_size() == patched.model_size()
            (entry,) = (e for e in mm.current_loaded_models if e.model is patched)
            entry.model_unload(patched.model_size() // 4)
            apart = patched.loaded_size() < patched.model_size()
            again = core.sample(out, latent, model=patched)
        finally:
            mm.vram_state, mm.is_device_cpu = before
        found[state.name] = [whole, apart, patched.loaded_size() == patched.model_size(), torch.equal(result, again)]
    return found


def state_of(model: Any) -> dict[str, Any]:
    """Everything on a MODEL that a run could leave behind."""
    names = (
        "patches",
        "object_patches",
        "model_options",
        "attachments",
        "additional_models",
        "callbacks",
        "wrappers",
        "injections",
        "hook_patches",
    )
    return {name: getattr(model, name) for name in names}


def interrupted(core: Pack) -> dict[str, Any]:
    """Cancel during the first call of a sampler that calls the network twice a step: the calls that were made, and whether the next run works."""
    ddpm = core.loaded()
    out, latent = core.as_model(ddpm), {"samples": picture()}
    with watched(ddpm.model.network) as calls:
        forward = ddpm.model.network.forward

        def cancelling(*args: Any) -> Tensor:
            core.mm.interrupt_current_processing()
            return forward(*args)  # type: ignore[no-any-return]

        ddpm.model.network.forward = cancelling
        try:
            core.sample(out, latent, "heun", 4)
            stopped = ""
        except BaseException as error:
            stopped = type(error).__name__
        made = len(calls)
        ddpm.model.network.forward = forward
        finished = bool(core.sample(out, latent, "heun", 2).isfinite().all())
    return {"stopped": stopped, "calls": made, "finished": finished}


def wrong(core: Pack) -> dict[str, str]:
    """LATENTs that the network does not take."""
    out = core.as_model(core.loaded(channel_mult=(1, 1, 1), attention_downsampling=()))
    nested = importlib.import_module("comfy.nested_tensor").NestedTensor
    latents = {
        "of a VAE": torch.ones(1, 4, 8, 8), "another size": torch.ones(1, 3, 18, 24), "video": torch.ones(1, 16, 3, 8, 8),
        "pixels of a video": torch.ones(1, 3, 5, 16, 16), "audio": torch.ones(1, 8, 64), "nested": nested([torch.ones(1, 3, 2, 8, 8), torch.ones(1, 8, 4, 16)]),
    }  # fmt: skip
    return {name: sentence(lambda latent=latent: core.sample(out, {"samples": latent})) for name, latent in latents.items()}  # type: ignore[misc]


def main() -> None:
    """Every part on its own, as a server runs nodes: in inference mode."""
    core = Pack()
    told: dict[str, Any] = {}
    for part in (equalities, levels, all_samplers, masks, classes, precisions, others, memory, interrupted, wrong):
        if CHOSEN and part.__name__ not in CHOSEN:
            continue
        try:
            with torch.inference_mode():
                told[part.__name__] = part(core)
        except Exception:
            told[part.__name__] = traceback.format_exc()
    print(json.dumps(told))


CHOSEN = sys.argv[1:]
main()
