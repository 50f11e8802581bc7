"""Run by ComfyUI's own Python (tests/test_noise.py): Blended Noise with core's samplers and kinds of models. Prints the observations as JSON."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from contract import NAME, pack
from torch import Tensor

SIZE = 16
RESPACING, STEPS = "40", 30
Latent = dict[str, Any]


class Core:
    """The modules of the pack and of core that the checks use."""

    def __init__(self) -> None:
        pack()
        for name in ("load", "model", "memory", "noise", "region", "runtime"):
            setattr(self, name, importlib.import_module(f"{NAME}.nodes.{name}"))
        for name in ("background", "denoiser", "device", "diffusion", "mask", "options", "random", "sample"):
            setattr(self, name, importlib.import_module(f"{NAME}.blended_core.{name}"))
        self.mm = importlib.import_module("comfy.model_management")
        self.run = importlib.import_module("comfy.sample")
        self.samplers = importlib.import_module("comfy.samplers")
        self.differential = importlib.import_module("comfy_extras.nodes_differential_diffusion").DifferentialDiffusion

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def ddpm(self, process: Any) -> Any:
        """A network of pixels in a BLENDED_DDPM socket, whose predictions fit their input as those of a trained one do."""
        with self.runtime.library_scope("Load DDPM"):
            model = self.denoiser.DiffusionModel(Plausible(process), process, SIZE)
            context = replace(self.memory.device_context("fp32"), dtype=torch.float32)
            return self.memory.LoadedDDPM(model, self.memory.manage(self.model.CoreModel(model, context)), context)

    def node(self, model: Any, shrink: int = 0) -> Any:
        """Blended Noise."""
        return self.noise.BlendedNoise.execute(model, shrink).result[0]

    def sampled(
        self, model: Any, latent: Latent, noise: Tensor, name: str = "euler", steps: int = STEPS, seed: int = 7, sampler: Any = None, denoise: float = 0.75,
        sigmas: Tensor | None = None, **options: Any
    ) -> Tensor:  # fmt: skip
        """A run of core's sampler; ``options`` are those of the sampler's function."""
        levels = sigmas if sigmas is not None else self.samplers.KSampler(model, steps, "cpu", name, "normal", denoise).sigmas
        chosen = sampler or self.samplers.sampler_object(name)
        chosen.extra_options = {**chosen.extra_options, **options}
        empty = [[torch.zeros(1, 1, 1), {}]]
        result: Tensor = self.run.sample_custom(
            model, noise.clone(), 1.0, chosen, levels, empty, empty, latent["samples"], latent.get("noise_mask"), seed=seed
        )
        return result


class Plausible(torch.nn.Module):
    """The exact denoiser of independent normal pixels, moved by a part of what is unknown that depends on the neighborhood."""

    def __init__(self, process: Any) -> None:
        super().__init__()
        self.process = process
        self.weight = torch.nn.Parameter(torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(2)) / 12, requires_grad=False)
        self.register_buffer("alphas", torch.from_numpy(process.respaced(process.steps).alphas_cumprod).float(), persistent=False)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction [B, 3, H, W]."""
        alpha = self.alphas[(timesteps * self.process.steps / 1000).round().long()].view(-1, 1, 1, 1)
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        x0 = signal * 0.25 * x / (alpha * 0.25 + 1 - alpha) + 0.3 * noise * F.conv2d(x, self.weight, padding=2).tanh()
        eps = (x - signal * x0) / noise
        return {"eps": eps, "v": signal * eps - noise * x0, "x0": x0}[self.process.objective]


def picture(batch: int = 1) -> Tensor:
    """[B, 3, SIZE, SIZE] in −1..1."""
    return torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1


