"""The calibration probe: what the shapes of a checkpoint do not say, found by trying.

A picture is noised at a few levels, and the network is asked for the noise under every setting that it could have. Under
its own settings it knows the noise best. Heads and the order of qkv change how the weights are wired, schedule and length what
a timestep means, the objective only how an output is read, so that one forward serves all objectives.

The error of a candidate is the geometric mean over the levels of the mean squared error of ε; of networks of 128 px and below over several pictures too. The margin of a decision is the
error of the best candidate that decides otherwise over the error of the winner: 1 is a tie, 3 beyond doubt. Attention adds
little to some networks, and then a small margin may still be sure: the picture is cut into places, each with noise of its own, and
the share of places in which the winner is better tells chance from fact.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
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
from ..io.atomic import write_bytes
from ..random import SeededRandom
from ..region import resize
from ..schedule import Schedule
from .unet import UNet, UNetConfig

LEVELS = (0.97, 0.75, 0.35, 0.08)
"""Share of the picture's variance (ᾱ) at which the network is asked: nearly clean to nearly noise."""
SMALL, AGREED = 1.1, 0.8
"""A margin below the one is worth a warning, unless the winner is better in this share of the places."""
CLUELESS = 0.7
"""A network whose error is beyond this share of what answering nothing has knows nothing of the noise."""
MOST = 8
"""Pictures at most: small networks are asked about several at once, since one alone leaves much to chance."""
PLACES = 4  # along each side
LARGEST = 256
"""Pixels of the picture's side at most: a network for 512 px is asked at 256, for a quarter of the time and memory."""
HEADS, HEAD_CHANNELS = (1, 2, 4, 8), (16, 32, 64, 128)
# A length of 4000 with rescaled timesteps follows the curve of 1000 and is fed the same numbers: the two cannot be told apart,
# and need not be.
PROCESSES = (("linear", 1000, True), ("cosine", 1000, True), ("linear", 4000, False), ("cosine", 4000, False))
WIRING = ("num_heads", "num_head_channels", "use_new_attention_order")
PROCESS = ("schedule", "steps", "rescale_timesteps")
PROBED = (*WIRING, *PROCESS, "objective")
FORMAT = 2  # of the kept decisions; raised when the probe decides otherwise than before


@dataclass(frozen=True)
class Probe:
    """What was decided.

    ``settings``: name → value of every setting that was open. ``margins``: 'heads', 'schedule' and 'objective' as far as they
    were open → the margin. ``agreement``: the same groups → the share of places in which the winner is better than what came
    second, and ``rivals`` → that in words. ``error``: of the winner, ``blind``: of a network that answers nothing. ``seconds`` and
    ``forwards``: what it took; 0 forwards if it was remembered.
    """

    settings: dict[str, Any]
    margins: dict[str, float]
    agreement: dict[str, float]
    rivals: dict[str, str]
    error: float
    blind: float
    forwards: int
    seconds: float

    @property
    def unsure(self) -> dict[str, str]:
        """Groups whose decision may be chance → what came second."""
        return {group: self.rivals[group] for group, margin in self.margins.items() if margin < SMALL and self.agreement[group] < AGREED}

    @property
    def clueless(self) -> bool:
        """Whether the network knows the noise under no setting."""
        return self.error > CLUELESS * self.blind

    def margin_of(self, setting: str) -> float | None:
        """The margin of the group that a setting belongs to."""
        return self.margins.get(group_of(setting))


def group_of(setting: str) -> str:
    """'heads', 'schedule' or 'objective'."""
    return "heads" if setting in WIRING else "schedule" if setting in PROCESS else setting


@dataclass(frozen=True)
class ProbeOptions:
    """How a network is tried out.

    ``picture``: [1, 3, H, W] in −1..1 of the kind that the network draws, of any size, asked about with several draws of noise where
    drawn scenes would be several; None: drawn scenes. ``place``: asked when
    the probe begins for the context to run it in, where that is not the one of loading. ``on_forward``: called with (done,
    expected) after every forward of the network; an exception of it ends the probe.
    """

    picture: Tensor | None = None
    place: Callable[[], DeviceContext] | None = None
    on_forward: Callable[[int, int], None] | None = None


DEFAULT_PROBE = ProbeOptions()
"""On the drawn scene, where the network is."""


@dataclass(frozen=True)
class _Candidate:
    wiring: UNetConfig
    process: DiffusionConfig


