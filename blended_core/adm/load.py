"""Diffusion checkpoints from files, without running anything that a file may carry.

A file is opened (:func:`inspect_checkpoint` stops after its table of names and shapes), its network is detected, built on
the meta device, compared with the file name by name, and filled one tensor after the other, so that loading needs the
network's memory once.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..device import DeviceContext
from ..diffusion import DiffusionModel
from ..errors import BlendedError, BlendedWarning
from ..io.atomic import sha256
from ..toy.models import DDPM
from .detect import ANCHOR, WANTED, Detection, detect, settings_of_file, strip_prefix
from .probe import DEFAULT_PROBE, PROBED, ProbeOptions, cache_key, load_cached, probe, save_cached
from .unet import UNet, UNetConfig

ZIP = b"PK\x03\x04"  # how torch.save's present format begins; the older one is a pickle, which cannot be mapped
NAMES = 1 << 23  # bytes at the beginning of a file, in which the names of its tensors stand
DEPTH = 8  # dictionaries and lists inside each other, at most
NAMED = 4  # keys that an error names


@dataclass(frozen=True)
class CheckpointFile:
    """An opened file: the shape of each tensor by its name, the settings in its metadata, and a way to the tensors.

    ``take`` gives a tensor on the CPU, once: a file that had to be read as a whole is let go of piece by piece.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, Any]
    take: Callable[[str], Tensor]


def load_ddpm(
    context: DeviceContext,
    path: Path | str = "embedded",
    overrides: Mapping[str, Any] | None = None,
    *,
    trial: ProbeOptions | None = DEFAULT_PROBE,
) -> DiffusionModel:
    """A diffusion model from a checkpoint, on the context's device, in its precision, frozen.

    What neither the file nor its family tells is found out by the calibration probe, once for each file: the decision is kept
    in the user's cache folder (:mod:`blended_core.adm.probe`).

    Args:
        context: where and in which precision it runs.
        path: 'embedded', or a file: safetensors, or what torch.save wrote (in either of its formats): a state dict, or one
            inside dictionaries and lists, under any prefix; averaged weights (ema) are preferred.
        overrides: settings that are known better than the file tells, by the names of :class:`UNetConfig` and
            :class:`DiffusionConfig` or guided-diffusion's flags. They win over the metadata of a safetensors file, and that
            over a sidecar (``model.json`` beside ``model.pt``).
        trial: how the probe is run; a kept decision is not used if it comes with a picture. None leaves open settings at a guess.

    Returns:
        The model; ``model.found`` says how each setting was decided.

    Raises:
        BlendedError: if the file is absent, damaged, something else than an ADM network for RGB pictures, does not match its
            description in every key, or holds values that are not finite.

    Warns:
        BlendedWarning: before the probe runs; if it could hardly decide; if settings that change the pictures had to be guessed.
    """
    file = open_checkpoint(path)
    with _about(file.path), context.autograd():
        found = _detect(file, overrides)
        unet = _blueprint(found.unet).set_compute_dtype(context.dtype)
        _compare(unet, strip_prefix(file.shapes, found.prefix))
        digest = sha256(file.path) if found.guessed and trial is not None else ""
        found = found.decided(settings_of_file(found, digest), "file")
        state = {}
        for name, parameter in unet.state_dict().items():
            state[name] = _weights(file.take(found.prefix + name), name, parameter.dtype, context.channels_last).to(context.device)
        unet.load_state_dict(state, assign=True)
        context.place(unet)
        if trial is not None and set(found.open_settings) & set(PROBED):
            found = _probed(unet, found, digest, trial, file.path)
            context.place(unet)
        model = DiffusionModel.from_unet(unet.rewire(found.unet), found.diffusion)
        model.found = found
    _warn(found, file.path)
    return model