def box(*values: float) -> Tensor:
    """A noise mask: a box with these gray values from the left to the right."""
    mask = torch.zeros(1, 1, SIZE, SIZE)
    for i, value in enumerate(values):
        mask[..., 4:12, 3 + 10 * i // len(values) : 3 + 10 * (i + 1) // len(values)] = value
    return mask


MASKS = {"binary": box(1.0), "soft": box(0.3, 0.62, 1.0, 0.8, 0.1), "thin": F.pad(torch.ones(1, 1, 1, 12), (2, 2, 7, 8))}


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return float((a - b).abs().max())


def start_noise(core: Core, batch: int = 1, level: int = STEPS - 1, seed: int = 7) -> Tensor:
    """The noise that the pack's own loop starts with."""
    noise: Tensor = core.random.SeededRandom(seed).noise("start", level, range(batch), (3, SIZE, SIZE))
    return noise


def own_loop(core: Core, model: Any, mask: Tensor, sampler: str, dilations: int = 0, seed: int = 7) -> Tensor:
    """Algorithm 2 of the pack on a picture; with dilations, its loop with the masks that the paper of Blended Latent Diffusion describes."""
    variance = replace(model.config, variance="fixed_small")
    own = replace(model, config=variance) if hasattr(model, "__dataclass_fields__") else model
    options = core.options.EditOptions(
        steps=RESPACING, strength=0.75, sampler="ddim" if sampler == "euler" else "ddpm", tone_match="off", seed=seed
    )
    used, random, source = core.mask.EditMask.of(mask, "soft"), core.random.SeededRandom(seed), picture()
    models = core.sample.Models(own, context=core.device.DeviceContext())
    if not dilations:
        *_, last = core.sample.edit_steps(models, source, used, None, options, random, [0])
        return last.x  # type: ignore[no-any-return]
    schedule = own.config.respaced(RESPACING)
    start = schedule.start_index(0.75)
    sizes = [2 * i + 1 for i in range(dilations, 0, -1)]
    x = core.sample.noise_background(source, start, schedule, random, [0], "start")
    for index in range(start, -1, -1):
        done = start - index + 1
        stage = done // ((start + 1) // (dilations + 1) + 1)
        values = used.values
        if done <= start and stage < dilations:
            values = F.max_pool2d(values, sizes[stage], 1, sizes[stage] // 2)
        weights = used.with_values(values).at_level(index, start)
        step = core.sample.guided_step(models, x, index, schedule, options, None, used.for_clip(), random, [0], source)
        x = core.mask.blend(step.x, core.sample.noise_background(source, index - 1, schedule, random, [0]), weights)
    return x  # type: ignore[no-any-return]


def step_noise(core: Core, seed: int = 7) -> Callable[..., Tensor]:
    """The noise of the pack's own DDPM steps, in their order."""
    indices = iter(range(STEPS - 1, -1, -1))
    return lambda *sigmas: core.random.SeededRandom(seed).noise("step", next(indices), [0], (3, SIZE, SIZE))


def equalities(core: Core) -> dict[str, Any]:
    """Blended Noise against Algorithm 2: distance with the patch, distance without it, how far the edit went."""
    found = {}
    for objective in ("eps", "v", "x0"):
        for schedule in ("linear", "cosine"):
            ddpm = core.ddpm(core.diffusion.DiffusionConfig(schedule, 1000, objective=objective, variance="fixed_small"))
            model = core.model.DDPMAsModel.execute(ddpm).result[0]
            levels = ddpm.model.config.respaced(RESPACING).sqrt_recipm1_alphas_cumprod[:STEPS][::-1].copy()
            sigmas = torch.cat([torch.from_numpy(levels).float(), torch.zeros(1)])
            for kind, mask in MASKS.items():
                for name in ("euler", "ddpm"):
                    dilations = 3 if kind == "thin" else 0
                    latent, noise = {"samples": picture(), "noise_mask": mask}, start_noise(core)
                    with torch.inference_mode(False), torch.no_grad():
                        expected = own_loop(core, ddpm.model, mask, name, dilations)
                    results = [
                        core.sampled(
                            which, latent, noise, name, sigmas=sigmas, **({"noise_sampler": step_noise(core)} if name == "ddpm" else {})
                        )
                        for which in (core.node(model, -1), model)
                    ]
                    found[f"{objective} {schedule} {kind} {name}"] = [distance(r, expected) for r in results] + [
                        distance(expected, picture())
                    ]
    return found


def tiny(core: Core) -> tuple[Any, Any]:
    """A MODEL of pixels, and the same with Blended Noise."""
    model = core.model.DDPMAsModel.execute(core.ddpm(core.diffusion.DiffusionConfig(variance="fixed_small"))).result[0]
    return model, core.node(model)


def batches(core: Core) -> dict[str, Any]:
    """Rows of a batch, seeds, masks per row, the same run twice, an unpatched run before and after."""
    model, patched = tiny(core)
    noise, found = start_noise(core, 3), {}
    latent = {"samples": picture(3), "noise_mask": torch.cat([MASKS["binary"], MASKS["soft"], 1 - MASKS["binary"]])}

    def run(which: Any = patched, rows: slice = slice(None), **more: Any) -> Tensor:
        part = {key: value[rows] for key, value in latent.items()}
        return core.sampled(which, part, noise[rows], steps=6, **more)

    before, whole = run(model), run()
    found["again"], found["plain again"] = distance(run(), whole), distance(run(model), before)
    found["patched"] = distance(before, whole)
    found["first row alone"] = distance(run(rows=slice(0, 1)), whole[:1])
    found["two rows"] = distance(run(rows=slice(0, 2)), whole[:2])
    found["another seed"] = distance(run(seed=8), whole)
    found["outside"] = [distance(whole[i][:, m[0] == 0], latent["samples"][i][:, m[0] == 0]) for i, m in enumerate(latent["noise_mask"])]
    one = core.sampled(patched, {**latent, "noise_mask": MASKS["soft"]}, noise, steps=6)
    found["one mask for all"] = distance(one[1], whole[1])
    found["twice"] = distance(run(core.node(patched)), whole)
    with torch.inference_mode():
        found["inference mode"] = distance(run(), whole)
    found["on the model"] = sorted(set(vars(patched.model)) - set(vars(model.model)))
    found["options"] = sorted(patched.model_options["transformer_options"].get("wrappers", {}))
    return found


def all_samplers(core: Core) -> dict[str, Any]:
    """Every sampler: the difference outside the mask, the mean one inside, whether all is finite, or the error."""
    _, patched = tiny(core)
    latent = {"samples": picture(), "noise_mask": MASKS["soft"]}
    inside, found = (MASKS["soft"] > 0).expand(1, 3, -1, -1), {}
    for name in core.samplers.SAMPLER_NAMES:
        try:
            change = (core.sampled(patched, latent, start_noise(core), name, steps=5) - latent["samples"]).abs()
            found[name] = [float(change[~inside].max()), float(change[inside].mean()), bool(change.isfinite().all())]
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@contextmanager
def told() -> Iterator[list[str]]:
    """What is written to the log."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(handler)


def sentence(work: Callable[[], Any]) -> str:
    """The error of a call."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class OwnLoop:
    """A sampler that is none of core's kind."""

    extra_options: dict[str, Any] = {}  # noqa: RUF012

    def sample(
        self, guider: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, latent_image: Tensor, *others: Any
    ) -> Tensor:
        """The picture as it was."""
        return latent_image


def of_another_pack(core: Core) -> Any:
    """A sampler of core's kind that gives its function a network of its own."""

    class Sampler(core.samplers.KSAMPLER):  # type: ignore[misc, name-defined]
        def sample(self, guider: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *others: Any) -> Tensor:
            return self.sampler_function(guider, noise * 2, sigmas)  # type: ignore[no-any-return]

    def sampler_function(network: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        return x

    return Sampler(sampler_function)


def wrong_use(core: Core) -> dict[str, Any]:
    """What has no effect or is refused, and what is said."""
    model, patched = tiny(core)
    noise, latent = start_noise(core), {"samples": picture(), "noise_mask": MASKS["binary"]}
    found: dict[str, Any] = {}

    def same(name: str, latent: Latent, noise: Tensor = noise, **more: Any) -> None:
        with told() as lines:
            result = core.sampled(patched, latent, noise, steps=4, **more)
        found[name] = [distance(result, core.sampled(model, latent, noise, steps=4, **more)), lines]

    same("no mask", {"samples": picture()})
    same("no noise", latent, torch.zeros_like(noise))
    same("own loop", latent, sampler=OwnLoop())
    with told() as lines:
        core.sampled(patched, latent, noise, steps=4, sampler=of_another_pack(core))
    found["own network"] = lines
    found["empty"] = sentence(lambda: core.sampled(patched, {**latent, "noise_mask": torch.zeros(1, 1, SIZE, SIZE)}, noise, steps=4))
    lost = F.pad(torch.ones(1, 1, 1, 64), (32, 32, 61, 66))
    found["lost"] = sentence(lambda: core.sampled(patched, {**latent, "noise_mask": lost}, noise, steps=4))

    def cancel(*args: Any) -> None:
        core.mm.interrupt_current_processing()
        core.mm.throw_exception_if_processing_interrupted()

    sampler = core.samplers.sampler_object("euler")
    try:
        wrapped = patched.clone()
        wrapped.set_model_unet_function_wrapper(lambda function, given: cancel())
        core.sampled(wrapped, latent, noise, steps=4, sampler=sampler)
    except BaseException as error:
        found["interrupted"] = type(error).__name__
    found["sampler after it"] = sampler.sampler_function.__name__
    return found


def differential(core: Core) -> dict[str, Any]:
    """Differential Diffusion before and after the patch: one result, whose masks are those of Differential Diffusion."""
    model, _ = tiny(core)
    ramp = torch.linspace(0, 1, SIZE).expand(1, 1, SIZE, SIZE).clone()
    latent, noise = {"samples": picture(), "noise_mask": ramp}, start_noise(core)
    before = core.node(core.differential.execute(model).result[0], 2)
    after = core.differential.execute(core.node(model, 2)).result[0]
    with told() as lines:
        results = [core.sampled(which, latent, noise, steps=8) for which in (before, after)]
    alone = core.sampled(core.differential.execute(model).result[0], latent, noise, steps=8)
    columns = (results[0] - picture()).abs().mean((0, 1, 2))
    return {"order": distance(*results), "noise": distance(results[0], alone), "ramp": columns.tolist(), "said": lines}


class Blurring(torch.nn.Module):
    """A network of any number of axes: its output is a part of its input, mixed with the neighbors on the last axis. It keeps what it is given."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.weight = torch.nn.Parameter(torch.tensor(0.3), requires_grad=False)

    def forward(self, x: Tensor, timesteps: Tensor, **others: Any) -> Tensor:
        """Of the shape of x."""
        self.seen.append(x.clone())
        return self.weight * (x + x.roll(1, -1))


def kinds(core: Core) -> dict[str, Any]:
    """Flow models and ε models with 4-D and 5-D latents: what the network gets outside of the mask at each level."""
    base, formats = importlib.import_module("comfy.model_base"), importlib.import_module("comfy.latent_formats")
    config_of = importlib.import_module("comfy.supported_models_base").BASE
    patchers = importlib.import_module("comfy.model_patcher")
    found = {}
    for kind, ndim in (("FLOW", 4), ("FLUX", 5), ("EPS", 5), ("V_PREDICTION", 4), ("EDM", 4)):
        config = type(
            "Config",
            (config_of,),
            {"latent_format": type("Format", (formats.LatentFormat,), {"scale_factor": 0.7}), "unet_extra_config": {}},
        )
        with torch.inference_mode(False):
            made = base.BaseModel(config({"disable_unet_model_creation": True}), base.ModelType[kind])
            network = made.diffusion_model = Blurring()
            model = patchers.ModelPatcher(made, core.mm.get_torch_device(), core.mm.unet_offload_device())
        shape = (2, 4, *((3,) if ndim == 5 else ()), 32, 32)
        source = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        mask = torch.zeros(1, 1, 32, 32)
        mask[..., 8:20, 8:20] = 1
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        entry: dict[str, Any] = {}
        for name, which in (("plain", model), ("patched", core.node(model))):
            network.seen.clear()
            result = core.sampled(which, {"samples": source, "noise_mask": mask}, noise, steps=6, denoise=0.8)
            entry[f"{name} outside"] = distance(result[..., :8, :], source[..., :8, :])
            drawn = [noises_in(core, made, x, source * 0.7, i) for i, x in enumerate(network.seen)]
            entry[f"{name} calls"] = len(drawn)
            entry[f"{name} deviation"] = [float(n.std()) for n in drawn]
            pairs = [(i, j) for i in range(len(drawn)) for j in range(i)]
            entry[f"{name} correlation"] = [
                float(torch.corrcoef(torch.stack([drawn[i].flatten(), drawn[j].flatten()]))[0, 1]) for i, j in pairs
            ]
        found[f"{kind} {ndim}"] = entry
    return found


def noises_in(core: Core, model: Any, x: Tensor, source: Tensor, call: int) -> Tensor:
    """The noise in the network's input outside of the mask, by the model's own formula: it is linear in the noise."""
    sampling = model.model_sampling
    sigma = core.samplers.calculate_sigmas(sampling, "normal", int(6 / 0.8))[-7:][call].view(1)
    none = sampling.calculate_input(sigma, sampling.noise_scaling(sigma, torch.zeros_like(source), source))
    unit = sampling.calculate_input(sigma, sampling.noise_scaling(sigma, torch.ones_like(source), torch.zeros_like(source)))
    return ((x - none) / unit)[..., :7, :]


def main() -> None:
    """All checks, or those that are named."""
    core = Core()
    checks = (equalities, batches, all_samplers, wrong_use, differential, kinds)
    chosen = [check for check in checks if not sys.argv_given or check.__name__ in sys.argv_given]  # type: ignore[attr-defined]
    print(json.dumps({check.__name__: check(core) for check in chosen}))


if __name__ == "__main__":
    sys.argv_given = sys.argv[1:]  # type: ignore[attr-defined]
    main()
