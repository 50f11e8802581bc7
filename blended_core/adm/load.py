"""Diffusion models from checkpoint files.

The network of a file is detected from names and shapes, built on the meta device, compared with the file name by name, and filled one tensor after the
other, so loading needs the memory of the network once. Nothing that a file may carry is run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..denoiser import DiffusionModel
from ..device import DeviceContext
from ..errors import BlendedError, BlendedWarning
from ..io.atomic import sha256
from ..paths import expanded
from ..toy.models import DDPM
from ..weights.open import WeightsFile, file_errors, json_object, open_weights, raw_names, read_sidecar
from ..weights.sets import MAX_NAME_SHOWN
from ..weights.tensors import SkipInitialization, copy_finite
from .cache import cache_key, load_cached, save_cached
from .detect import ADVICE, ANCHOR, Detection, detect, table_of
from .probe import DEFAULT_PROBE, PROBED_SETTINGS, ProbeOptions, attention_widths, run_probe
from .unet import UNet, UNetConfig

MAX_NAMES = 4
"""Tensors that an error lists by name."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model, how each of its settings was decided, and its file."""

    model: DiffusionModel
    detection: Detection
    path: Path


def load_ddpm(
    context: DeviceContext,
    path: Path | str = "embedded",
    overrides: Mapping[str, Any] | None = None,
    *,
    probe: ProbeOptions | None = DEFAULT_PROBE,
    weights: str = "",
) -> DiffusionModel:
    """The model of :func:`load_checkpoint`."""
    return load_checkpoint(context, path, overrides, probe=probe, weights=weights).model


def load_checkpoint(
    context: DeviceContext,
    path: Path | str = "embedded",
    overrides: Mapping[str, Any] | None = None,
    *,
    probe: ProbeOptions | None = DEFAULT_PROBE,
    weights: str = "",
) -> Checkpoint:
    """A diffusion model from a checkpoint, on the device and in the precision of the context, frozen.

    Settings that neither the file nor its family determines are decided by the calibration probe (:mod:`~blended_core.adm.probe`), once for each file:
    the decision is cached.

    Args:
        context: where and in which precision the model runs.
        path: 'embedded', or a file as for :func:`open_weights`. Names may have any prefix.
        overrides: settings by the names of :class:`UNetConfig` and :class:`DiffusionConfig` or by guided-diffusion's flags. They take precedence over
            the metadata of a safetensors file, and that over a sidecar (``model.json`` beside ``model.pt``).
        probe: how the probe runs; with a picture, a cached decision is not used. None keeps guesses.
        weights: name of a set of weights in the file, as ``Detection.sets`` and ``inspect`` list them, such as 'model' or 'ema'. By default
            averaged weights (EMA) are preferred.

    Raises:
        BlendedError: if the file is absent or damaged, holds anything but an ADM network for RGB images, does not match the network in every name
            and shape, has values that are not finite, or no set of weights with that name.

    Warns:
        BlendedWarning: before the probe runs, if its decision is unsure, and if settings that change results are guessed.
    """
    path = _resolved(path)
    with file_errors(path, "ddpm"), context.autograd():
        file = open_weights(path, ADVICE)
        detection, unet = _network(file, overrides, weights)
        unet.set_compute_dtype(context.dtype)
        digest = sha256(path) if detection.guessed and probe is not None else ""
        detection = detection.decided(detection.known_settings(digest), "file")
        state = {}
        for name, parameter in unet.state_dict().items():
            tensor = file.take(detection.weights.names[name])
            state[name] = copy_finite(tensor, name, parameter.dtype, context.channels_last).to(context.device)
        unet.load_state_dict(state, assign=True)
        context.place(unet)
        if probe is not None and set(detection.open_settings) & set(PROBED_SETTINGS):
            detection = _probed(unet, detection, digest, probe, path)
            context.place(unet)
        model = DiffusionModel.from_unet(unet.rewire(detection.unet), detection.diffusion, detection.guidance_scale)
    for warning in _doubts(detection, path):
        warnings.warn(warning, stacklevel=2)
    return Checkpoint(model, detection, path)


def inspect_checkpoint(path: Path | str = "embedded", overrides: Mapping[str, Any] | None = None, *, weights: str = "") -> Detection:
    """The detection of :func:`load_checkpoint` without a probe, and its errors about names, shapes and settings. Reads no tensor."""
    path = _resolved(path)
    with file_errors(path, "ddpm"):
        return _network(open_weights(path, ADVICE), overrides, weights)[0]


def may_be_checkpoint(path: Path) -> bool:
    """False for files that certainly hold no complete ADM network, by the names in their first megabytes; True if that is unknown."""
    names = raw_names(path)
    return names is None or (ANCHOR.encode() in names and b"output_blocks" in names)


def _resolved(path: Path | str) -> Path:
    """The file of a checkpoint that is named by a path or as 'embedded'."""
    if path != "embedded":
        return expanded(path)
    if not DDPM.is_file():
        raise BlendedError(
            f"the embedded weights {DDPM.name} are not part of this installation; install it again, or use a checkpoint file.",
            option="ddpm",
        )
    return DDPM