def _probed(unet: UNet, found: Detection, digest: str, trial: ProbeOptions, path: Path) -> Detection:
    """Open settings by the probe, or by what it decided before."""
    wanted = [name for name in found.open_settings if name in PROBED]
    key = cache_key(digest, found.unet, found.diffusion, wanted)
    decision = load_cached(key) if trial.picture is None else None
    if decision is None or set(decision.settings) != set(wanted):
        warnings.warn(f"{path.name} does not tell its {', '.join(wanted)}; finding out by trying, once.", BlendedWarning, stacklevel=4)
        decision = probe(unet, found.diffusion, wanted, trial)
        save_cached(key, decision)
    return replace(found.decided(decision.settings, "probe"), probe=decision)


def _warn(found: Detection, path: Path) -> None:
    """Of what stays unsure."""
    if found.probe is not None and found.probe.clueless:
        warnings.warn(
            f"{path.name}: under none of the settings does the network know noise (error {found.probe.error:.3f}, answering nothing has {found.probe.blind:.3f}), so "
            "what was found by trying says little; the file may hold an untrained network, or one for pictures of quite another kind: "
            "let the probe try one of those (blended-diffusion inspect --picture).",
            BlendedWarning,
            stacklevel=3,
        )
    elif found.probe is not None and found.probe.unsure:
        close = "; ".join(
            f"{group} ({found.probe.margins[group]:.2f} times better than {rival})" for group, rival in found.probe.unsure.items()
        )
        warnings.warn(
            f"{path.name}: trying the settings hardly decided {close}. If the pictures are only noise or colours, set these, or let "
            "the probe try a picture of the kind that the model draws (blended-diffusion inspect --picture).",
            BlendedWarning,
            stacklevel=3,
        )
    if found.guessed:
        guesses = ", ".join(f"{name} {found.settings[name][0]}" for name in found.guessed)
        what = "is of no known family" if found.family is None else f"belongs to a family that differs in some settings ({found.family})"
        warnings.warn(
            f"{path.name} {what}, and its weights do not tell everything: guessed are {guesses}. If the pictures are only "
            "noise or colours, set these.",
            BlendedWarning,
            stacklevel=3,
        )


def inspect_checkpoint(path: Path | str = "embedded", overrides: Mapping[str, Any] | None = None) -> Detection:
    """What :func:`load_ddpm` would take the file for, without reading the weights; it raises the same errors as far as
    names, shapes and settings go."""
    file = open_checkpoint(path)
    with _about(file.path):
        found = _detect(file, overrides)
        _compare(_blueprint(found.unet), strip_prefix(file.shapes, found.prefix))
    return found


def _detect(file: CheckpointFile, overrides: Mapping[str, Any] | None) -> Detection:
    return detect(file.shapes, overrides, file.metadata, _sidecar(file.path))


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """Puts the file's name before an error about what is in it."""
    try:
        yield
    except BlendedError as error:
        raise BlendedError(f"{path.name}: {error}") from None


# --- files ----------------------------------------------------------------------------------------------------------


