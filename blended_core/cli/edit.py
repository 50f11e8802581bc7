"""The run of a request: its networks, its progress, its results."""

from __future__ import annotations

import argparse
import shlex
import traceback
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from ..adm.load import load_ddpm
from ..clip.model import load_clip
from ..device import DTYPES, DeviceContext
from ..edit import edit_picture
from ..errors import BlendedError, Note, with_controls
from ..io.atomic import sha256
from ..io.folder import REPORT, SHEET
from ..io.formats import FAST
from ..io.request import Request
from ..io.results import Writer
from ..mask import EditMask
from ..options import EditOptions
from ..perceptual import load_perceptual
from ..result import EditResult
from ..sample import Models, Step, with_batch, with_scale
from .checkpoints import probe_options
from .messages import message_of, print_note, say
from .process import INTERRUPTED, keep_freed_memory, uninterrupted
from .report_input import network_files
from .request import Inputs


def run(request: Request, args: argparse.Namespace, inputs: Inputs) -> int:
    """Runs a request and writes its results. After Ctrl-C or an error, finished candidates are kept."""
    timer = inputs.timer
    options = request.options
    mask = torch.from_numpy(inputs.mask)[None, None]
    EditMask.of(mask, options.mask_rule, options.invert_mask).box()  # an empty mask is an error before networks are loaded
    if request.threads:
        torch.set_num_threads(request.threads)
    keep_memory(options)
    models = load_models(request)
    prompt = None if models.clip is None else models.clip.prompt(*request.prompts, weights=request.weights)
    request = _as_run(request, models)
    options = request.options
    command = shlex.join(["blended-diffusion", *args.argv])
    provenance = {"command": command, "inputs": inputs.sha256, "networks": _networks(request, models)}
    writer = Writer(
        args.out, request, inputs.picture, provenance, inputs.generated, args.animate, args.format, args.png_compression or FAST
    )
    folder = args.out / "candidates"
    timer.lap("load")
    picture = inputs.picture.tensor()
    timer.lap("prepare")

    error: BaseException | None = None
    told: list[Note] = []
    try:
        try:
            with tqdm(total=_step_count(options, models), unit="step", disable=None, dynamic_ncols=True, leave=False, delay=1e-3) as bar:

                def on_start(result: EditResult) -> None:
                    say(_headline(request, result))
                    result.notes.extend(networks_without_effect(request))
                    for note in result.notes:
                        print_note(note, args)
                    told.extend(result.notes)
                    bar.refresh()

                def on_step(step: Step) -> None:
                    _advance(bar, step)
                    writer.step(step)

                result = edit_picture(picture, mask, prompt, models, options, on_step, writer.candidate, on_start)
        except (KeyboardInterrupt, Exception) as caught:
            if writer.result is None or not writer.files:
                if not isinstance(caught, OSError):
                    raise
                raise BlendedError(f"{message_of(caught, args)} None of {options.candidates} candidates was finished.") from caught
            error, result = caught, writer.result
        timer.include(result.seconds)
        with uninterrupted():
            if error is not None:
                timer.lap("unfinished candidates")
                traceback.clear_frames(error.__traceback__)  # releases tensors
                # A candidate whose file was not finished is dropped.
                result.candidates = [c for c in result.candidates if c.index in writer.files]
                result.rank()
                finished = f"{len(result.candidates)} of {options.candidates} candidates were finished"
                result.notes.append(Note(f"Stopped early, {finished}. The reason: {message_of(error, args)}"))
            new_notes = [note for note in result.notes if note not in told]
            result.notes = [Note(with_controls(note, args.flags.get)) for note in result.notes]
            try:
                missing = writer.finish(result, error is not None, timer)
            except OSError as failure:
                missing = {REPORT: failure}
            _print_result(result, new_notes, args, error is not None, timer.total)
    except KeyboardInterrupt:
        if not writer.files:
            raise
        raise KeyboardInterrupt(f"stopped; {len(writer.files)} finished results are in {folder}.") from None
    count = f"{len(result.candidates)} of {options.candidates} candidates are in {folder}"
    if error is not None and not isinstance(error, KeyboardInterrupt):
        raise BlendedError(f"{message_of(error, args)} {count}{f', without {REPORT}' if REPORT in missing else ''}.") from error
    for name, cause in missing.items():
        kept = count if name == REPORT else f"the results and {REPORT} are in {args.out}"
        raise BlendedError(f"{kept}, but not the {name}: {message_of(cause, args)}") from cause
    return 0 if error is None else INTERRUPTED


def load_models(request: Request) -> Models:
    """The networks that a request needs, on its device."""
    context = DeviceContext.choose(request.device, request.dtype, request.cuda_graphs == "auto")
    with context.autograd():
        with probe_options() as probe:
            ddpm = load_ddpm(context, request.ddpm, request.overrides, probe=probe, weights=request.ddpm_weights)
        if request.checkpointing:
            ddpm.network.gradient_checkpointing = True  # type: ignore[assignment]
        exact = request.options.preset == "official" and request.clip_dtype == "auto"
        clip = load_clip(context, request.clip).in_precision("fp32" if exact else request.clip_dtype) if request.texts else None
        needs_perceptual = request.texts and request.options.guidance.needs_perceptual
        perceptual = load_perceptual(context, request.lpips) if needs_perceptual else None
    return Models(ddpm, clip, perceptual, context)