def probe(
    unet: UNet,
    process: DiffusionConfig,
    open_settings: Iterable[str],
    trial: ProbeOptions = DEFAULT_PROBE,
) -> Probe:
    """Decides the open settings of a network; leaves it wired as decided.

    Args:
        unet: the network with its weights, in any precision, on any device.
        process: what is known or guessed of the process; settings that are not open are kept.
        open_settings: names out of PROBED; others are ignored.
        trial: with which picture and on which device; the network is brought there and stays.

    Raises:
        BlendedError: if the network's answers are not finite under any setting, or the picture is no [1, 3, H, W].
    """
    begun = time.perf_counter()
    undecided = [name for name in PROBED if name in set(open_settings)]
    side = max(min(unet.config.image_size, LARGEST), unet.config.downsampling)
    count = min(max(LARGEST // side, 1) ** 2, MOST)
    pictures = drawn_pictures(side, count) if trial.picture is None else _square(trial.picture, side).expand(count, -1, -1, -1)
    if trial.place is not None:
        trial.place().place(unet)
    noised = _Question.of(pictures, next(unet.parameters()).device)
    wirings, processes = _wirings(unet.config, undecided), _processes(process, undecided)
    expected = len(processes) + len(wirings) - 1
    errors: dict[_Candidate, _Errors] = {}
    seen: set[tuple[UNetConfig, tuple[Any, ...]]] = set()

    def ask(wiring: UNetConfig, tried: DiffusionConfig) -> None:
        key = (wiring, tuple(getattr(tried, name) for name in PROCESS))
        if key in seen:
            return
        seen.add(key)
        unet.rewire(wiring)
        readings = OBJECTIVES if "objective" in undecided else (tried.objective,)
        for objective, found in noised.asked(unet, tried, readings).items():
            errors[_Candidate(wiring, replace(tried, objective=objective))] = found
        if trial.on_forward is not None:
            trial.on_forward(len(seen), max(expected, len(seen)))

    def best() -> _Candidate:
        return min(errors, key=lambda c: errors[c].mean)

    # One group after the other: a wrong wiring blurs every process alike. Again, until nothing changes.
    for tried in processes:
        ask(unet.config, tried)
    before = None
    while before != best():
        before = best()
        for wiring in wirings:
            ask(wiring, before.process)
        for tried in processes:
            ask(best().wiring, tried)
    won = best()
    if not math.isfinite(errors[won].mean):
        raise BlendedError("the network answers with numbers that are not finite under every setting; the file is damaged: fetch it again.")
    unet.rewire(won.wiring)
    values = {**won.wiring.to_dict(), **won.process.to_dict()}
    seconds = {group: second for group in dict.fromkeys(map(group_of, undecided)) if (second := _second(errors, won, group)) is not None}
    return Probe(
        settings={name: values[name] for name in undecided},
        margins={group: min(errors[second].mean / errors[won].mean, 1e6) for group, second in seconds.items()},
        agreement={group: errors[won].better(errors[second]) for group, second in seconds.items()},
        rivals={group: _in_words(second, group) for group, second in seconds.items()},
        error=errors[won].mean,
        blind=noised.blind(),
        forwards=len(seen),
        seconds=time.perf_counter() - begun,
    )


def _square(picture: Tensor, side: int) -> Tensor:
    """The middle square of a picture [1, 3, H, W] at a size."""
    if picture.ndim != 4 or picture.shape[:2] != (1, 3) or min(picture.shape[2:]) < 1:
        raise BlendedError(f"the picture of the probe is {tuple(picture.shape)}; it must be [1, 3, H, W].")
    short = min(picture.shape[2:])
    top, left = ((length - short) // 2 for length in picture.shape[2:])
    return resize(picture[:, :, top : top + short, left : left + short].float(), (side, side))


def drawn_pictures(side: int, count: int) -> Tensor:
    """[count, 3, side, side] in −1..1: scenes of the embedded world, the same every time."""
    from ..toy.world import BACKGROUNDS, OBJECTS, demo_scene

    # Every background and object comes before one comes again, light scenes and dark ones in turn.
    things = [name for _, name in zip(range(count), itertools.cycle(list(OBJECTS)[5::3] + list(OBJECTS)), strict=False)]
    scenes = [demo_scene(list(BACKGROUNDS)[i % len(BACKGROUNDS)], i, side, side, things[i])[0] for i in range(count)]
    return torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class _Errors:
    """The mean squared error of ε at each place of each picture at each level [L·N, PLACES²]."""

    places: Tensor

    @property
    def mean(self) -> float:
        """The geometric mean over levels and pictures; infinite if it is no number."""
        value = float(self.places.mean(dim=1).clamp(min=1e-12).log().mean().exp())
        return value if math.isfinite(value) else math.inf

    def better(self, other: _Errors) -> float:
        """The share of places with a smaller error than the other's."""
        return float((self.places < other.places).double().mean())


@dataclass(frozen=True)
class _Question:
    """Noised pictures: ``x0`` and ``noise`` [L·N, 3, H, W], all pictures at the first level, then at the next."""

    x0: Tensor
    noise: Tensor

    @classmethod
    def of(cls, pictures: Tensor, device: torch.device) -> _Question:
        """Pictures [N, 3, H, W] at every level, with noise of their own."""
        noise = SeededRandom(0).noise("calibration", 0, range(len(LEVELS) * len(pictures)), tuple(pictures.shape[1:]))
        return cls(pictures.repeat(len(LEVELS), 1, 1, 1).to(device), noise.to(device))

    def asked(self, unet: UNet, process: DiffusionConfig, objectives: Sequence[str]) -> dict[str, _Errors]:
        """The errors under every reading of one forward."""
        schedule: Schedule = process.respaced(process.steps)
        levels = [int(np.abs(schedule.alphas_cumprod - level).argmin()) for level in LEVELS]
        index = torch.tensor(levels).repeat_interleave(len(self.x0) // len(LEVELS))
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

    def blind(self) -> float:
        """The error of who answers nothing: takes the picture for grey where that is better than taking the noise for none."""
        level = torch.tensor(LEVELS, device=self.x0.device).repeat_interleave(len(self.x0) // len(LEVELS))[:, None, None, None]
        grey = self._errors(self.noise + (level / (1 - level)).sqrt() * self.x0).places.mean(dim=1)
        return _Errors(torch.minimum(grey, self._errors(torch.zeros_like(self.noise)).places.mean(dim=1))[:, None]).mean

    def _errors(self, eps: Tensor) -> _Errors:
        squared = (eps - self.noise).square().mean(dim=1)
        return _Errors(F.adaptive_avg_pool2d(squared, PLACES).flatten(1).double().cpu())


def _widths(config: UNetConfig) -> list[int]:
    """Channels of the levels with attention; the middle always has some."""
    levels = [int(m * config.model_channels) for m in config.channel_mult]
    return [w for i, w in enumerate(levels) if 2**i in config.attention_downsampling] + levels[-1:]


def _wirings(config: UNetConfig, undecided: Sequence[str]) -> list[UNetConfig]:
    """Every way to wire the attention that is left open; those that come to the same are one."""
    widths = _widths(config)
    heads = [config]
    if {"num_heads", "num_head_channels"} & set(undecided):
        heads += [replace(config, num_heads=n, num_head_channels=None) for n in HEADS if not any(w % n for w in widths)]
        heads += [
            replace(config, num_heads=UNetConfig.num_heads, num_head_channels=c) for c in HEAD_CHANNELS if not any(w % c for w in widths)
        ]
    orders = (False, True) if "use_new_attention_order" in undecided else (config.use_new_attention_order,)
    found: dict[tuple[Any, ...], UNetConfig] = {}
    for wiring in heads:
        for order in orders:
            counts = tuple((wiring.heads(w), wiring.heads(w, True)) for w in widths)
            same = (counts, order and any(n > 1 for pair in counts for n in pair))  # one head has no order
            found.setdefault(same, replace(wiring, use_new_attention_order=order))
    return list(found.values())


def _processes(process: DiffusionConfig, undecided: Sequence[str]) -> list[DiffusionConfig]:
    """Every process that is left open."""
    found = []
    for values in PROCESSES:
        changes: dict[str, Any] = {name: value for name, value in zip(PROCESS, values, strict=True) if name in undecided}
        tried = replace(process, **changes)
        if tried not in found:
            found.append(tried)
    return found


def _second(errors: Mapping[_Candidate, _Errors], won: _Candidate, group: str) -> _Candidate | None:
    """The best candidate that decides a group otherwise than the winner; None if nothing else fits."""

    def of(candidate: _Candidate) -> tuple[Any, ...]:
        values = {**candidate.wiring.to_dict(), **candidate.process.to_dict()}
        return tuple(values[name] for name in PROBED if group_of(name) == group)

    others = [c for c in errors if of(c) != of(won)]
    return min(others, key=lambda c: errors[c].mean, default=None)


def _in_words(candidate: _Candidate, group: str) -> str:
    wiring, process = candidate.wiring, candidate.process
    if group == "heads":
        count = f"{wiring.num_heads} heads" if wiring.num_head_channels is None else f"heads of {wiring.num_head_channels} channels"
        return f"{count}, {'new' if wiring.use_new_attention_order else 'old'} qkv order"
    if group == "schedule":
        return f"{process.schedule} {process.steps}{', rescaled' if process.rescale_timesteps and process.steps != 1000 else ''}"
    return process.objective


# --- decisions are kept ---------------------------------------------------------------------------------------------


def kept_decisions() -> Path:
    """Where decisions are kept: ``probes.json`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    root = (
        os.environ.get("BLENDED_DIFFUSION_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blended-diffusion"
    )
    return Path(root) / "probes.json"


def cache_key(digest: str, unet: UNetConfig, process: DiffusionConfig, open_settings: Sequence[str]) -> str:
    """What a decision answers: this file, with these settings open and the others as they are."""
    fixed = {k: v for k, v in {**unet.to_dict(), **process.to_dict()}.items() if k not in open_settings}
    text = json.dumps([FORMAT, sorted(open_settings), fixed], sort_keys=True)
    return f"{digest}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def load_cached(key: str) -> Probe | None:
    """An earlier decision, or None; a file that cannot be read is as good as none."""
    try:
        kept = json.loads(kept_decisions().read_text(encoding="utf-8"))[key]
        found = Probe(**kept)
        return replace(found, settings={k: found.settings[k] for k in found.settings if k in PROBED}, forwards=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save_cached(key: str, decision: Probe) -> None:
    """Keeps a decision; a folder that cannot be written costs only the next probe's time."""
    path = kept_decisions()
    try:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = {}
        kept = kept if isinstance(kept, dict) else {}
        write_bytes(path, json.dumps({**kept, key: asdict(decision)}, indent=1).encode())
    except OSError:
        return
