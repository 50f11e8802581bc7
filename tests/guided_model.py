"""Run by ComfyUI's own Python (tests/test_guided_model.py): CLIP Guidance (MODEL) with core's samplers and networks. Prints the observations as JSON."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from contract import NAME, pack
from torch import Tensor, nn

SIZE, LATENT = 16, 8
UNET = {
    "image_size": LATENT, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": [1, 1],
    "num_head_channels": 16, "use_spatial_transformer": True, "transformer_depth": [0, 0], "transformer_depth_output": [0, 0, 0, 0],
    "transformer_depth_middle": 1, "context_dim": 16, "use_linear_in_transformer": True, "legacy": False,
}  # fmt: skip
FLOW = {
    "in_channels": 4,
    "out_channels": 4,
    "dim": 64,
    "n_layers": 2,
    "n_double_layers": 1,
    "n_heads": 2,
    "global_conddim": 64,
    "cond_seq_dim": 16,
    "max_seq": 64,
}

FLUX = {
    "in_channels": 4, "out_channels": 4, "vec_in_dim": 8, "context_in_dim": 16, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1,
    "depth_single_blocks": 1, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [],
}  # fmt: skip


class Pack:
    """The modules of the pack and of core that the checks use, and small networks with random weights."""

    def __init__(self) -> None:
        pack()
        for name in ("load", "model", "memory", "runtime", "guidance", "prompt"):
            setattr(self, name, importlib.import_module(f"{NAME}.nodes.{name}"))
        for name in ("options", "shift", "errors", "random"):
            setattr(self, name, importlib.import_module(f"{NAME}.blended_core.{name}"))
        for name in [name for name in sys.modules if name.startswith(f"{NAME}.blended_core")]:
            sys.modules[name.removeprefix(f"{NAME}.")] = sys.modules[name]
        self.tiny = importlib.import_module("tiny")
        self.comfy = importlib.import_module("comfy")
        for name in (
            "model_management", "sample", "samplers", "sd", "model_base", "supported_models_base", "latent_formats", "model_patcher", "utils",
            "patcher_extension", "taesd.taesd", "ldm.aura.mmdit", "ldm.modules.diffusionmodules.openaimodel",
        ):  # fmt: skip
            importlib.import_module(f"comfy.{name}")
        self.mm = self.comfy.model_management
        self.comfy.utils.PROGRESS_BAR_ENABLED = False
        self.nodes = importlib.import_module("nodes")
        self.lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        with self.runtime.library_scope("Load CLIP (open_clip)"):
            clip = self.tiny.tiny_clip()
            self.clip = self.memory.LoadedCLIP(clip, self.memory.manage(clip.model))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def ddpm(self, **unet: Any) -> Any:
        """(MODEL, positive, negative, …) of a small diffusion model in pixel space."""
        with self.runtime.library_scope("Load DDPM"):
            model = self.tiny.tiny_model(**unet)
            context = self.memory.device_context("fp32")
            loaded = self.memory.LoadedDDPM(model, self.memory.manage(self.model.CoreModel(model, context)), context)
        return self.model.DDPMAsModel.execute(loaded, "3" if unet.get("num_classes") else "zero").args

    def core(self, flow: bool = False, kind: str = "EPS", flux: bool = False) -> Any:
        """A MODEL of core's own classes whose weights are inference tensors, as a loader node makes it."""
        base = self.comfy.model_base

        class Config(self.comfy.supported_models_base.BASE):  # type: ignore[name-defined,misc]
            unet_extra_config: ClassVar[dict[str, Any]] = {}

        config = Config({**(FLUX if flux else FLOW if flow else UNET), "dtype": torch.float32})
        config.latent_format = self.comfy.latent_formats.SDXL()
        torch.manual_seed(3)
        flows = base.Flux if flux else base.AuraFlow
        model = flows(config) if flux or flow else base.BaseModel(config, base.ModelType[kind])
        randomize(model.diffusion_model)
        return self.comfy.model_patcher.CoreModelPatcher(model, self.mm.get_torch_device(), self.mm.unet_offload_device())

    def vae(self) -> Any:
        """Core's TAESD with random weights, which are inference tensors."""
        torch.manual_seed(4)
        network = self.comfy.taesd.taesd.TAESD(latent_channels=4)
        randomize(network)
        return self.comfy.sd.VAE(sd=network.state_dict())

    def encoded(self, text: str = "an apple", **more: Any) -> Any:
        return self.prompt.EncodePrompt.execute(self.clip, text, **more).args[0]

    def guided(self, model: Any, text: str = "an apple", scale: float = 3000.0, views: int = 3, **inputs: Any) -> Any:
        """The node, with few views."""
        options = inputs.pop("options", None) or self.memory.LoadedGuidance(self.options.GuidanceOptions(views=views), None)
        return self.guidance.CLIPGuidanceModel.execute(model, self.encoded(text), scale, options=options, **inputs).args[0]

    def run(self, model: Any, latent: Tensor, sampler: str = "euler", steps: int = 3, **more: Any) -> Tensor:
        """KSampler."""
        values = {
            "cfg": 1.0,
            "scheduler": "normal",
            "denoise": 0.75,
            "seed": 3,
            "noise_mask": None,
            "positive": text(),
            "negative": text(1.0),
            **more,
        }
        noise = self.comfy.sample.prepare_noise(latent, values["seed"])
        out: Tensor = self.comfy.sample.sample(
            model, noise, steps, values["cfg"], sampler, values["scheduler"], values["positive"], values["negative"], latent,
            denoise=values["denoise"], noise_mask=values["noise_mask"], disable_pbar=True, seed=values["seed"], callback=values.get("callback"),
        )  # fmt: skip
        return out.clone()


