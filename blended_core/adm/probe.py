"""The calibration probe: settings that the shapes of a checkpoint leave open, decided by how well the network predicts noise.

Images are noised at a few levels, and the network predicts the noise under every combination of the open settings. The true settings have the smallest
error. Heads and the order of qkv change how the weights are used, schedule and length what a timestep means, the objective only how an output is
interpreted, so one forward pass serves all objectives.

The error of a candidate is the geometric mean, over levels and images, of the mean squared error of ε. The margin of a decision is the smallest error of
a candidate that decides otherwise, divided by the error of the best candidate: 1 is a tie, 3 is certain. Attention contributes little to some networks,
and then a small margin can still be certain: the images are divided into cells with independent noise, and the share of cells in which the best candidate
has the smaller error (the agreement) separates chance from fact.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import DeviceContext
from ..diffusion import OBJECTIVES, DiffusionConfig, predict_eps, predict_x0, q_sample
from ..errors import BlendedError
from ..random import SeededRandom
from ..region import resize
from ..toy.world import BACKGROUNDS, OBJECTS, demo_scene
from .settings import read_settings
from .unet import UNet, UNetConfig

ALPHAS_CUMPROD = (0.97, 0.75, 0.35, 0.08)
"""ᾱ of the levels at which the network is evaluated, from nearly clean to nearly noise."""
MIN_MARGIN, MIN_AGREEMENT = 1.1, 0.8
"""A decision below both is unsure."""
UNINFORMATIVE_ERROR = 0.7
"""As a share of the trivial error: a network with a larger error does not predict noise under any setting."""
MAX_IMAGES = 8
"""Small networks are evaluated on several images, because one alone leaves much to chance."""
MAX_SIDE_PIXELS = 256
"""Side of the images: a network for 512 px is evaluated at 256 px, for a quarter of the time and memory."""
CELLS_PER_SIDE = 4
HEAD_COUNTS, CHANNELS_PER_HEAD = (1, 2, 4, 8), (16, 32, 64, 128)
PROCESSES = (("linear", 1000, True), ("cosine", 1000, True), ("linear", 4000, False), ("cosine", 4000, False))
"""Schedule, steps, rescale_timesteps. 4000 rescaled steps follow the curve of 1000 with the same timesteps; the two are equivalent."""
HEAD_SETTINGS = ("num_heads", "num_head_channels", "use_new_attention_order")
PROCESS_SETTINGS = ("schedule", "steps", "rescale_timesteps")
MAX_RIVAL = 100
"""Characters of the description of a second candidate."""
PROBED_SETTINGS = (*HEAD_SETTINGS, *PROCESS_SETTINGS, "objective")


@dataclass(frozen=True)
class ProbeResult:
    """What the probe decided.

    Attributes:
        settings: name → value of every setting that was open.
        margins: 'heads', 'schedule' and 'objective', as far as they were open → margin of the decision.
        agreement: the same groups → share of cells in which the best candidate has a smaller error than the second.
        rivals: the same groups → the second candidate, in words.
        error: of the best candidate.
        trivial_error: of a prediction that does not use the image.
        forwards: forward passes of the network; 0 if the decision was cached.
        seconds: duration of the probe.
    """

    settings: dict[str, Any]
    margins: dict[str, float]
    agreement: dict[str, float]
    rivals: dict[str, str]
    error: float
    trivial_error: float
    forwards: int
    seconds: float

    @property
    def unsure(self) -> dict[str, str]:
        """Groups whose decision may be chance → the second candidate."""
        return {
            group: self.rivals[group]
            for group, margin in self.margins.items()
            if margin < MIN_MARGIN and self.agreement[group] < MIN_AGREEMENT
        }

    @property
    def uninformative(self) -> bool:
        """Whether the network predicts noise under no setting, so that the decisions mean little."""
        return self.error > UNINFORMATIVE_ERROR * self.trivial_error

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names of the cache file and of ``inspect --json``, where the trivial error is 'blind'."""
        return {"blind" if name == "trivial_error" else name: value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProbeResult:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: if a value is missing or of another kind.
        """
        read = read_settings(values["settings"], "probe cache")
        settings = {name: read[name] for name in values["settings"]}
        if not settings.keys() <= set(PROBED_SETTINGS):
            raise ValueError("settings that the probe does not decide")
        margins, agreement = ({group: _number(share) for group, share in values[name].items()} for name in ("margins", "agreement"))
        rivals = {group: str(text) for group, text in values["rivals"].items()}
        if any(len(text) > MAX_RIVAL or not text.isprintable() for text in rivals.values()):
            raise ValueError("a rival that the probe does not name")
        if not margins.keys() == agreement.keys() == rivals.keys() or not margins.keys() <= {"heads", "schedule", "objective"}:
            raise ValueError("margins of other decisions")
        error, trivial_error, forwards, seconds = (_number(values[name]) for name in ("error", "blind", "forwards", "seconds"))
        return cls(settings, margins, agreement, rivals, error, trivial_error, int(forwards), seconds)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise ValueError("not a finite number")
    return float(value)


def group_of(setting: str) -> str:
    """'heads', 'schedule' or 'objective': the settings that are decided together."""
    return "heads" if setting in HEAD_SETTINGS else "schedule" if setting in PROCESS_SETTINGS else setting


@dataclass(frozen=True)
class ProbeOptions:
    """How the probe runs.

    Attributes:
        picture: [1, 3, H, W] in −1..1, of any size, similar to the training images; None: scenes of the toy world.
        context: called when the probe begins; returns the context to run it in, if not the one that the network is loaded to.
        on_forward: called with (done, expected) after every forward pass of the network. An exception that it raises ends the probe.
        cache: folder of earlier decisions; None: the user's cache folder.
    """

    picture: Tensor | None = None
    context: Callable[[], DeviceContext] | None = None
    on_forward: Callable[[int, int], None] | None = None
    cache: Path | None = None


DEFAULT_PROBE = ProbeOptions()


@dataclass(frozen=True)
class _Candidate:
    unet: UNetConfig
    process: DiffusionConfig

    def values(self, group: str) -> tuple[Any, ...]:
        """The settings of a group."""
        values = {**self.unet.to_dict(), **self.process.to_dict()}
        return tuple(values[name] for name in PROBED_SETTINGS if group_of(name) == group)

    def describe(self, group: str) -> str:
        """The settings of a group, in words."""
        unet, process = self.unet, self.process
        if group == "heads":
            count = f"{unet.num_heads} heads" if unet.num_head_channels is None else f"heads of {unet.num_head_channels} channels"
            return f"{count}, {'new' if unet.use_new_attention_order else 'old'} qkv order"
        if group == "schedule":
            return f"{process.schedule} {process.steps}{', rescaled' if process.rescale_timesteps and process.steps != 1000 else ''}"
        return process.objective


def run_probe(
    unet: UNet, process: DiffusionConfig, open_settings: Iterable[str], options: ProbeOptions = DEFAULT_PROBE
) -> ProbeResult:  # fmt: skip
    """Decides the open settings of a network and leaves the network with the decided heads and qkv order.

    Args:
        unet: the network with its weights, in any precision, on any device.
        process: the known or guessed process; settings that are not open are not changed.
        open_settings: names out of PROBED_SETTINGS; others are ignored.
        options: image and device; the network is moved to this device and stays there.

    Raises:
        BlendedError: if the output of the network is not finite under any setting, or the picture is not [1, 3, H, W].
    """
    started = time.perf_counter()
    undecided = [name for name in PROBED_SETTINGS if name in set(open_settings)]
    side = max(min(unet.config.image_size, MAX_SIDE_PIXELS), unet.config.downsampling)
    count = min(max(MAX_SIDE_PIXELS // side, 1) ** 2, MAX_IMAGES)
    images = toy_scenes(side, count) if options.picture is None else _square(options.picture, side).expand(count, -1, -1, -1)
    if options.context is not None:
        options.context().place(unet)
    noised = _NoisedPictures.of(images, next(unet.parameters()).device)
    heads, processes = head_candidates(unet.config, undecided), process_candidates(process, undecided)
    expected = len(processes) + len(heads) - 1
    errors: dict[_Candidate, _Errors] = {}
    evaluated: set[tuple[UNetConfig, tuple[Any, ...]]] = set()

    def evaluate(config: UNetConfig, process: DiffusionConfig) -> None:
        key = (config, tuple(getattr(process, name) for name in PROCESS_SETTINGS))
        if key in evaluated:
            return
        evaluated.add(key)
        unet.rewire(config)
        objectives = OBJECTIVES if "objective" in undecided else (process.objective,)
        for objective, error in noised.errors_for(unet, process, objectives).items():
            errors[_Candidate(config, replace(process, objective=objective))] = error
        if options.on_forward is not None:
            options.on_forward(len(evaluated), max(expected, len(evaluated)))

    def best() -> _Candidate:
        return min(errors, key=lambda c: errors[c].mean)

    # One group after the other, because wrong heads increase the error of every process alike; repeated until nothing changes.
    for candidate in processes:
        evaluate(unet.config, candidate)
    before = None
    while before != best():
        before = best()
        for config in heads:
            evaluate(config, before.process)
        for candidate in processes:
            evaluate(best().unet, candidate)
    winner = best()
    if not math.isfinite(errors[winner].mean):
        raise BlendedError("the output of the network is not finite under any setting; the file is damaged: download it again.")
    unet.rewire(winner.unet)
    values = {**winner.unet.to_dict(), **winner.process.to_dict()}
    seconds = {group: second for group in dict.fromkeys(map(group_of, undecided)) if (second := _second(errors, winner, group)) is not None}
    return ProbeResult(
        settings={name: values[name] for name in undecided},
        margins={group: min(errors[second].mean / errors[winner].mean, 1e6) for group, second in seconds.items()},
        agreement={group: errors[winner].agreement(errors[second]) for group, second in seconds.items()},
        rivals={group: second.describe(group) for group, second in seconds.items()},
        error=errors[winner].mean,
        trivial_error=noised.trivial_error(),
        forwards=len(evaluated),
        seconds=time.perf_counter() - started,
    )


def _second(errors: Mapping[_Candidate, _Errors], winner: _Candidate, group: str) -> _Candidate | None:
    """The best candidate with other settings of a group than the winner; None if there is none."""
    others = [c for c in errors if c.values(group) != winner.values(group)]
    return min(others, key=lambda c: errors[c].mean, default=None)


def _square(picture: Tensor, side: int) -> Tensor:
    """The central square of a picture [1, 3, H, W], scaled to a side in pixels."""
    if picture.ndim != 4 or picture.shape[:2] != (1, 3) or min(picture.shape[2:]) < 1:
        raise BlendedError(f"the picture of the probe is {tuple(picture.shape)}; it must be [1, 3, H, W].", option="probe_picture")
    short = min(picture.shape[2:])
    top, left = ((length - short) // 2 for length in picture.shape[2:])
    return resize(picture[:, :, top : top + short, left : left + short].float(), (side, side))


def toy_scenes(side: int, count: int) -> Tensor:
    """[count, 3, side, side] in −1..1: scenes of the toy world, the same in every call."""
    # No background and no object is repeated before all were used; light and dark scenes alternate.
    names = [name for _, name in zip(range(count), itertools.cycle(list(OBJECTS)[5::3] + list(OBJECTS)), strict=False)]
    scenes = [demo_scene(list(BACKGROUNDS)[i % len(BACKGROUNDS)], i, side, side, names[i])[0] for i in range(count)]
    return torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class _Errors:
    """The mean squared error of ε in each cell of each image at each level, [L·N, CELLS_PER_SIDE²]."""

    cells: Tensor

    @property
    def mean(self) -> float:
        """The geometric mean over levels and images; infinite if it is NaN."""
        value = float(self.cells.mean(dim=1).clamp(min=1e-12).log().mean().exp())
        return value if math.isfinite(value) else math.inf

    def agreement(self, other: _Errors) -> float:
        """The share of cells with a smaller error than the other's."""
        return float((self.cells < other.cells).double().mean())


@dataclass(frozen=True)
class _NoisedPictures:
    """Clean images ``x0`` and their ``noise`` [L·N, 3, H, W]: all images at the first level, then all at the next."""

    x0: Tensor
    noise: Tensor

    @classmethod
    def of(cls, images: Tensor, device: torch.device) -> _NoisedPictures:
        """Images [N, 3, H, W] at every level, each with its own noise."""
        noise = SeededRandom(0).noise("calibration", 0, range(len(ALPHAS_CUMPROD) * len(images)), tuple(images.shape[1:]))
        return cls(images.repeat(len(ALPHAS_CUMPROD), 1, 1, 1).to(device), noise.to(device))

    def errors_for(self, unet: UNet, process: DiffusionConfig, objectives: Sequence[str]) -> dict[str, _Errors]:
        """The errors of one forward pass, under each objective."""
        schedule = process.respaced(process.steps)
        levels = [int(np.abs(schedule.alphas_cumprod - value).argmin()) for value in ALPHAS_CUMPROD]
        index = torch.tensor(levels).repeat_interleave(len(self.x0) // len(ALPHAS_CUMPROD))
        x_t = q_sample(self.x0, index, self.noise, schedule)
        timesteps = torch.tensor([float(schedule.model_timestep(int(i))) for i in index], device=x_t.device)
        labels = None
        if unet.config.num_classes is not None:
            labels = torch.zeros(len(index), 4 * unet.config.model_channels, device=x_t.device)
        with torch.no_grad():
            output = unet(x_t, timesteps, labels)[:, :3].float()
        return {
            objective: self._errors(predict_eps(x_t, predict_x0(x_t, output, index, schedule, objective), index, schedule))
            for objective in objectives
        }

    def trivial_error(self) -> float:
        """The error without a network: the smaller one of predicting a gray image and of predicting no noise, for each image."""
        share = torch.tensor(ALPHAS_CUMPROD, device=self.x0.device).repeat_interleave(len(self.x0) // len(ALPHAS_CUMPROD))[
            :, None, None, None
        ]
        gray = self._errors(self.noise + (share / (1 - share)).sqrt() * self.x0).cells.mean(dim=1)
        return _Errors(torch.minimum(gray, self._errors(torch.zeros_like(self.noise)).cells.mean(dim=1))[:, None]).mean

    def _errors(self, eps: Tensor) -> _Errors:
        squared = (eps - self.noise).square().mean(dim=1)
        return _Errors(F.adaptive_avg_pool2d(squared, CELLS_PER_SIDE).flatten(1).double().cpu())


def attention_widths(config: UNetConfig) -> list[int]:
    """Channels of the resolutions with attention; the smallest resolution always has it."""
    widths = [int(m * config.model_channels) for m in config.channel_mult]
    return [w for i, w in enumerate(widths) if 2**i in config.attention_downsampling] + widths[-1:]


def head_candidates(config: UNetConfig, undecided: Sequence[str]) -> list[UNetConfig]:
    """Every choice of the undecided attention settings; of equivalent choices only one."""
    widths = attention_widths(config)
    choices = [config]
    if {"num_heads", "num_head_channels"} & set(undecided):
        choices += [replace(config, num_heads=n, num_head_channels=None) for n in HEAD_COUNTS if not any(w % n for w in widths)]
        choices += [
            replace(config, num_heads=UNetConfig.num_heads, num_head_channels=c)
            for c in CHANNELS_PER_HEAD
            if not any(w % c for w in widths)
        ]
    orders = (False, True) if "use_new_attention_order" in undecided else (config.use_new_attention_order,)
    out: dict[tuple[Any, ...], UNetConfig] = {}
    for choice in choices:
        for order in orders:
            counts = tuple((choice.heads(w), choice.heads(w, True)) for w in widths)
            key = (counts, order and any(n > 1 for pair in counts for n in pair))  # the order does not matter for one head
            out.setdefault(key, replace(choice, use_new_attention_order=order))
    return list(out.values())


def process_candidates(process: DiffusionConfig, undecided: Sequence[str]) -> list[DiffusionConfig]:
    """Every choice of the undecided settings of the process."""
    out = []
    for values in PROCESSES:
        changes: dict[str, Any] = {name: value for name, value in zip(PROCESS_SETTINGS, values, strict=True) if name in undecided}
        candidate = replace(process, **changes)
        if candidate not in out:
            out.append(candidate)
    return out