def networks_without_effect(request: Request) -> list[Note]:
    """Notes about networks, and options of networks, that were asked for and that the edit does not use."""
    guidance, prompted = request.options.guidance, bool(request.texts)
    found = []
    if request.clip != "embedded" and not prompted:
        found.append(Note(f"clip {request.clip} has no effect: there is no prompt.", option="clip"))
    if request.command == "edit" and request.lpips not in ("auto", "embedded") and not (prompted and guidance.needs_perceptual):
        found.append(Note(f"lpips {request.lpips} has no effect: the background loss is off.", option="lpips"))
    if request.checkpointing and not (prompted and guidance.gradient == "unet"):
        found.append(Note("checkpointing has no effect: no gradient is taken through the diffusion model.", option="checkpointing"))
    if request.cuda_graphs != "off" and not request.device.startswith("cuda"):
        found.append(Note(f"cuda_graphs {request.cuda_graphs} has no effect on {request.device}.", option="cuda_graphs"))
    return found


def precision_of(dtype: torch.dtype) -> str:
    """The name of a precision: 'fp32', 'bf16' or 'fp16'."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def keep_memory(options: EditOptions) -> None:
    """Keeps freed memory where the edit does not need a backward pass through the UNet.

    It saves a fifth of the time there, and costs no memory. With that backward pass it would need a third more.
    """
    if options.guidance.gradient == "x0":
        keep_freed_memory()


def _as_run(request: Request, models: Models) -> Request:
    """The request with the device, precision, batch, threads, LPIPS network and guidance scale in use, so that the report depends on no default."""
    options = replace(request.options, guidance=with_scale(request.options.guidance, models.ddpm))
    return replace(
        request,
        options=with_batch(options, models, bool(request.texts)),
        device=str(models.context.device),
        dtype=precision_of(models.context.dtype),
        clip_dtype=request.clip_dtype if models.clip is None else precision_of(models.clip.image_dtype),
        threads=torch.get_num_threads(),
        lpips=getattr(models.perceptual, "name", request.lpips),
    )


def _networks(request: Request, models: Models) -> dict[str, Any]:
    """The networks for the report; ``sha256`` has those that were used and are files."""
    used = {"ddpm": models.ddpm, "clip": models.clip, "lpips": models.perceptual}
    files = {name: file for name, file in network_files(request).items() if used[name] is not None and file.is_file()}
    config = getattr(models.ddpm.network, "config", None)
    return {
        "ddpm": {
            "file": request.ddpm,
            "unet": config.to_dict() if config is not None else None,
            "diffusion": models.ddpm.config.to_dict(),
            "guidance_scale": models.ddpm.guidance_scale,
        },
        "clip": models.clip.name if models.clip else None,
        "lpips": getattr(models.perceptual, "name", None),
        "sha256": {name: sha256(file) for name, file in files.items()},
    }


# --- what is printed --------------------------------------------------------------------------------------------------


def _headline(request: Request, result: EditResult) -> str:
    """What the run does: «a red apple» in a 64×64 region of a 84×60 picture, …"""
    subject = "«" + "» + «".join(request.texts) + "»" if request.texts else "removal (no prompt)"
    height, width = result.original.shape[-2:]
    side = getattr(result.region, "side", None)
    where = f"a {width}×{height} picture" if side is None else f"a {side}×{side} region of a {width}×{height} picture"
    precision = str(DTYPES[request.dtype]).removeprefix("torch.")
    return f"{subject} in {where}, {request.options.candidates} candidates, on {request.device}, {precision}"


def _step_count(options: EditOptions, models: Models) -> int:
    """The number of steps of all batches."""
    schedule = models.ddpm.config.respaced(options.steps)
    return -(-options.candidates // options.batch) * (schedule.start_index(options.strength) + 1)


def _advance(bar: tqdm[Any], step: Step) -> None:
    first, last = step.images[0], step.images[-1]
    bar.set_description(f"candidate {first}" if first == last else f"candidates {first}–{last}", refresh=False)
    if step.clip_distance is not None:
        bar.set_postfix(clip=f"{float(step.clip_distance.mean()):.3f}", refresh=False)
    bar.update()


def _print_result(result: EditResult, notes: list[Note], args: argparse.Namespace, interrupted: bool, seconds: float) -> None:
    say(f"{'rank':>4}  {'candidate':>9}  {'CLIP distance':>13}  {'gain':>6}  {'background':>10}  {'seam':>6}")
    for c in result.candidates:
        s = c.score
        distance = "–" if s.clip_distance is None else f"{s.clip_distance:.4f}"
        gain = "–" if s.gain is None else f"{s.gain:+.3f}"
        background = "–" if s.background_error is None else f"{s.background_error:.4g}"
        say(f"{c.rank:>4}  {c.index:>9}  {distance:>13}  {gain:>6}  {background:>10}  {s.seam_energy:>6.4f}")
    height, width = result.original.shape[-2:]
    say(f"background: difference to the original at {result.candidates[0].score.background_pixels:,} of {width * height:,} pixels")
    for note in notes:
        print_note(note, args)
    parts = ", ".join(f"{name} {value:.1f}" for name, value in result.seconds.items() if value >= 0.05)
    say(f"{'stopped after' if interrupted else 'done in'} {seconds:.1f} s ({parts})")
    say(str(next((file for file in (args.out / SHEET, args.out / REPORT) if file.exists()), args.out)), limit=None)