def randomize(network: nn.Module) -> None:
    """Random weights, because core's layers leave them unset; all of them have an effect."""
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            weight.data = torch.randn(weight.shape) / weight[0].numel() ** 0.5
        else:
            weight.data = torch.ones_like(weight) if name.endswith("weight") or weight.ndim == 0 else torch.zeros_like(weight)


def text(value: float = 0.0) -> list[Any]:
    """A CONDITIONING."""
    return [[torch.full((1, 3, 16), value), {"pooled_output": None}]]


def pixels(batch: int = 2) -> Tensor:
    """[B, 3, SIZE, SIZE] in −1..1."""
    return torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1


def latents(batch: int = 2) -> Tensor:
    """[B, 4, LATENT, LATENT]."""
    return torch.randn(batch, 4, LATENT, LATENT, generator=torch.Generator().manual_seed(6)) * 5


def square(size: int = SIZE, batch: int = 1, value: float = 1.0) -> Tensor:
    """A MASK with a square in the middle."""
    mask = torch.zeros(batch, size, size)
    mask[:, size // 4 : -size // 4, size // 4 : -size // 4] = value
    return mask


def bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def sentence(work: Callable[[], Any]) -> str:
    """The error of a call."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# --- the same by other hooks ------------------------------------------------------------------------------------------


def patch_of(core: Pack, model: Any) -> Any:
    """The patch that the node put on a MODEL."""
    (wrapper,) = model.get_wrappers(core.comfy.patcher_extension.WrappersMP.PREDICT_NOISE, core.guidance.KEY)
    return wrapper.__self__


def hooks(core: Pack) -> dict[str, Any]:
    """The picture by the patch, by a post-CFG function, and by a guider."""
    found = {}
    cases = {
        "pixels": (core.ddpm()[0], pixels(), {}), "classes and cfg": (core.ddpm(num_classes=5)[0], pixels(), {"cfg": 7.0}),
        "latents": (core.core(), latents(), {"cfg": 7.0}), "flow": (core.core(flow=True), latents(), {"denoise": 1.0}),
    }  # fmt: skip
    for name, (model, latent, more) in cases.items():
        for sampler in ("euler", "dpmpp_2s_ancestral"):
            with_patch = core.guided(model)
            patch = patch_of(core, with_patch)
            run = partial_run(core, patch, model, latent, sampler, more.get("denoise", 0.75))
            own = core.run(with_patch, latent, sampler, **more)

            def shifted(denoised: Tensor, sigma: Tensor, run: Any = run) -> Tensor:
                with core.runtime.library_scope("test"):
                    shift = run(denoised.detach().clone(), sigma.detach().clone())
                return denoised + shift  # type: ignore[no-any-return]

            by_function = model.clone()
            by_function.set_model_sampler_post_cfg_function(lambda args, shifted=shifted: shifted(args["denoised"], args["sigma"]))
            run.calls = 0
            function = core.run(by_function, latent, sampler, **more)
            run.calls = 0
            guider = with_guider(core, model, latent, sampler, shifted, **more)
            plain = core.run(model, latent, sampler, **more)
            found[f"{name}, {sampler}"] = [bits(own, function), bits(own, guider), far(own, plain)]
    return found


def partial_run(core: Pack, patch: Any, model: Any, latent: Tensor, sampler: str, denoise: float) -> Any:
    """The run that the patch would make."""
    with core.runtime.library_scope("test"):
        return patch.run(model, latent.clone(), latent.clone(), core.comfy.samplers.sampler_object(sampler), None, 3)


def with_guider(core: Pack, model: Any, latent: Tensor, sampler: str, shifted: Callable[[Tensor, Tensor], Tensor], **more: Any) -> Tensor:
    """Sampling by a guider that shifts what it predicts."""
    samplers = core.comfy.samplers

    class Guider(samplers.CFGGuider):  # type: ignore[name-defined,misc]
        def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
            return shifted(super().predict_noise(x, timestep, model_options or {}, seed), timestep)

    guider = Guider(model)
    guider.set_conds(text(), text(1.0))
    guider.set_cfg(more.get("cfg", 1.0))
    steps = samplers.KSampler(model, 3, model.load_device, sampler, "normal", more.get("denoise", 0.75), model.model_options)
    noise = core.comfy.sample.prepare_noise(latent, 3)
    out: Tensor = guider.sample(noise, latent, samplers.sampler_object(sampler), steps.sigmas, disable_pbar=True, seed=3)
    return out


# --- samplers ---------------------------------------------------------------------------------------------------------


def all_samplers(core: Pack) -> dict[str, Any]:
    """Every sampler of the installed core: whether its kind is known, the η that it is guided by, how far guidance moves it, and what it changes outside."""
    model, mask = core.ddpm()[0], square()
    guided, through = core.guided(model), core.guided(model, gradient="model")
    seen: dict[str, Any] = {}
    for name in core.comfy.samplers.SAMPLER_NAMES:
        try:
            plain, moved, deep = (core.run(m, pixels(1), name, 4, noise_mask=mask) for m in (model, guided, through))
            outside = (mask == 0)[:, None].expand_as(plain)
            sampler = core.comfy.samplers.sampler_object(name)
            seen[name] = [
                name in core.shift.SAMPLERS, core.guidance.eta_of(sampler), far(moved, plain), far(deep, plain),
                far(moved[outside], pixels(1)[outside]), bool(moved.isfinite().all() and deep.isfinite().all()),
            ]  # fmt: skip
        except Exception:
            seen[name] = traceback.format_exc()
    return {"samplers": seen, "notes": [line for line in core.lines if "unknown" in line]}


def kinds(core: Pack) -> dict[str, Any]:
    """How far guidance moves samplers by their options, by the choice of the user, and where nothing is known."""
    model, found = core.ddpm()[0], {}
    samplers = core.comfy.samplers

    def somebodys_own(*_: Any, **__: Any) -> None: ...

    cases = {
        "euler": samplers.ksampler("euler"), "ancestral": samplers.ksampler("euler_ancestral"),
        "ancestral, eta 0": samplers.ksampler("euler_ancestral", {"eta": 0.0}), "2m sde, eta 0.5": samplers.ksampler("dpmpp_2m_sde", {"eta": 0.5}),
        "adaptive": samplers.ksampler("dpm_adaptive", {"eta": 1.0}), "unknown": samplers.KSAMPLER(somebodys_own), "no function": SimpleNamespace(),
    }  # fmt: skip
    for kind in ("auto", "ode", "sde"):
        patch = patch_of(core, core.guided(model, sampler_kind=kind))
        for name, sampler in cases.items():
            core.lines.clear()
            with core.runtime.library_scope("test"):
                run = patch.run(model, pixels(), pixels(), sampler, None, 0)
            found[f"{name}, {kind}"] = [run.guides[0].strength, len([line for line in core.lines if "is unknown" in line])]
    return found


def parameterizations(core: Pack) -> dict[str, Any]:
    """What is made of core's types of models."""
    base, found = core.comfy.model_base, {}
    for kind in base.ModelType:
        config = core.comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
        config.sampling_settings = {"sigma_data": 0.5}
        config.latent_format = core.comfy.latent_formats.SDXL()

        def of(kind: Any = kind, config: Any = config) -> list[Any]:
            one = core.guidance.parameterization(base.model_sampling(config, kind))
            return [one.flow, one.sigma_data]

        try:
            found[kind.name] = of()
        except core.errors.BlendedError as error:
            found[kind.name] = str(error)
    return found


# --- together with others ---------------------------------------------------------------------------------------------


def two(core: Pack) -> dict[str, Any]:
    """Two prompts, two masks, and a MODEL that already carries the patch."""
    model = core.ddpm()[0]
    a, b = (core.guided(core.guided(model, first), second) for first, second in (("an apple", "a zebra"), ("a zebra", "an apple")))
    one, other, latent = core.guided(model, "an apple"), core.guided(model, "a zebra"), pixels()
    outs = [core.run(m, latent, steps=1, denoise=0.3) for m in (model, one, other, a, b)]
    plain, first, second, both, reversed_ = outs
    left, right = torch.zeros(1, SIZE, SIZE), torch.zeros(1, SIZE, SIZE)
    left[..., : SIZE // 2], right[..., SIZE // 2 :] = 1, 1
    options = core.memory.LoadedGuidance(core.options.GuidanceOptions(views=3, range_scale=0.0), None)
    halves = core.guided(core.guided(model, "an apple", mask=left, options=options), "a zebra", mask=right, options=options)
    alone = [core.guided(model, t, mask=m, options=options) for t, m in (("an apple", left), ("a zebra", right))]
    parts = [core.run(m, latent, steps=1, denoise=0.3) for m in (halves, *alone)]
    joined = torch.cat([parts[1][..., : SIZE // 2], parts[2][..., SIZE // 2 :]], -1)
    return {
        "order": bits(both, reversed_), "sum": far(both - plain, first - plain + second - plain), "moved": [far(first, plain), far(second, plain)],
        "halves": far(parts[0], joined), "parts": len(patch_of(core, a).parts), "before": len(patch_of(core, one).parts),
        "models": len(a.get_additional_models_with_key(core.guidance.KEY)),
    }  # fmt: skip


def stacks(core: Pack) -> dict[str, Any]:
    """With other patches: how far each moves the guided picture, and how far guidance moves the patched one."""
    unet, latent, found = core.core(), latents(), {}
    pag = importlib.import_module("comfy_extras.nodes_pag").PerturbedAttentionGuidance
    differential = importlib.import_module("comfy_extras.nodes_differential_diffusion").DifferentialDiffusion
    extras = importlib.import_module("comfy_extras.nodes_rescalecfg") if importlib.util.find_spec("comfy_extras.nodes_rescalecfg") else None

    def weight_patch(model: Any) -> Any:
        patched = model.clone()
        name = "diffusion_model.middle_block.0.in_layers.2.weight"
        shape = model.model.diffusion_model.middle_block[0].in_layers[2].weight.shape
        patched.add_patches({name: ("diff", (torch.ones(shape) * 0.05,))}, 1.0)
        return patched

    soft = torch.linspace(0, 1, LATENT).expand(1, LATENT, LATENT)
    control = Control(core.comfy)
    cases: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
        "cfg 7": (lambda m: m, {"cfg": 7.0}),
        "weight patch": (weight_patch, {}),
        "perturbed attention": (lambda m: pag.execute(m, 3.0).args[0], {"cfg": 4.0}),
        "differential diffusion": (lambda m: differential.execute(m, 1.0).args[0], {"noise_mask": soft}),
        "control": (lambda m: m, {"positive": [[text()[0][0], {"control": control, "control_apply_to_uncond": True}]]}),
    }
    if extras is not None:
        cases["rescaled cfg"] = (lambda m: extras.RescaleCFG.execute(m, 0.7).args[0], {"cfg": 7.0})
    for gradient in ("x0", "model"):
        plain = core.run(core.guided(unet, gradient=gradient), latent)
        for name, (patch, more) in cases.items():
            outs = [
                core.run(m, latent, **more)
                for m in (patch(unet), core.guided(patch(unet), gradient=gradient), patch(core.guided(unet, gradient=gradient)))
            ]
            found[f"{name}, {gradient}"] = [
                far(outs[1], outs[0]),
                far(outs[1], plain),
                bits(outs[1], outs[2]),
                bool(outs[1].isfinite().all()),
            ]
    return found


class Control:
    """What core's sampler asks of a ControlNet, with an effect on the middle of the UNet."""

    def __init__(self, comfy: Any) -> None:
        self.strength, self.extra_hooks, self.previous_controlnet, self.multigpu_clones = 1.0, None, None, {}
        with torch.inference_mode():
            self.network = nn.Conv2d(4, 64, 3, 2, 1)
        self.patcher = comfy.model_patcher.ModelPatcher(self.network, torch.device("cpu"), torch.device("cpu"))

    def get_models(self) -> list[Any]:
        return [self.patcher]

    def get_extra_hooks(self) -> list[Any]:
        return []

    def inference_memory_requirements(self, dtype: Any) -> int:
        return 0

    def pre_run(self, *_: Any) -> None: ...

    def cleanup(self) -> None: ...

    def get_control(self, x: Tensor, *_: Any) -> dict[str, list[Tensor]]:
        return {"middle": [self.network(x)], "output": [], "input": []}


def tuples(core: Pack) -> dict[str, Any]:
    """A guider whose prediction is two estimates: what becomes of both, and how often CLIP is asked."""
    model, latent = core.ddpm()[0], pixels()
    patched = core.guided(model)
    samplers, seen, calls = core.comfy.samplers, [], counting(core)
    before = samplers.CFGGuider.predict_noise

    def two_estimates(self: Any, *args: Any, **kwargs: Any) -> Any:
        first = before(self, *args, **kwargs)
        seen.append((first, first * 2))
        return seen[-1]

    class Watching(samplers.CFGGuider):  # type: ignore[name-defined,misc]
        predict_noise = two_estimates

        def outer_predict_noise(self, *args: Any, **kwargs: Any) -> Any:
            result = super().outer_predict_noise(*args, **kwargs)
            shifts.append([r - s for r, s in zip(result, seen[-1], strict=True)])
            types.append(type(result).__name__)
            return result[0]

    shifts: list[Any] = []
    types: list[str] = []
    guider = Watching(patched)
    guider.set_conds(text(), text(1.0))
    with calls:
        guider.sample(
            core.comfy.sample.prepare_noise(latent, 3),
            latent,
            samplers.sampler_object("euler"),
            torch.tensor([5.0, 2.0, 0.5, 0.0]),
            seed=3,
            disable_pbar=True,
        )
    return {
        "types": types,
        "alike": [far(*pair) for pair in shifts],
        "moved": [float(pair[0].abs().max()) for pair in shifts],
        "calls": calls.count,
    }


class counting:
    """Counts the calls of CLIP's image encoder."""

    def __init__(self, core: Pack, on_call: Callable[[int], None] = lambda _: None) -> None:
        self.network, self.count, self.on_call = core.clip.model.model, 0, on_call

    def __enter__(self) -> counting:
        before = self.network.encode_image

        def counted(pictures: Tensor) -> Tensor:
            self.count += 1
            self.on_call(self.count)
            return before(pictures)  # type: ignore[no-any-return]

        self.network.encode_image = counted
        return self

    def __exit__(self, *_: Any) -> None:
        del self.network.encode_image


# --- state and memory -------------------------------------------------------------------------------------------------


def state_of(core: Pack, *models: Any) -> str:
    """Everything on MODELs that a run could leave behind, by identity."""
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
    return repr([[getattr(model, name) for name in names] for model in models])


def state(core: Pack) -> dict[str, Any]:
    """What is left after a run, a failed run and an interrupted one; and whether branches of one MODEL see each other."""
    model, latent = core.ddpm()[0], pixels()
    plain = core.run(model, latent)
    one, other = core.guided(model, "an apple"), core.guided(model, "a zebra")
    before = state_of(core, model, one, other)
    first, second = core.run(one, latent), core.run(other, latent)
    again = [core.run(m, latent) for m in (one, model, other)]
    found: dict[str, Any] = {
        "branches": [bits(again[0], first), bits(again[1], plain), bits(again[2], second), far(first, second)],
        "after a run": state_of(core, model, one, other) == before,
    }

    def fails(count: int) -> None:
        if count == 2:
            raise RuntimeError("of the test")

    with counting(core, fails):
        found["failed"] = sentence(lambda: core.run(one, latent))
    found["after a failure"] = [
        state_of(core, model, one, other) == before,
        bits(core.run(one, latent), first),
        bits(core.run(model, latent), plain),
    ]

    def cancels(count: int) -> None:
        if count == 2:
            core.mm.interrupt_current_processing()

    with counting(core, cancels) as calls:
        try:
            core.run(one, latent, steps=20)
            found["interrupted"] = ""
        except BaseException as error:
            found["interrupted"] = type(error).__name__
        found["calls"] = calls.count
    core.mm.interrupt_current_processing(False)
    found["after an interrupt"] = [state_of(core, model, one, other) == before, bits(core.run(one, latent), first)]
    steps: list[float] = []
    core.run(one, latent, callback=lambda step, x0, x, total: steps.append(float(x0.abs().max())))
    found["callbacks"] = len(steps)
    return found


def memory(core: Pack) -> dict[str, Any]:
    """What the manager knows of CLIP and the VAE's network, how much memory it is asked for, and that it can free them."""
    model, vae, latent = core.core(), core.vae(), latents()
    core.mm.unload_all_models()
    guided = core.guided(model, vae=vae)
    asked: list[tuple[str, float]] = []
    free, load = core.mm.free_memory, core.mm.load_models_gpu

    def freeing(needed: float, *args: Any, **kwargs: Any) -> Any:
        asked.append(("free", needed))
        return free(needed, *args, **kwargs)

    def loading(models: Any, memory_required: float = 0, *args: Any, **kwargs: Any) -> Any:
        asked.append(("load", memory_required))
        return load(models, memory_required, *args, **kwargs)

    core.mm.free_memory, core.mm.load_models_gpu = freeing, loading
    try:
        core.run(guided, latent)
    finally:
        core.mm.free_memory, core.mm.load_models_gpu = free, load
    (part,) = patch_of(core, guided).parts
    networks = {"clip": core.clip.model.model, "vae": vae.first_stage_model, "model": model.model}

    def loaded() -> dict[str, bool]:
        return {
            name: any(entry.model is not None and entry.model.model is network for entry in core.mm.current_loaded_models)
            for name, network in networks.items()
        }

    before = loaded()
    core.mm.unload_all_models()
    finished = core.run(guided, latent)
    return {
        "loaded": before, "estimate": part.bytes_for(latent.shape), "decoder": part.decoder.bytes_for(latent.shape), "asked": asked,
        "kept": core.guidance.KEY in guided.additional_models, "runs again": bool(finished.isfinite().all()), "loaded again": loaded(),
        "after": (core.mm.unload_all_models(), loaded())[1],
    }  # fmt: skip


def healed(core: Pack) -> dict[str, Any]:
    """Weights that a loader node made in inference mode: gradients pass them, and the nodes of core still do what they did."""
    model, vae, latent = core.core(), core.vae(), latents()
    frozen = [any(p.is_inference() for p in network.parameters()) for network in (model.model, vae.first_stage_model)]
    decoded, plain = vae.decode(latent).clone(), core.run(model, latent)
    for gradient in ("x0", "model"):
        core.run(core.guided(model, vae=vae, gradient=gradient), latent)
    after = [any(p.is_inference() for p in network.parameters()) for network in (model.model, vae.first_stage_model)]
    weights = {k: v.clone() for k, v in model.model.state_dict().items()}
    core.mm.unload_all_models()
    same = all(torch.equal(v, weights[k]) for k, v in model.model.state_dict().items())
    return {
        "frozen": frozen, "after": after, "decoded": bits(vae.decode(latent), decoded), "plain": bits(core.run(model, latent), plain), "weights": same,
        "gradients": any(p.requires_grad for p in vae.first_stage_model.parameters()),
    }  # fmt: skip


# --- decoders, masks, batches -----------------------------------------------------------------------------------------


def decoders(core: Pack) -> dict[str, Any]:
    """The picture that CLIP sees, against the one that core's nodes show."""
    model, vae, latent = core.core(), core.vae(), latents()
    form = model.get_model_object("latent_format")
    x0 = form.process_in(latent)
    with core.runtime.library_scope("test"):
        full, rough = core.guidance.decoder_of(model, vae), core.guidance.decoder_of(model, None)
        core.memory.heal(vae.first_stage_model)
        picture, colors = full(x0.clone()), rough(x0.clone())
    shown = vae.decode(latent).movedim(-1, 1) * 2 - 1
    preview = importlib.import_module("latent_preview").Latent2RGBPreviewer(form.latent_rgb_factors, form.latent_rgb_factors_bias)
    image = torch.tensor(list(preview.decode_latent_to_preview(x0[:1]).get_flattened_data())).view(LATENT, LATENT, 3).permute(2, 0, 1)
    pixel = core.ddpm()
    plain = [core.run(core.guided(pixel[0], vae=v), pixels()) for v in (None, pixel[3])]
    guided = [core.run(m, latent) for m in (model, core.guided(model), core.guided(model, vae=vae))]
    flow = core.core(flow=True)
    flows = [core.run(m, latent, denoise=1.0) for m in (flow, core.guided(flow), core.guided(flow, gradient="model"))]
    return {
        "full": far(picture.clamp(-1, 1), shown), "size": list(picture.shape),
        "rough": float((((colors[0].clamp(-1, 1) + 1) * 127.5).floor() - image).abs().max()),
        "pixels": bits(*plain), "moved": [far(g, guided[0]) for g in guided[1:]], "flow": [far(g, flows[0]) for g in flows[1:]],
        "finite": all(bool(g.isfinite().all()) for g in (*guided, *flows)), "flux": flux_gradient(core, latent),
    }  # fmt: skip


def flux_gradient(core: Pack, latent: Tensor) -> list[Any]:
    """How far each gradient moves a transformer of Flux's class, whose rotary embedding has a kernel without a backward pass; and what stays set."""
    model = core.core(flux=True)
    plain, *moved = (core.run(m, latent) for m in (model, core.guided(model), core.guided(model, gradient="model")))
    return [far(moved[0], plain), far(moved[1], plain), core.mm.in_training]


def masks(core: Pack) -> dict[str, Any]:
    """Masks of other sizes, soft ones, several, and none: where guidance moves the picture."""
    model, options = core.ddpm()[0], core.memory.LoadedGuidance(core.options.GuidanceOptions(views=3, range_scale=0.0), None)
    latent = pixels()
    plain = core.run(model, latent, steps=1, denoise=0.3)

    def moved(noise_mask: Tensor | None = None, **inputs: Any) -> list[float]:
        """Largest shift in the middle and at the border, of each image."""
        out = core.run(core.guided(model, options=options, **inputs), latent, steps=1, denoise=0.3, noise_mask=noise_mask)
        other = plain if noise_mask is None else core.run(model, latent, steps=1, denoise=0.3, noise_mask=noise_mask)
        shift, inside = (out - other).abs().amax(1), square()[0] > 0
        return [float(row[part].max()) for row in shift for part in (inside, ~inside)]

    twice = torch.cat([square(), 1 - square()])
    return {
        "none": moved(), "mask": moved(mask=square()), "large": moved(mask=square(4 * SIZE)), "small": moved(mask=square(SIZE // 2)),
        "soft": moved(mask=square(value=0.4)), "faint": sentence(lambda: moved(mask=square(value=0.0))), "two": moved(mask=twice),
        "noise mask": moved(square()), "both": moved(torch.ones(1, SIZE, SIZE), mask=square()),
        "three": sentence(lambda: moved(mask=square(batch=3))), "aspect": sentence(lambda: moved(mask=torch.ones(1, 8, 16))),
    }  # fmt: skip


def options(core: Pack) -> dict[str, Any]:
    """Guidance Options: scale, gradient, start and end, the background loss."""
    model, latent = core.ddpm()[0], pixels()
    plain = core.run(model, latent)
    made = core.prompt.GuidanceOptionsNode.execute

    def run(own: float = -1.0, through: str = "x0", **chosen: Any) -> Tensor:
        node = made(**{"views": 3, **chosen}).args[0] if "background_scale" not in chosen else with_background(**chosen)
        return core.run(
            core.guidance.CLIPGuidanceModel.execute(model, core.encoded(), own, through, mask=square(), options=node).args[0], latent
        )

    def with_background(**chosen: Any) -> Any:
        """LPIPS does not take pictures as small as these."""
        network = core.memory.LoadedPerceptual(core.tiny.rough_perceptual, core.memory.manage(nn.Linear(1, 1)))
        return core.memory.LoadedGuidance(core.options.GuidanceOptions(views=3, **chosen), network)

    embedded = core.model.DDPMAsModel.execute(core.load.LoadDDPM.execute("embedded").args[0]).args[0]
    patch = patch_of(core, core.guided(embedded, scale=-1.0))
    large = torch.zeros(1, 3, 64, 64)
    with core.runtime.library_scope("test"):
        recommended = patch.run(embedded, large, large, core.comfy.samplers.ksampler("euler"), None, 0).guides[0].scale
    with counting(core) as calls:
        run(guide_from=0.5)
    return {
        "node's scale": bits(run(700.0), run(-1.0, scale=700.0)), "scale": far(run(700.0), run(900.0)), "gradient": [bits(run(), run(gradient="unet")), bits(run(), run(through="model"))],
        "default": bits(run(), run(1000.0)), "recommended": recommended, "zero": bits(run(0.0, range_scale=0.0), plain), "half": calls.count,
        "mixed": sentence(lambda: run(clip_input="mixed")), "background": far(run(background_scale=1000.0), run()),
        "empty": sentence(
            lambda: core.run(core.guided(model, options=with_background(background_scale=100.0)), torch.zeros_like(latent))
        ),
        "no prompt": bits(core.run(core.guidance.CLIPGuidanceModel.execute(model, core.encoded("")).args[0], latent), plain),
    }  # fmt: skip


def frames(core: Pack) -> dict[str, Any]:
    """A model of video latents with a single frame, as Qwen-Image has them."""

    @dataclass
    class Video(core.comfy.latent_formats.Wan21):  # type: ignore[name-defined,misc]
        latent_channels = 4
        latent_dimensions = 3

        def __post_init__(self) -> None:
            self.latent_rgb_factors = [[0.3, 0.2, 0.1]] * 4
            self.latent_rgb_factors_bias = None

        def process_in(self, latent: Tensor) -> Tensor:
            return latent

        process_out = process_in

    base = core.comfy.model_base

    class Frames(nn.Module):
        """The UNet, frame by frame."""

        def __init__(self, unet: nn.Module) -> None:
            super().__init__()
            self.unet, self.dtype = unet, torch.float32

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = self.unet(x[:, :, 0], *args, **kwargs)
            return out.unsqueeze(2)

    model = core.core()
    model.model.diffusion_model = Frames(model.model.diffusion_model)
    model.model.latent_format = Video()
    assert isinstance(model.model, base.BaseModel)
    latent = latents().unsqueeze(2)
    outs = [core.run(m, latent) for m in (model, core.guided(model), core.guided(model, gradient="model"))]
    masked = core.run(core.guided(model), latent, noise_mask=square(LATENT))
    return {"moved": [far(o, outs[0]) for o in outs[1:]], "shape": list(outs[1].shape), "masked": bool(masked.isfinite().all())}


# --- wrong use --------------------------------------------------------------------------------------------------------


def wrong(core: Pack) -> dict[str, str]:
    """The sentence for each."""
    model, pixel, vae = core.core(), core.ddpm(), core.vae()
    nested = importlib.import_module("comfy.nested_tensor").NestedTensor
    execute = core.guidance.CLIPGuidanceModel.execute
    formats = core.comfy.latent_formats

    def with_format(latent_format: Any) -> Any:
        other = core.core()
        other.model.latent_format = latent_format
        return other

    bare = formats.LatentFormat()
    cascade = SimpleNamespace(
        first_stage_model=nn.Identity(),
        patcher=vae.patcher,
        latent_channels=4,
        latent_dim=2,
        output_channels=3,
        spacial_compression_decode=lambda: 4,
    )
    audio = SimpleNamespace(first_stage_model=nn.Identity(), patcher=vae.patcher, latent_channels=4, latent_dim=1, output_channels=2)
    still = core.core(kind="IMG_TO_IMG")
    streaming = SimpleNamespace(**{**vars(cascade), "spacial_compression_decode": lambda: 8, "patcher": Streaming()})
    return {
        "conditioning": sentence(lambda: execute(model, text())),
        "core's clip": sentence(lambda: core.prompt.EncodePrompt.execute(SimpleNamespace(tokenize=None), "an apple")),
        "vae of pixels": sentence(lambda: core.guided(model, vae=pixel[3])),
        "vae of latents": sentence(lambda: core.guided(pixel[0], vae=vae)),
        "vae of another factor": sentence(lambda: core.guided(model, vae=cascade)),
        "vae of audio": sentence(lambda: core.guided(model, vae=audio)),
        "no vae": sentence(lambda: core.guided(model, vae=SimpleNamespace(first_stage_model=None))),
        "no colors": sentence(lambda: core.guided(with_format(bare))),
        "audio model": sentence(lambda: core.guided(with_format(formats.StableAudio1()))),
        "streamed": sentence(lambda: core.guided(model, vae=streaming)),
        "video": sentence(lambda: core.run(core.guided(model), torch.ones(1, 4, 3, LATENT, LATENT))),
        "audio": sentence(lambda: core.run(core.guided(model), torch.ones(1, 4, 64))),
        "latent of a pixel model": sentence(lambda: core.run(core.guided(model), torch.ones(1, 3, SIZE, SIZE))),
        "nested": sentence(lambda: core.run(core.guided(model), nested([torch.ones(1, 4, 2, 8, 8), torch.ones(1, 4, 16)]))),
        "no levels": sentence(lambda: core.run(core.guided(still), latents())),
    }


class Streaming:
    """A patcher that streams weights and cannot do without."""

    def is_dynamic(self) -> bool:
        return True

    def get_non_dynamic_delegate(self) -> Any:
        raise RuntimeError("Cannot create non-dynamic delegate")


PARTS = (hooks, all_samplers, kinds, parameterizations, two, stacks, tuples, state, memory, healed, decoders, masks, options, frames, wrong)


def main() -> None:
    """Every part on its own, as a server runs nodes: in inference mode."""
    core = Pack()
    told: dict[str, Any] = {}
    for part in PARTS:
        if CHOSEN and part.__name__ not in CHOSEN:
            continue
        try:
            with torch.inference_mode():
                told[part.__name__] = part(core)
        except Exception:
            told[part.__name__] = traceback.format_exc()
    print(json.dumps(told))


if __name__ == "__main__":
    CHOSEN = sys.argv[1:]
    main()
