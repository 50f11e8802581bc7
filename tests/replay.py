"""Replays recorded numbers of the reference implementation through the engine: ``python -m tests.replay FOLDER``.

A folder holds ``manifest.json`` and a file for each case: inputs, every random draw, and what the reference made of them.
The engine is given the same inputs and draws through its public functions; nothing of the method is written down here a
second time. Exit code 0: all within tolerance. 1: something is not, or a case cannot be replayed. 2: the folder is not in
the format.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from blended_core import options as options_module
from blended_core.adm.unet import UNet, UNetConfig, timestep_embedding
from blended_core.augment import ViewParameters, affine_matrices, perspective_matrices, warp_views
from blended_core.clip.model import OPENAI_MEAN, OPENAI_STD, ClipModel, Prompt
from blended_core.denoiser import DiffusionModel
from blended_core.device import DeviceContext
from blended_core.diffusion import (
    DiffusionConfig,
    coefficient,
    ddim_step,
    ddpm_step,
    guided_x0,
    posterior_mean,
    predict_eps,
    q_sample,
)
from blended_core.losses import ClipLoss, StepInput, cosine_distance, masked_view, range_loss, spherical_distance
from blended_core.mask import EditMask
from blended_core.perceptual import Perceptual
from blended_core.reference import (
    SquashedPicture,
    batch_background_loss,
    clip_distance,
    mixed_estimate,
    reference_index,
    unclamped_distance,
)
from blended_core.region import paste
from blended_core.sample import Models, edit_steps, final_image, guidance_from, guided_step, noise_background
from blended_core.schedule import Schedule, named_betas

FORMAT = 1


class NotTheFormat(Exception):
    """The folder cannot be read as recorded cases at all."""


class CannotReplay(Exception):
    """One case lacks something, or asks for something that the engine does not have."""


@dataclass(frozen=True)
class Tolerance:
    """The largest error allowed: absolute, over the largest recorded magnitude ('max'), or over max(1, |recorded|) ('each')."""

    limit: float
    relative: str = ""

    def error(self, ours: Tensor, recorded: Tensor) -> float:
        """Infinite where one is not a number and the other is."""
        difference = (ours - recorded).abs()
        if self.relative == "each":
            difference = difference / recorded.abs().clamp(min=1)
        same = (ours == recorded) | (ours.isnan() & recorded.isnan())
        difference = torch.where(same, 0.0, difference.nan_to_num(torch.inf, torch.inf))
        worst = float(difference.max()) if difference.numel() else 0.0
        if self.relative == "max" and worst:
            worst /= max(float(recorded.nan_to_num(0.0).abs().max()), 1e-30)
        return worst

    def __str__(self) -> str:
        return f"{self.limit:g}" + {"max": " × max", "each": " × max(1, v)", "": ""}[self.relative]


EXACT = Tolerance(0.0)
SCHEDULE = Tolerance(1e-12, "each")  # float64; some arrays grow to thousands, where 1e-12 is below their last digit
NETWORK = Tolerance(1e-5, "max")
SAMPLE = Tolerance(1e-4)
X0 = Tolerance(1e-3)
GRADIENT = Tolerance(1e-3, "max")
WARPED = Tolerance(2e-4)
MATRIX = Tolerance(1e-4, "each")
PIXEL = Tolerance(1e-6)
FINAL = Tolerance(1e-3)
DISTANCE = Tolerance(1e-3, "max")  # of what descends from x̂0
LEVEL = Tolerance(1.0)  # of 255: truncation to 8 bit makes a whole level of the smallest difference


@dataclass
class Row:
    """What is known of one quantity of a group."""

    tolerance: Tolerance
    cases: set[str] = field(default_factory=set)
    worst: float = -1.0
    where: str = ""

    @property
    def failed(self) -> bool:
        """Above the tolerance."""
        return not self.worst <= self.tolerance.limit


@dataclass
class Report:
    """The outcome of a folder: rows by (group, quantity), and sentences about cases that failed otherwise."""

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cases: int = 0

    @property
    def failed(self) -> bool:
        """Whether anything is above its tolerance or could not be replayed."""
        return bool(self.failures) or any(row.failed for row in self.rows.values())

    def lines(self) -> Iterator[str]:
        """The table."""
        table = [("group", "quantity", "cases", "worst error", "tolerance", "worst case")]
        for (group, quantity), row in self.rows.items():
            mark = "  ABOVE TOLERANCE" if row.failed else ""
            table.append((group, quantity, str(len(row.cases)), f"{row.worst:.2g}", str(row.tolerance), row.where + mark))
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        before = ""
        for i, line in enumerate(table):
            shown = (line[0] if line[0] != before else "", *line[1:])
            before = line[0]
            cells = (c.rjust(w) if k in (2, 3) else c.ljust(w) for k, (c, w) in enumerate(zip(shown, widths, strict=True)))
            yield "  ".join(cells).rstrip()
            if i == 0:
                yield "  ".join("-" * w for w in widths)
        yield from (f"note: {note}" for note in self.notes)
        yield from (f"FAILED: {failure}" for failure in self.failures)
        above = sum(row.failed for row in self.rows.values())
        yield f"{self.cases} cases: {above} quantities above tolerance, {len(self.failures)} other failures."


class Case:
    """One recorded case; ``case["key"]`` is a tensor, float32 where it was stored in float16 for size."""

    def __init__(self, folder: Folder, name: str, entry: dict[str, Any]) -> None:
        self.folder, self.name = folder, name
        try:
            self.group, self.file = str(entry["group"]), folder.path / entry["file"]
            self.config, self.listed = dict(entry["config"]), dict(entry["tensors"])
        except (KeyError, TypeError, ValueError) as error:
            raise NotTheFormat(f"the manifest's entry of {name} lacks its group, file, config or tensors ({error}).") from None
        self.report: Report | None = None
        self.used: set[str] = set()
        self.compared = 0

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """Every tensor of the file, as stored."""
        if not self.file.is_file():
            raise CannotReplay(f"its file {self.file.name} is missing.")
        try:
            tensors = load_file(self.file)
        except Exception as error:
            raise CannotReplay(f"its file {self.file.name} cannot be read ({error}).") from None
        for key, entry in self.listed.items():
            if key not in tensors:
                raise CannotReplay(f"tensor {key!r} of the manifest is missing from {self.file.name}.")
            if list(tensors[key].shape) != list(entry["shape"]):
                raise CannotReplay(f"tensor {key!r} is {list(tensors[key].shape)} and the manifest says {entry['shape']}.")
        return tensors

    @cached_property
    def json(self) -> dict[str, Any]:
        """The file of a case that has no tensors."""
        if not self.file.is_file():
            raise CannotReplay(f"its file {self.file.name} is missing.")
        try:
            return dict(json.loads(self.file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise CannotReplay(f"its file {self.file.name} is no JSON object ({error}).") from None

    def __contains__(self, key: str) -> bool:
        return key in self.stored

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.stored:
            raise CannotReplay(f"it records no tensor {key!r}, which a replay needs.")
        self.used.add(key)
        value = self.stored[key]
        return value.float() if value.dtype == torch.float16 else value

    def optional(self, key: str) -> Tensor | None:
        """The tensor, or None where the case has none of that name."""
        if key not in self:
            return None
        return self[key]

    def weights(self) -> dict[str, Tensor]:
        """The state dict under ``w.*``."""
        found = {k[2:]: v.float() for k, v in self.stored.items() if k.startswith("w.")}
        if not found:
            raise CannotReplay(f"{self.file.name} holds no weights (w.*).")
        return found

    def compare(
        self, quantity: str, tolerance: Tolerance, ours: Tensor | np.ndarray | float, recorded: Tensor | str, label: str = ""
    ) -> None:
        """Enters the error of ``ours`` against a recorded tensor (or its key); a difference of shape is a failure."""
        label = label or (recorded if isinstance(recorded, str) else quantity)
        theirs = (self[recorded] if isinstance(recorded, str) else recorded).detach().double()
        mine = ours.detach().double() if isinstance(ours, Tensor) else torch.as_tensor(ours, dtype=torch.float64)
        self.compared += 1
        if mine.numel() == theirs.numel() == 1:
            mine = mine.reshape(theirs.shape)
        if mine.shape != theirs.shape:
            raise CannotReplay(f"{label} is {list(mine.shape)} here and was {list(theirs.shape)}.")
        self.enter(quantity, tolerance, tolerance.error(mine, theirs), label)

    def compare_scaled(self, quantity: str, tolerance: Tolerance, ours: Tensor, recorded: Tensor | str, scale: Tensor) -> None:
        """The same with both divided by ``scale``, where errors grow by that factor."""
        theirs = self[recorded] if isinstance(recorded, str) else recorded
        label = f"{quantity} ({recorded})" if isinstance(recorded, str) else quantity
        if ours.shape != theirs.shape:
            raise CannotReplay(f"{label} is {list(ours.shape)} here and was {list(theirs.shape)}.")
        self.compare(quantity, tolerance, ours.double() / scale, theirs.double() / scale, recorded if isinstance(recorded, str) else "")

    def compare_if_recorded(self, quantity: str, tolerance: Tolerance, key: str, ours: Callable[[], Tensor | float]) -> None:
        """The same for a tensor that not every case has."""
        if key in self:
            self.compare(quantity, tolerance, ours(), key)

    def enter(self, quantity: str, tolerance: Tolerance, error: float, label: str) -> None:
        """Enters an error."""
        if self.report is None:
            return
        row = self.report.rows.setdefault((self.group, quantity), Row(tolerance))
        row.cases.add(self.name)
        if not error <= row.worst:
            row.worst, row.where = error, self.name.split("/", 1)[-1] + (f" ({label})" if label != quantity else "")


class Folder:
    """A folder of recorded cases, and the networks that several of them share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = path / "manifest.json"
        if not path.is_dir() or not manifest.is_file():
            raise NotTheFormat(f"{path} is not a folder with a manifest.json; give one of recorded cases.")
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise NotTheFormat(f"{manifest} is not valid JSON ({error}).") from None
        if not isinstance(content, dict) or content.get("format_version") != FORMAT:
            raise NotTheFormat(f"{manifest} does not say format_version {FORMAT}, the only one that is understood.")
        entries = content.get("cases")
        if not isinstance(entries, dict) or not entries:
            raise NotTheFormat(f"{manifest} lists no cases.")
        self.cases = {name: Case(self, name, entry) for name, entry in entries.items()}
        unknown = sorted({case.group for case in self.cases.values()} - set(REPLAYS))
        if unknown:
            raise NotTheFormat(f"{manifest} has cases of the group {', '.join(unknown)}; known are {', '.join(REPLAYS)}.")
        self.context = DeviceContext()
        self._unets: dict[str, UNet] = {}
        self._clips: dict[str, ClipModel] = {}
        self._perceptual: dict[int, Perceptual] = {}

    def case(self, name: str) -> Case:
        """Another case, whose networks one needs."""
        if name not in self.cases:
            raise CannotReplay(f"it needs {name}, which the manifest does not list.")
        return self.cases[name]

    def unet(self, name: str) -> UNet:
        """The network of ``unet/<name>``."""
        if name not in self._unets:
            case = self.case(f"unet/{name}")
            unet = UNet(unet_config(case.config))
            unet.load_state_dict(case.weights(), strict=True)
            self.context.place(unet)
            self._unets[name] = unet
        return self._unets[name]

    def diffusion_model(self, case: Case) -> DiffusionModel:
        """The network and the process that a case names."""
        return DiffusionModel.from_unet(self.unet(case.config["unet"]), diffusion_config(case.config["diffusion"]))

    def clip(self, name: str) -> ClipModel:
        """The open_clip model of a case of the group ``clip``, by its name or file."""
        name = name.removesuffix(".safetensors")
        if name not in self._clips:
            import open_clip

            case = self.case(name)
            config = case.config
            model = open_clip.CLIP(**config)
            model.load_state_dict(case.weights(), strict=True)
            text = config["text_cfg"]["context_length"]
            size = config["vision_cfg"]["image_size"]
            self._clips[name] = RecordingClip(self.context.place(model), None, name, OPENAI_MEAN, OPENAI_STD, size, text)
        return self._clips[name]

    def perceptual(self, salt: int) -> Perceptual:
        """LPIPS with the package's heads and the reproducible stand-in for its backbone."""
        if salt not in self._perceptual:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import lpips

                network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
            with torch.no_grad():
                for i, (_, parameter) in enumerate(network.net.named_parameters()):
                    values = hash_uniform(parameter.numel(), salt + i)
                    fan_in = parameter[0].numel()
                    scaled = values * np.float32(np.sqrt(6 / fan_in)) if parameter.ndim > 1 else values / 16
                    parameter.copy_(torch.from_numpy(scaled.astype(np.float32)).view_as(parameter))
            self._perceptual[salt] = Perceptual(self.context.place(network), f"vgg with hashed weights {salt}")
        return self._perceptual[salt]