def _network(file: WeightsFile, overrides: Mapping[str, Any] | None, weights: str) -> tuple[Detection, UNet]:
    """The detection, and the network on the meta device, after all checks that need no tensor."""
    groups = {"unet", "diffusion"} & file.metadata.keys()
    metadata: dict[str, Any] = {group: json_object(file.metadata[group], f"its metadata {group!r}") for group in groups}
    if "guidance_scale" in file.metadata:
        metadata["guidance_scale"] = file.metadata["guidance_scale"]
    detection = detect(file.shapes, overrides, metadata, read_sidecar(file.path), weights)
    unet = _unet_without_weights(detection.unet)
    _check_shapes(unet, table_of(file.shapes, detection.weights))
    file.check_size(detection.weights.names[name] for name in unet.state_dict())
    return detection, unet


def _unet_without_weights(config: UNetConfig) -> UNet:
    with torch.device("meta"), SkipInitialization():
        return UNet(config)


def _check_shapes(unet: UNet, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """BlendedError unless the names and shapes are those of the network. What a file counts beside them (betas, a number of steps) is left out."""
    expected = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    complaints = []
    for verdict, names in (
        ("missing", [name for name in expected if name not in shapes]),
        ("surplus", [name[:MAX_NAME_SHOWN] for name, shape in shapes.items() if name not in expected and not _beside(name, shape)]),
        (
            "of another shape",
            [f"{name} {shapes[name]} instead of {shape}" for name, shape in expected.items() if shapes.get(name, shape) != shape],
        ),
    ):
        if names:
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            complaints.append(f"{verdict}: {', '.join(names[:MAX_NAMES])}{more}")
    if complaints:
        raise BlendedError(
            f"it resembles an ADM network but differs in some tensors; {'; '.join(complaints)}. It is damaged, one of several parts, or an unknown "
            "variant: use the original file."
        )


def _beside(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is certainly no weight of an ADM network: a single number, or a vector outside of all blocks."""
    return math.prod(shape) <= 1 or ("." not in name and len(shape) == 1)


def _probed(unet: UNet, detection: Detection, digest: str, options: ProbeOptions, path: Path) -> Detection:
    """The detection with its open settings decided by the probe or by the cache."""
    wanted = [name for name in detection.open_settings if name in PROBED_SETTINGS]
    # Another set of weights in the same file may belong to another network.
    own = digest if detection.weights == detection.sets[0] else f"{digest}.{detection.weights.name}"
    key = cache_key(own, detection.unet, detection.diffusion, wanted)
    result = load_cached(key, options.cache) if options.picture is None else None
    if result is None or set(result.settings) != set(wanted) or not _possible(detection.unet, result.settings):
        warnings.warn(
            BlendedWarning(f"{path.name} does not state its {', '.join(wanted)}; the calibration probe determines them, once."),
            stacklevel=3,
        )
        result = run_probe(unet, detection.diffusion, wanted, options)
        save_cached(key, result, options.cache)
    return replace(detection.decided(result.settings, "probe"), probe=result)


def _possible(config: UNetConfig, settings: Mapping[str, Any]) -> bool:
    """Whether a network can have settings from the cache, a file that other programs may have changed."""
    changed = replace(config, **{name: value for name, value in settings.items() if name in config.to_dict()})
    try:
        return all(changed.heads(width, upsample) > 0 for width in attention_widths(changed) for upsample in (False, True))
    except BlendedError:
        return False


def _doubts(detection: Detection, path: Path) -> list[BlendedWarning]:
    """Warnings about settings that may be wrong."""
    probe, doubts = detection.probe, []
    similar = "give the probe a picture similar to the training images"
    if probe is not None and probe.uninformative:
        doubts.append(
            BlendedWarning(
                f"{path.name}: the network does not predict noise under any setting (error {probe.error:.3f}, trivial error "
                f"{probe.trivial_error:.3f}), so the decisions of the probe mean little. The file may hold an untrained network, or one for very "
                f"different images: {similar}.",
                option="probe_picture",
            )
        )
    elif probe is not None and probe.unsure:
        close = "; ".join(f"{group} ({probe.margins[group]:.2f} times better than {rival})" for group, rival in probe.unsure.items())
        doubts.append(
            BlendedWarning(
                f"{path.name}: the probe is not sure about {close}. If the results are only noise or wrong colors, set these yourself, or {similar}.",
                option=("overrides", "probe_picture"),
            )
        )
    if detection.guessed:
        guesses = ", ".join(f"{name} {detection.settings[name][0]}" for name in detection.guessed)
        family = "no known family" if detection.family is None else f"a family whose members differ ({detection.family})"
        doubts.append(
            BlendedWarning(
                f"{path.name} belongs to {family}, and its weights do not determine every setting. Guessed: {guesses}. If the results are only "
                "noise or wrong colors, set these yourself.",
                option="overrides",
            )
        )
    return doubts