def open_checkpoint(path: Path | str) -> CheckpointFile:
    """The table of a file's tensors; the kind of file is told by its first bytes, then by its name.

    Raises:
        BlendedError: if the file is absent, damaged, no checkpoint, or would have to run code to be read.
    """
    if path == "embedded":
        path = DDPM
        if not path.is_file():
            raise BlendedError(
                f"the embedded weights {path.name} are not in this installation; install it again, or name a checkpoint file."
            )
    path = Path(path).expanduser()
    if (path / "model_index.json").is_file() or (path / "unet" / "config.json").is_file():
        raise BlendedError(f"{path} is a folder of the diffusers library, whose networks are laid out otherwise. {WANTED}")
    if path.is_dir():
        raise BlendedError(f"{path} is a folder; name the checkpoint file in it.")
    if not path.exists():
        raise BlendedError(f"there is no checkpoint {path}; check the name, or use 'embedded'.")
    try:
        with path.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise BlendedError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not start:
        raise BlendedError(f"{path} is empty; fetch it again.")
    if start.startswith(b"version https://git-lfs"):
        raise BlendedError(f"{path} is only a pointer of Git LFS, not the weights; fetch them with `git lfs pull`.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise BlendedError(f"{path} is a web page, not a checkpoint: the download was answered with an error or a form; fetch it again.")
    if path.suffix.lower() == ".safetensors" or start[8:9] == b"{":
        return _open_safetensors(path)
    return _open_torch(path, start)


def may_be_checkpoint(path: Path) -> bool:
    """False for files that surely hold no whole ADM network: no name of its tensors stands where names stand in such files.

    A quick look, at most some megabytes; what cannot be told is True, and :func:`load_ddpm` says what it is.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
            if path.suffix.lower() == ".safetensors":
                names = stream.read(min(int.from_bytes(start, "little"), NAMES))
            elif start.startswith(ZIP):
                with zipfile.ZipFile(stream) as archive:
                    pickles = [n for n in archive.namelist() if n.endswith("data.pkl")]
                    with archive.open(pickles[0]) as inner:
                        names = inner.read(NAMES)
            else:
                names = start + stream.read(NAMES)
    except (OSError, ValueError, IndexError, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
        return True
    return ANCHOR.encode() in names and b"output_blocks" in names


def _open_safetensors(path: Path) -> CheckpointFile:
    try:
        file: Any = safe_open(str(path), framework="pt", device="cpu")
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
        texts = file.metadata() or {}
    except Exception as error:  # the library raises its own exception, and others for what a damaged header claims
        raise BlendedError(f"{path} is no whole safetensors file ({_first_line(error)}); fetch it again.") from None
    metadata = {}
    with _about(path):
        for group in {"unet", "diffusion"} & texts.keys():
            metadata[group] = _json_object(texts[group], f"its metadata {group!r}")

    def take(key: str) -> Tensor:
        try:
            tensor: Tensor = file.get_tensor(key)
        except Exception as error:  # as above
            raise BlendedError(f"{key} cannot be read ({_first_line(error)}); fetch the file again.") from None
        return tensor

    return CheckpointFile(path, shapes, metadata, take)


def _open_torch(path: Path, start: bytes) -> CheckpointFile:
    try:
        # weights_only: an unpickler that builds tensors and plain containers, and refuses everything else.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's age; an error tells what matters
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=start.startswith(ZIP))
    except Exception as error:  # a damaged or malicious pickle can raise nearly anything
        raise BlendedError(_unreadable(path, start, error)) from None
    tensors = _flatten(content)
    if not tensors and isinstance(content, Mapping) and "param_groups" in content:
        raise BlendedError(
            f"{path.name}: it is the state of an optimizer, not a network. Use the file with the weights that lies beside it."
        )
    if not tensors:
        raise BlendedError(f"{path.name}: it holds no tensors, only a {type(content).__name__}. {WANTED}")
    del content  # so that taking a tensor out of the table frees it
    return CheckpointFile(path, {key: tuple(value.shape) for key, value in tensors.items()}, {}, tensors.pop)


def _unreadable(path: Path, start: bytes, error: Exception) -> str:
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"{path} does not fit into memory, or is damaged and claims an absurd size; free memory or fetch it again."
    match = re.search(r"GLOBAL ([\w.]+)", text)
    name = match[1].rstrip(".") if match else ""
    if name.startswith(("torch_utils.", "dnnlib.")) or b"torch_utils.persistence" in start:
        return f"{path} is a pickle of EDM or StyleGAN, which carries program code and is not run here. {WANTED}"
    cut = any(whole.startswith(name) for whole in ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch.FloatStorage"))
    if (name and not cut) or (start[:1] == b"\x80" and "Unsupported operand" in text):
        run = f"run {name}" if name else "build objects"
        return (
            f"{path} holds more than tensors: reading it would {run}, which a malicious file could misuse, so it is refused. Where "
            "you trust it, save its state dict alone, best as safetensors, and use that."
        )
    # What PyTorch says at length about its own switch would lead a person to turn the protection off.
    reason = "its pickle is damaged" if "Weights only load failed" in text else _first_line(error)
    return f"{path} is no whole checkpoint of PyTorch ({reason}); fetch it again, or use a .safetensors or .pt file."


def _flatten(content: object) -> dict[str, Tensor]:
    """All tensors in nested dictionaries and lists, their way there joined by dots: 'ema.module.out.2.bias'.

    So a wrapping dictionary is one prefix more. Each container is visited once, whatever refers to it.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()

    def visit(item: object, name: str, depth: int) -> None:
        if isinstance(item, Tensor):
            tensors.setdefault(name, item)
        elif isinstance(item, (Mapping, list, tuple)) and id(item) not in seen and depth <= DEPTH:
            seen.add(id(item))
            pairs = item.items() if isinstance(item, Mapping) else enumerate(item)
            for key, value in pairs:
                visit(value, f"{name}.{key}" if depth else str(key), depth + 1)

    visit(content, "", 0)
    return tensors


def _sidecar(path: Path) -> dict[str, Any]:
    """The settings in FILE.json beside FILE.pt, if there is one."""
    sidecar = path.with_suffix(".json")
    if sidecar == path or not sidecar.is_file():
        return {}
    try:
        text = sidecar.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BlendedError(f"its sidecar {sidecar.name} cannot be read ({_first_line(error)}); mend or remove it.") from None
    return _json_object(text, f"its sidecar {sidecar.name}")


def _json_object(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BlendedError(f"{what} is no JSON ({_first_line(error)}); mend or remove it.") from None
    if not isinstance(value, dict):
        raise BlendedError(f"{what} must be a JSON object of settings, not a {type(value).__name__}; mend or remove it.")
    return value


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__


# --- networks -------------------------------------------------------------------------------------------------------


def _blueprint(config: UNetConfig) -> UNet:
    """The network without memory for its weights."""
    with torch.device("meta"), _NoDraws():
        return UNet(config)


FILLS = frozenset({"normal_", "uniform_", "kaiming_uniform_", "zero_", "fill_"})
"""What torch's layers and ours call for their initial values."""


class _NoDraws(TorchFunctionMode):
    """Leaves out initial values, which the file's replace: on the meta device drawing them imports a compiler, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _compare(unet: UNet, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises BlendedError unless names and shapes are the network's, all of them and no others."""
    expected = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    complaints = []
    for verdict, names in (
        ("missing", [name for name in expected if name not in shapes]),
        ("surplus", [name for name in shapes if name not in expected]),
        (
            "of another shape",
            [f"{name} {shapes[name]} instead of {shape}" for name, shape in expected.items() if shapes.get(name, shape) != shape],
        ),
    ):
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            complaints.append(f"{verdict}: {', '.join(names[:NAMED])}{more}")
    if complaints:
        raise BlendedError(
            f"it is nearly an ADM network, but not quite; {'; '.join(complaints)}. It is damaged or a variant that this package does "
            "not know: fetch the original file."
        )


def _weights(tensor: Tensor, name: str, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """A copy that no longer depends on the file, in the precision and layout that the network wants."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
        raise BlendedError(
            f"{name} holds no plain floating-point numbers ({tensor.dtype}); quantised files are not supported: use the original."
        )
    values = tensor.detach()
    layout = torch.channels_last if channels_last and values.ndim == 4 else torch.contiguous_format
    out = torch.empty(values.shape, dtype=dtype, memory_format=layout)
    low, high = 0.0, 0.0
    rows = max(1, AT_ONCE * len(values) // values.numel())
    for begin in range(0, len(values), rows):
        where = slice(begin, begin + rows)
        # Of float64 as it is: a value that is too large for float32 is not infinite.
        part = values[where] if values.dtype == torch.float64 else values[where].to(torch.float32)
        # The extremes tell of NaN and infinity in one vectorised pass over what the copy is about to read.
        least, most = (float(v) for v in part.aminmax())
        if not (math.isfinite(least) and math.isfinite(most)):
            bad = int((~values.to(torch.float32).isfinite()).sum())
            raise BlendedError(
                f"{bad} of the {values.numel()} values of {name} are not finite (NaN or infinite); the file is damaged: fetch it again."
            )
        low, high = min(low, least), max(high, most)
        out[where].copy_(part)
    if max(-low, high) > torch.finfo(dtype).max:
        raise BlendedError(f"{name} has values up to {max(-low, high):.3g}, too large for {dtype}; use bf16 or fp32.")
    return out


AT_ONCE = 2**18
"""Values that are looked at and copied together: they stay in the processor's cache, so that looking takes next to no time."""