class RecordingClip(ClipModel):
    """A CLIP that remembers the pictures it was shown last, and what it made of them."""

    pictures: Tensor
    embeddings: Tensor

    def encode_normalized(self, pictures: Tensor) -> Tensor:
        self.pictures, self.embeddings = pictures, super().encode_normalized(pictures)
        return self.embeddings


class RecordedRandom:
    """The recorded random numbers of a loop in place of a seed; step j of the recording is index ``start − j``."""

    def __init__(self, case: Case, start: int, whole_loop: bool = True) -> None:
        self.case, self.start, self.whole_loop = case, start, whole_loop

    def _at(self, key: str, level: int) -> Tensor:
        value = self.case[key]
        if not self.whole_loop:
            return value
        if not 0 <= self.start - level < len(value):
            raise CannotReplay(f"{key} holds {len(value)} steps; step {self.start - level} was asked for.")
        return value[self.start - level]

    def noise(self, purpose: str, level: int, images: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        key = {"start": "init_noise", "step": "step_noise", "background": "bg_noise"}[purpose]
        recorded = self.case[key] if purpose == "start" else self._at(key, level)
        recorded = recorded.float() / 32
        if tuple(recorded.shape[1:]) != shape or len(recorded) != len(images):
            raise CannotReplay(f"{key} is {list(recorded.shape)} and the engine asks for {[len(images), *shape]}.")
        return recorded

    def labels(self, level: int, images: Sequence[int], classes: int) -> Tensor:
        return self._at("y", level).long()

    def views(self, level: int, images: Sequence[int], count: int, size: int, symmetric: bool) -> ViewParameters:
        views = recorded_views(lambda key: self._at("aug." + key, level))
        if len(views) != count * len(images):
            raise CannotReplay(f"{len(views)} warped views are recorded and the engine asks for {count * len(images)}.")
        return views


def recorded_views(read: Callable[[str], Tensor]) -> ViewParameters:
    """Recorded augmentations as the engine takes them."""
    return ViewParameters(
        read("affine.batch_prob").bool(), read("affine.matrix").float(), read("persp.batch_prob").bool(), read("persp.matrix").float()
    )


def hash_uniform(count: int, salt: int) -> np.ndarray:
    """The recording's reproducible numbers in −1..1, float64; integer hashing, the same everywhere."""
    x = (np.arange(count, dtype=np.uint64) + np.uint64(salt * 0x9E3779B1 % 2**32)).astype(np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return ((x >> np.uint32(16)).astype(np.float32) - np.float32(32768)) / np.float32(32768)


UNET_NAMES = {"attention_resolutions": "attention_downsampling"}
UNET_IDLE = ("dropout", "use_checkpoint", "use_fp16", "dims")
"""Settings of the reference's constructor that say nothing about what the network computes here."""


def unet_config(config: dict[str, Any]) -> UNetConfig:
    """The engine's settings from the arguments of the reference's constructor, where −1 means 'not given'."""
    values = {UNET_NAMES.get(k, k): v for k, v in config.items() if k not in UNET_IDLE}
    for key in ("num_head_channels", "num_heads_upsample"):
        if values.get(key) == -1:
            values[key] = None
    return UNetConfig.from_dict({k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


DEFAULT_MULTIPLIERS = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}


def published_config(args: dict[str, Any]) -> UNetConfig:
    """The engine's settings from the reference's command line, which counts attention levels in pixels."""
    size = int(args["image_size"])
    multipliers = [float(m) for m in str(args["channel_mult"]).split(",") if m] or DEFAULT_MULTIPLIERS[size]
    return UNetConfig(
        image_size=size,
        model_channels=args["num_channels"],
        channel_mult=tuple(multipliers),
        num_res_blocks=args["num_res_blocks"],
        attention_downsampling=tuple(size // int(r) for r in args["attention_resolutions"].split(",")),
        out_channels=6 if args["learn_sigma"] else 3,
        num_classes=1000 if args["class_cond"] else None,
        num_heads=args["num_heads"],
        num_head_channels=None if args["num_head_channels"] == -1 else args["num_head_channels"],
        num_heads_upsample=None if args["num_heads_upsample"] == -1 else args["num_heads_upsample"],
        resblock_updown=args["resblock_updown"],
        use_scale_shift_norm=args["use_scale_shift_norm"],
        use_new_attention_order=args["use_new_attention_order"],
    )


def diffusion_config(config: dict[str, Any]) -> DiffusionConfig:
    """The engine's process from the arguments of the reference's."""
    fixed = "fixed_small" if config["sigma_small"] else "fixed_large"
    return DiffusionConfig(
        schedule=config["noise_schedule"],
        steps=config["steps"],
        rescale_timesteps=config["rescale_timesteps"],
        objective="x0" if config["predict_xstart"] else "eps",
        variance="learned_range" if config["learn_sigma"] else fixed,
    )


def unit(pixels: Tensor) -> Tensor:
    """[H, W, 3] or [H, W] of 8 bit → [1, 3 or 1, H, W] in 0..1."""
    return (pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None])[None].float() / 255


USUAL_AMPLIFICATION = 15.6


def amplification(schedule: Schedule, index: Tensor | int) -> Tensor:
    """How much more an error of the network counts in x̂0 than at the first step of the usual edit; 1 or more, [B or 1, 1, 1, 1].

    The tolerances are meant for √(1/ᾱ − 1) = 15.6. At the last level of a cosine schedule it is twenty thousand, and the
    recorded x̂0 as large, so that float32 cannot hold an absolute error of 1e-3.
    """
    values = torch.from_numpy(schedule.sqrt_recipm1_alphas_cumprod)[torch.as_tensor(index).reshape(-1)]
    return (values / USUAL_AMPLIFICATION).clamp(min=1)[:, None, None, None]


def all_equal(case: Case, key: str) -> int:
    """The one index of a batch that is at one level."""
    values = case[key].unique().tolist()
    if len(values) != 1:
        raise CannotReplay(f"{key} is {values}; guidance is asked for one index for the whole batch.")
    return int(values[0])


# One function for each group.


def replay_schedule(case: Case) -> None:
    config = case.config
    if "noise_schedule" not in config:
        case.compare("betas by name", SCHEDULE, named_betas(config["schedule"], config["steps"]), "betas")
        return
    process = diffusion_config(config)
    schedule = process.respaced(config["timestep_respacing"])
    case.compare("length", EXACT, float(len(schedule)), torch.tensor(config["num_timesteps"]))
    told = np.array([schedule.model_timestep(i) for i in range(len(schedule))], np.float32)
    for key in case.listed:
        if key == "timestep_map":
            case.compare("timestep_map", EXACT, schedule.timestep_map, key)
        elif key == "model_timesteps_rescaled":
            case.compare("model timesteps", EXACT, told, key)
        elif key == "unscaled_timesteps":
            ours = [reference_index(i, schedule) for i in range(len(schedule))]
            case.compare("reference index", EXACT, torch.tensor(ours), key)
        else:
            if not hasattr(schedule, key):
                raise CannotReplay(f"the engine's schedule has no {key}.")
            case.compare("arrays", SCHEDULE, getattr(schedule, key), key)


def replay_unet(case: Case) -> None:
    unet = case.folder.unet(case.name.split("/", 1)[1])
    x, t = case["x"].clone().requires_grad_(), case["t"]
    y = case.optional("y")
    case.compare_if_recorded("temb", NETWORK, "temb", lambda: timestep_embedding(t, unet.config.model_channels))
    seen: list[Tensor] = []
    hook = unet.middle_block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    try:
        out = unet(x, t, y)
    finally:
        hook.remove()
    case.compare_if_recorded("emb", NETWORK, "emb", lambda: seen[0])
    case.compare("out", NETWORK, out, "out")
    if "grad_x" in case:
        (gradient,) = torch.autograd.grad(out.square().mean(), x)
        case.compare("grad_x", GRADIENT, gradient, "grad_x")


def replay_unet_keys(case: Case) -> None:
    content = case.json
    with torch.device("meta"):
        unet = UNet(published_config(content["args"]))
    ours = {k: list(v.shape) for k, v in unet.state_dict().items()}
    theirs = {k: list(v) for k, v in content["state_dict_shapes"].items()}
    different = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
    case.compared += 1
    case.enter(
        "names and shapes that differ", EXACT, float(len(different)), f"{len(theirs)} names" + (f", {different[0]}" if different else "")
    )
    case.enter("order of names", EXACT, float(list(ours) != list(theirs)), "order of names")
    case.compare("parameters", EXACT, float(sum(p.numel() for p in unet.parameters())), torch.tensor(content["n_params"]))


def replay_diffusion_step(case: Case) -> None:
    model = case.folder.diffusion_model(case)
    schedule = model.config.respaced(case.config["diffusion"]["timestep_respacing"])
    t, x_t = case["t"].long(), case["x_t"]
    labels = case.optional("y")
    case.compare("q_sample", SAMPLE, q_sample(case["x_start"], t, case["q_noise"], schedule), "q_sample")
    scale = amplification(schedule, t)
    with torch.no_grad():
        plain = model.predict(x_t, t, schedule, labels)
    clipped = plain.x0.clamp(-1, 1)
    case.compare_scaled("pred_xstart", X0, plain.x0, "pmv.noclip.pred_xstart", scale)
    case.compare_scaled("pred_xstart", X0, clipped, "pmv.clip.pred_xstart", scale)
    case.compare_scaled("mean", SAMPLE, plain.mean, "pmv.noclip.mean", scale)
    case.compare_scaled("mean", SAMPLE, posterior_mean(clipped, x_t, t, schedule), "pmv.clip.mean", scale)
    case.compare("variance", NETWORK, plain.variance, case["pmv.noclip.variance"].expand_as(x_t))
    case.compare("log_variance", SAMPLE, plain.log_variance, case["pmv.noclip.log_variance"].expand_as(x_t))

    # The recording's own analytic guidance, of the timestep that the network is told.
    told = torch.tensor([schedule.model_timestep(int(i)) for i in t]).float()[:, None, None, None]
    gradient = 0.3 * x_t.sin() * (told / 1000 + 0.25)
    shifted = guided_x0(x_t, plain.x0, t, schedule, gradient)
    noise, nothing = case["step_noise"], torch.zeros_like(x_t)
    case.compare_scaled("guided mean", SAMPLE, ddpm_step(plain, t, nothing, gradient), "condition_mean", scale)
    case.compare_scaled("guided pred_xstart", X0, shifted, "condition_score.pred_xstart", scale)
    case.compare_scaled("guided mean", SAMPLE, posterior_mean(shifted, x_t, t, schedule), "condition_score.mean", scale)
    case.compare_scaled("DDPM sample", SAMPLE, ddpm_step(plain, t, noise), "p_sample.plain.sample", scale)
    case.compare_scaled("DDPM sample", SAMPLE, ddpm_step(plain, t, noise, gradient), "p_sample.cond.sample", scale)
    for eta, name in ((0.0, "eta0"), (0.7, "eta07")):
        for x0, guided in ((plain.x0, "plain"), (shifted, "cond")):
            sample = ddim_step(x_t, x0, t, noise, schedule, eta)
            case.compare_scaled("DDIM sample", SAMPLE, sample, f"ddim.{name}.{guided}.sample", scale)
    case.compare_scaled("guided pred_xstart", X0, shifted, "ddim.eta07.cond.pred_xstart", scale)
    case.compare_if_recorded("DDIM reversed", SAMPLE, "ddim_reverse.sample", lambda: ddim_reversed(x_t, plain.x0, t, schedule))


def ddim_reversed(x_t: Tensor, x0: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """One deterministic DDIM step toward more noise, which the reference code has and the library does not need."""
    eps = predict_eps(x_t, x0, t, schedule)
    following = schedule.alphas_cumprod_next
    return x0 * coefficient(np.sqrt(following), t, x_t) + coefficient(np.sqrt(1 - following), t, x_t) * eps


def replay_losses(case: Case) -> None:
    if "d_spherical" in case:
        x, y = case["x"].clone().requires_grad_(), case["y"][0]
        for distance, key in ((unclamped_distance, "d_spherical"), (cosine_distance, "d_cosine")):
            values = distance(x, y)
            case.compare("D_CLIP", NETWORK, values, key)
            for rows in (0, 2):
                name = f"{key}.grad_x" + (f"[{rows}:]" if rows else "")
                if name in case:
                    (gradient,) = torch.autograd.grad(values[rows:].sum(), x, retain_graph=True)
                    case.compare("D_CLIP gradient", GRADIENT, gradient[rows:], name)
        # The clamp of our own distance may show only where embeddings are opposite.
        case.compare("D_CLIP", NETWORK, spherical_distance(x, y), "d_spherical")
        case.compare("D_CLIP of views", NETWORK, mean_over_views(x.detach(), y, int(case.config["batch"])), "clip_loss_reduction")
    elif "range_loss" in case:
        x = case["x"].clone().requires_grad_()
        values = range_loss(x)
        case.compare("range", NETWORK, values, "range_loss")
        case.compare("range gradient", GRADIENT, torch.autograd.grad(values.sum(), x)[0], "grad_x")
    elif "lpips" in case:
        perceptual = case.folder.perceptual(int(case.config["hash_salt"]))
        x, source, mask = case["x_in"].clone().requires_grad_(), case["init"], case["mask"]
        l2 = batch_background_loss(x, source, mask, perceptual, 0.0, 1.0)
        case.compare("D_bg, L2", NETWORK, l2, "l2")
        case.compare("D_bg gradient, L2", GRADIENT, torch.autograd.grad(l2, x)[0], "l2.grad_x")
        total = batch_background_loss(x, source, mask, perceptual, 1.0, 0.0)
        case.compare("D_bg, LPIPS", NETWORK, total, case["lpips"].sum())
        case.compare("D_bg gradient, LPIPS", GRADIENT, torch.autograd.grad(total, x)[0], "lpips.grad_x")
        with torch.no_grad():
            case.compare("LPIPS", NETWORK, perceptual(x * (1 - mask), source.expand_as(x)), "lpips")
            case.compare_if_recorded("LPIPS of itself", PIXEL, "lpips_self", lambda: perceptual(source, source))
            case.compare_if_recorded("LPIPS", NETWORK, "lpips_pair", lambda: perceptual(case["pair_a"], case["pair_b"]))
    else:
        raise CannotReplay(f"it records none of the known losses, but {', '.join(case.listed)}.")


def mean_over_views(embeddings: Tensor, text: Tensor, batch: int) -> Tensor:
    """The engine's sum over images of the mean distance over views, for embeddings that are given instead of computed."""

    class Given(ClipModel):
        def __init__(self) -> None:
            pass

        def encode_image(self, pictures: Tensor) -> Tensor:
            return embeddings + 0 * pictures.sum()

    prompt = Prompt(("recorded",), (1.0,), text[None])
    loss = ClipLoss(Given(), prompt, views=len(embeddings) // batch, distance=unclamped_distance)
    return loss.pooled_gradient(torch.zeros(batch, 3, 1, 1), None)[1].sum()


def replay_clip(case: Case) -> None:
    clip = case.folder.clip(case.name)
    image = case["image"].clone().requires_grad_()
    embeddings = clip.encode_normalized(image)
    case.compare("image embedding", NETWORK, embeddings, "image_embed")
    case.compare("text embedding", NETWORK, clip.encode_tokens(case["tokens"].long()), "text_embed")
    case.compare("gradient", GRADIENT, torch.autograd.grad(embeddings.square().sum(), image)[0], "grad_image")


def compare_matrices(case: Case, prefix: str, size: int) -> None:
    """What the engine makes of the recorded angles, shifts and corners, where the warp is applied at all."""
    gate = case[prefix + "affine.batch_prob"].bool()
    if gate.any():
        ours = affine_matrices(case[prefix + "affine.angle_deg"][gate], case[prefix + "affine.translations"][gate], size)
        case.compare("view matrices", MATRIX, ours, case[prefix + "affine.matrix"][gate])
    gate = case[prefix + "persp.batch_prob"].bool()
    if gate.any():
        ours = perspective_matrices(case[prefix + "persp.end_points"][gate], size)
        case.compare("view matrices", MATRIX, ours, case[prefix + "persp.matrix"][gate])


def replay_augment(case: Case) -> None:
    size, count, batch = case.config["output_size"], case.config["aug_num"], case.config["batch"]
    x = case["x"].clone().requires_grad_()
    pooled = masked_view(x, torch.ones(1, 1, *x.shape[-2:]), size)
    case.compare_if_recorded("after pooling", WARPED, "after_pool", lambda: pooled)
    out = pooled
    if count > 1:
        views = recorded_views(lambda key: case[key])
        copies = pooled.repeat(count - 1, 1, 1, 1)
        if len(views) != len(copies) or len(pooled) != batch:
            raise CannotReplay(f"{len(views)} views are recorded for {len(copies)} copies of {batch} images.")
        if "after_affine" in case:
            rows = len(case["after_affine"])
            first = views.rows(0, rows)
            affine_only = ViewParameters(
                first.affine_gate, first.affine, torch.zeros_like(first.perspective_gate), first.perspective
            )  # fmt: skip
            case.compare("after the affine warp", WARPED, warp_views(copies[:rows], affine_only), "after_affine")
        out = torch.cat([pooled, warp_views(copies, views)])
        compare_matrices(case, "", size)
    case.compare("out", WARPED, out, "out")
    case.compare("grad_x", GRADIENT, torch.autograd.grad((out * case["w"]).sum(), x)[0], "grad_x")


def prepared(case: Case, image: str, mask: str, options: options_module.EditOptions) -> tuple[Tensor, EditMask]:
    """Source [1, 3, S, S] in −1..1 and mask [1, 1, S, S] from the recorded files, by the rules of the options."""
    size = int(case.config["size"])
    pixels = case[image]
    whole = SquashedPicture(pixels.shape[1], pixels.shape[0])
    source = whole.cut(unit(pixels), size) * 2 - 1
    if mask not in case:
        return source, EditMask(case["mask"])
    grey = case[mask]
    grey = grey[..., 0] if grey.ndim == 3 else grey  # the reference reads the first channel
    whole_mask = EditMask.of(unit(grey), options.mask_rule, options.invert_mask)
    return source, SquashedPicture(grey.shape[1], grey.shape[0]).cut_mask(whole_mask, size)


def replay_preprocess(case: Case) -> None:
    options = options_module.preset("official", invert_mask=bool(case.config["invert_mask"]))
    source, mask = prepared(case, "image_u8", "mask_u8", options)
    case.compare("init_image", PIXEL, source, "init_image")
    case.compare("mask", EXACT, mask.values, "mask")


def official(case: Case, **changes: Any) -> options_module.EditOptions:
    """The preset ``official`` with the recorded command line."""
    args = case.config["editor_args"]
    local = bool(args["local_clip_guided_diffusion"])
    return options_module.preset(
        "official",
        algorithm="local" if local else "blended",
        steps=str(case.config["diffusion"]["timestep_respacing"]),
        sampler="ddim" if args["ddim"] else "ddpm",
        candidates=args["batch_size"],
        batch=args["batch_size"],
        scale=float(args["clip_guidance_lambda"]),
        range_scale=float(args["range_lambda"]),
        background_scale=1.0 if args["background_preservation_loss"] else 0.0,
        lpips_scale=float(args["lpips_sim_lambda"]),
        l2_scale=float(args["l2_sim_lambda"]),
        views=args["aug_num"],
        invert_mask=bool(args["invert_mask"]),
        enforce_background=bool(args["enforce_background"]) and not local,
        **changes,
    )


def models_of(case: Case) -> tuple[Models, RecordingClip, Prompt]:
    """The networks of a guided case and its prompt, whose embedding is compared."""
    folder = case.folder
    clip = folder.clip(case.config["clip"])
    assert isinstance(clip, RecordingClip)
    prompt = Prompt((case.config["editor_args"]["prompt"],), (1.0,), clip.encode_tokens(case["tokens"].long()))
    case.compare("text embedding", NETWORK, prompt.embeddings, "text_embed")
    perceptual = None
    if case.config["editor_args"]["background_preservation_loss"]:
        perceptual = folder.perceptual(int(case.config.get("lpips_salt", 7)))
    return Models(folder.diffusion_model(case), clip, perceptual, folder.context), clip, prompt


def replay_guided_step(case: Case) -> None:
    options = official(case)
    models, clip, prompt = models_of(case)
    schedule = models.ddpm.config.respaced(options.steps)
    source, mask = prepared(case, "init_u8", "mask_u8", options)
    case.compare("mask", EXACT, mask.values, "mask")
    index, x = all_equal(case, "t_index"), case["x"]
    looked_up = reference_index(index, schedule)
    case.compare("timestep", EXACT, schedule.model_timestep(index), torch.tensor(case["t_cond"].unique().tolist()))
    case.compare("reference index", EXACT, float(looked_up), torch.tensor(all_equal(case, "t_index_in_cond_fn")))

    random, images = RecordedRandom(case, index, whole_loop=False), range(len(x))
    labels = case.optional("y")
    if options.guidance.views > 1:
        compare_matrices(case, "aug.", clip.image_size)
    guidance = guidance_from(options.guidance, models, prompt)
    result = guidance(models.ddpm, StepInput(x, looked_up, schedule, images, random, mask.for_clip(), source), labels)
    x0 = result.prediction.x0
    scale = amplification(schedule, looked_up)
    case.compare_scaled("pred_xstart", X0, x0, "pred_xstart", scale)
    case.compare_scaled("x_in", X0, mixed_estimate(x0, x, looked_up, schedule), "x_in", scale)
    if "clip_in_ends" in case:
        ends = clip.pictures if options.guidance.views == 1 else torch.cat([clip.pictures[: len(x)], clip.pictures[-len(x) :]])
        # Normalising divides by about a quarter: the tolerance of an augmented picture, times four.
        case.compare("what CLIP sees", Tolerance(4 * X0.limit), ends, "clip_in_ends")
    case.compare_if_recorded("image embedding", DISTANCE, "image_embed", lambda: clip.embeddings)
    if result.gradient is None:
        raise CannotReplay("there was no gradient here.")
    if "clip" in result.values:
        case.compare("D_CLIP", DISTANCE, result.values["clip"].sum(), "clip_loss")
    case.compare("range", X0, range_loss(x0).sum(), "range_loss")
    case.compare("gradient", GRADIENT, result.gradient, "grad")
    # The same through the function that a loop calls, which looks the index up itself. DDIM, because it needs no noise.
    step = guided_step(models, x, index, schedule, replace(options, sampler="ddim"), prompt, mask.for_clip(), random, images, source)
    if step.gradient is None:
        raise CannotReplay("the step had no gradient here.")
    case.compare("gradient of the step", GRADIENT, step.gradient, "grad")


def replay_loop(case: Case) -> None:
    args = case.config["editor_args"]
    models, clip, prompt = models_of(case)
    length = len(models.ddpm.config.respaced(case.config["diffusion"]["timestep_respacing"]))
    options = official(case, strength=(length - int(args["skip_timesteps"])) / length)
    schedule = models.ddpm.config.respaced(options.steps)
    start = schedule.start_index(options.strength)
    source, mask = prepared(case, "init_u8", "mask_u8", options)
    case.compare("mask", EXACT, mask.values, "mask")
    if options.guidance.views > 1:
        compare_matrices(case, "aug.", clip.image_size)
    random, images = RecordedRandom(case, start), range(options.batch)
    case.compare_if_recorded("x_T", SAMPLE, "x_T", lambda: noise_background(source, start, schedule, random, images, "start"))

    x_at, g_at = (case[k].tolist() if k in case else [] for k in ("x_steps", "g_steps"))
    saved = list(case.config.get("saved_j", []))
    told, losses, distances = [], [], []
    step = None
    for j, step in enumerate(edit_steps(models, source, mask, prompt, options, random, images)):
        told.append(schedule.model_timestep(start - j))
        losses.append(float("nan") if step.clip_distance is None else float(step.clip_distance.sum()))
        if j in x_at:
            case.compare("x", SAMPLE, step.x, case["x_after"][x_at.index(j)])
        if j in g_at:
            case.compare_scaled("pred_xstart", X0, step.x0, case["pred_xstart"][g_at.index(j)], amplification(schedule, start - j))
            if step.gradient is None:
                raise CannotReplay(f"step {j} had no gradient here.")
            case.compare("gradient", GRADIENT, step.gradient, case["grad"][g_at.index(j)])
        if j in saved:
            distances += clip_distance(step.x0, mask.for_clip(), clip, prompt).tolist()
    if step is None or len(told) != case.config["steps"]:
        raise CannotReplay(f"the engine made {len(told)} steps and {case.config['steps']} were recorded.")
    missed = [j for j in (*x_at, *g_at) if not 0 <= j < len(told)]
    if missed:
        raise CannotReplay(f"steps {missed} are recorded, but there are {len(told)}.")
    case.compare_if_recorded("timesteps", EXACT, "cond_t", lambda: torch.tensor(told))
    case.compare_if_recorded("D_CLIP", DISTANCE, "clip_loss", lambda: torch.tensor(losses))

    edited = final_image(step, options)
    whole = SquashedPicture(edited.shape[3], edited.shape[2])
    final = paste(edited, (source + 1) / 2, mask, whole, options.feather, options.keeps_background)
    case.compare("final", FINAL, final, "final_pil_in")
    case.compare_if_recorded("final, 8 bit", LEVEL, "final_u8", lambda: final.mul(255).to(torch.uint8).permute(0, 2, 3, 1))
    case.compare("distances", DISTANCE, clip_distance(edited, mask.for_clip(), clip, prompt), "final_distance")
    case.compare_if_recorded(
        "distances", DISTANCE, "final_distance_noaa", lambda: clip_distance(edited, mask.for_clip(), clip, prompt, antialias=False)
    )
    case.compare_if_recorded("distances", DISTANCE, "saved_distances", lambda: torch.tensor(distances))


REPLAYS: dict[str, Callable[[Case], None]] = {
    "schedule": replay_schedule,
    "unet": replay_unet,
    "unet_keys": replay_unet_keys,
    "diffusion_step": replay_diffusion_step,
    "losses": replay_losses,
    "clip": replay_clip,
    "augment": replay_augment,
    "preprocess": replay_preprocess,
    "guided_step": replay_guided_step,
    "loop": replay_loop,
}
UNCOMPARED = ("w.", "start_points")
"""Weights, and the corners of a square: recorded, but neither an outcome nor a draw."""


def replay(path: Path) -> Report:
    """Every case of a folder; NotTheFormat if it is none."""
    folder = Folder(path)
    report = Report()
    by_group = sorted(folder.cases.values(), key=lambda c: list(REPLAYS).index(c.group))
    for case in by_group:
        report.cases += 1
        case.report = report
        try:
            REPLAYS[case.group](case)
            if not case.compared:
                raise CannotReplay("nothing of it could be compared.")
        except KeyError as error:
            report.failures.append(f"{case.name}: its config lacks {error}.")
        except Exception as error:
            # Whatever stops one case must not hide the others.
            kind = "" if isinstance(error, CannotReplay) else f"{type(error).__name__}: "
            report.failures.append(f"{case.name}: {kind}{error}")
        else:
            idle = [k for k in case.listed if k not in case.used and not any(part in k for part in UNCOMPARED)]
            if idle:
                report.notes.append(f"{case.name}: not looked at: {', '.join(idle)}.")
    return report


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m tests.replay FOLDER", file=sys.stderr)
        return 2
    try:
        report = replay(Path(arguments[0]))
    except NotTheFormat as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(report.lines()))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
