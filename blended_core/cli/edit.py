"""The commands ``demo`` and ``edit``: from arguments to a request, and the run of a request."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..adm.load import load_ddpm
from ..clip.model import load_clip
from ..device import DTYPES, DeviceContext
from ..edit import Timer, edit_picture
from ..errors import BlendedError, Note, with_controls
from ..io.atomic import sha256
from ..io.images import for_format, mask_from_alpha, read_mask, read_picture, write_png
from ..io.request import MACHINE, Request
from ..io.results import REPORT, SHEET, Writer, old_results
from ..options import PRESETS, EditOptions, GuidanceOptions, declared, preset
from ..perceptual import load_perceptual
from ..result import EditResult
from ..sample import Models, Step, with_scale
from ..schedule import check_respacing
from ..toy.world import demo_scene
from .checkpoints import parse_overrides, probe_options
from .messages import message_of, print_note
from .process import INTERRUPTED, keep_freed_memory, uninterrupted
from .report_input import network_files, request_of_report

MACHINE_OPTIONS = {name for name, (declaration, _) in declared(Request).items() if declaration.group == MACHINE}
OUTPUT_ARGUMENTS = {"command", "from_report", "out", "overwrite", "animate", "format", "debug", "argv", "flags"}
"""Arguments of ``edit`` that do not change the result."""


# --- from arguments to a request --------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> int:
    """Creates a scene of the embedded world and edits it."""
    count = args.candidates
    request = Request(
        command="demo",
        image=str((args.out / "source.png").resolve()),
        mask=str((args.out / "mask.png").resolve()),
        prompts=(args.prompt,),
        weights=(1.0,),
        lpips="embedded",
        options=preset("best", steps="40", candidates=count, batch=max(1, min(count, 4)), seed=args.seed),
        **_given(args, Request),
    )
    _check_folder(args.out, "demo")
    source, mask = demo_scene(args.background, args.seed)
    # The scene is moved to the results with the report. A demo that fails must not leave it beside the report of an earlier one.
    with tempfile.TemporaryDirectory() as folder:
        generated = {"image": Path(folder, "source.png"), "mask": Path(folder, "mask.png")}
        write_png(generated["image"], source)
        write_png(generated["mask"], mask)
        return run(request, args, generated)


def edit(args: argparse.Namespace) -> int:
    """Edits a picture, or repeats the run of a report."""
    request = request_of_arguments(args) if args.from_report is None else _repeated(args)
    _check_folder(args.out, None if args.overwrite else "edit")
    return run(request, args)


def request_of_arguments(args: argparse.Namespace) -> Request:
    """The request of an ``edit`` command line without ``--from``."""
    if args.image is None:
        raise BlendedError("no picture was given; write: blended-diffusion edit IMAGE --mask MASK --prompt TEXT")
    if args.prompts is None:
        raise BlendedError("no prompt was given; add --prompt TEXT, or --prompt '' to remove what the mask covers.")
    given = _given(args, Request)
    if given.get("ddpm", "embedded") != "embedded":
        given["ddpm"] = str(Path(given["ddpm"]).expanduser().resolve())
    if "clip" in given:
        given["clip"] = _with_full_path(given["clip"])
    return Request(
        command="edit",
        image=str(args.image.resolve()),
        mask=str(args.mask.resolve()) if args.mask else None,
        prompts=tuple(args.prompts),
        weights=tuple(args.weights or [1.0] * len(args.prompts)),
        overrides=parse_overrides(args.overrides or ()),
        options=options_of_arguments(args),
        **given,
    )


def _repeated(args: argparse.Namespace) -> Request:
    """The request of a report; the command line may change the machine only."""
    request = request_of_report(args.from_report)
    given = {name for name, value in vars(args).items() if value is not None and name not in OUTPUT_ARGUMENTS}
    if settings := sorted(args.flags.get(name, name.upper()) for name in given - MACHINE_OPTIONS):
        raise BlendedError(f"--from repeats a run with its own settings; leave out {', '.join(settings)}.")
    # The command is 'edit' for the report of a demo too. Otherwise a later demo would replace the results as its own.
    return replace(request, command="edit", **{name: getattr(args, name) for name in given})


def options_of_arguments(args: argparse.Namespace) -> EditOptions:
    """The options of an ``edit`` command line: a preset and the changes to it."""
    changes = {**_given(args, EditOptions), **_given(args, GuidanceOptions)}
    name = args.preset or "best"
    if args.skip is not None:
        if args.strength is not None:
            raise BlendedError("--skip and --strength set the same value; give one of them.")
        steps = changes.get("steps", PRESETS[name].steps)
        check_respacing(steps)
        # The numbers in the text. Whether the process of the model is long enough is checked when the model is loaded.
        total = sum(int(count) for count in steps.strip().removeprefix("ddim").split(","))
        if not 0 <= args.skip < total:
            raise BlendedError(f"--skip is {args.skip} of {total} steps; give 0 to {total - 1}.")
        changes["strength"] = (total - args.skip) / total
    return preset(name, **changes)


def _given(args: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """The arguments that were given for the options of a class."""
    return {name: value for name in declared(kind) if (value := getattr(args, name, None)) is not None}


def _with_full_path(clip: str) -> str:
    """MODEL:FILE or FILE with the full path of the file, so that a report can be repeated in any folder; MODEL:TAG unchanged."""
    if Path(clip).expanduser().is_file():
        return str(Path(clip).expanduser().resolve())
    model, colon, weights = clip.partition(":")
    file = Path(weights).expanduser()
    return f"{model}:{file.resolve()}" if colon and file.is_file() else clip


def _check_folder(out: Path, command: str | None) -> None:
    """Raises BlendedError if the folder holds the results of another run. ``demo`` may replace a demo; None may replace any results."""
    if out.exists() and not out.is_dir():
        raise BlendedError(f"--out {out} is a file; name a folder.")
    report = out / REPORT
    if command is None or not (report.exists() or old_results(out)):
        return
    if command == "demo":
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(report.read_text("utf-8"))["request"]["command"] == "demo":
                return
    advice = "." if command == "demo" else ", or add --overwrite."
    raise BlendedError(f"{out} already holds the results of a run; choose another --out{advice}")


# --- the run ----------------------------------------------------------------------------------------------------------


def run(request: Request, args: argparse.Namespace, generated: Mapping[str, Path] | None = None) -> int:
    """Runs a request and writes its results. After Ctrl-C or an error, finished candidates are kept.

    ``generated`` are temporary files of the picture and the mask that are moved to the paths in the request with the results.
    """
    timer = Timer()
    files = generated or {key: Path(path) for key in ("image", "mask") if (path := getattr(request, key))}
    _check_inputs(files, args.out)
    picture = read_picture(files["image"])
    mask = read_mask(files["mask"], picture.size, picture.notes) if "mask" in files else mask_from_alpha(picture)
    picture = for_format(picture, args.format)
    # Hashed now: the files may change during the run.
    inputs = {key: sha256(files[key]) if key in files else None for key in ("image", "mask")}
    for note in picture.notes:
        print_note(note, args)
    if request.threads:
        torch.set_num_threads(request.threads)
    keep_memory(request.options)
    models = load_models(request)
    prompt = None if models.clip is None else models.clip.prompt(*request.prompts, weights=request.weights)
    request = _as_run(request, models)
    command = shlex.join(["blended-diffusion", *args.argv])
    provenance = {"command": command, "inputs": inputs, "networks": _networks(request, models)}
    writer = Writer(args.out, request, picture, provenance, generated, args.animate, args.format)
    timer.lap("load")

    error: BaseException | None = None
    told: list[Note] = []
    try:
        try:
            with tqdm(
                total=_step_count(request.options, models), unit="step", disable=None, dynamic_ncols=True, leave=False, delay=1e-3
            ) as bar:

                def on_start(result: EditResult) -> None:
                    print(_headline(request, result))
                    result.notes.extend(networks_without_effect(request))
                    for note in result.notes:
                        print_note(note, args)
                    told.extend(result.notes)
                    bar.refresh()

                def on_step(step: Step) -> None:
                    _advance(bar, step)
                    writer.step(step)

                result = edit_picture(picture.tensor(), mask, prompt, models, request.options, on_step, writer.candidate, on_start)
        except (KeyboardInterrupt, Exception) as caught:
            if writer.result is None or not writer.files:
                raise
            error, result = caught, writer.result
        timer.include(result.seconds)
        with uninterrupted():
            if error is not None:
                timer.lap("unfinished candidates")
                traceback.clear_frames(error.__traceback__)  # releases tensors
                # A candidate whose file was not finished is dropped.
                result.candidates = [c for c in result.candidates if c.index in writer.files]
                result.rank()
                finished = f"{len(result.candidates)} of {request.options.candidates} candidates were finished"
                result.notes.append(Note(f"Stopped early, {finished}. The reason: {message_of(error, args)}"))
            new_notes = [note for note in result.notes if note not in told]
            result.notes = [Note(with_controls(note, args.flags.get)) for note in result.notes]
            missing = writer.finish(result, error is not None, timer)
            _print_result(result, new_notes, args, error is not None, timer.total)
    except KeyboardInterrupt:
        if not writer.files:
            raise
        raise KeyboardInterrupt(f"stopped; {len(writer.files)} finished results are in {args.out / 'candidates'}.") from None
    if error is not None and not isinstance(error, KeyboardInterrupt):
        raise error
    for name, cause in missing.items():
        raise BlendedError(f"the results and {REPORT} are in {args.out}, but not the {name}: {message_of(cause, args)}") from cause
    return 0 if error is None else INTERRUPTED


def _check_inputs(files: Mapping[str, Path], out: Path) -> None:
    """Raises BlendedError if the run would replace one of its inputs: its report could not be repeated."""
    replaced = {path.resolve() for path in (*old_results(out), out / SHEET, out / REPORT)}
    for name, file in files.items():
        if file.resolve() in replaced:
            raise BlendedError(
                f"the {name} {file} is one of the results in {out} that this run replaces; copy it, or choose another --out."
            )


def load_models(request: Request) -> Models:
    """The networks that a request needs, on its device."""
    context = DeviceContext.choose(request.device, request.dtype)
    with context.autograd():
        with probe_options() as probe:
            ddpm = load_ddpm(context, request.ddpm, request.overrides, probe=probe, weights=request.ddpm_weights)
        if request.checkpointing:
            ddpm.network.gradient_checkpointing = True  # type: ignore[assignment]
        clip = load_clip(context, request.clip) if request.texts else None
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
    return found


def precision_of(context: DeviceContext) -> str:
    """The name of a context's precision: 'fp32', 'bf16' or 'fp16'."""
    return next(name for name, dtype in DTYPES.items() if dtype == context.dtype)


def keep_memory(options: EditOptions) -> None:
    """Keeps freed memory where the edit does not need a backward pass through the UNet.

    It saves a fifth of the time there, and costs no memory. With that backward pass it would need a third more.
    """
    if options.guidance.gradient == "x0":
        keep_freed_memory()


def _as_run(request: Request, models: Models) -> Request:
    """The request with the device, precision, threads, LPIPS network and guidance scale in use, so that the report depends on no default."""
    return replace(
        request,
        options=replace(request.options, guidance=with_scale(request.options.guidance, models.ddpm)),
        device=str(models.context.device),
        dtype=precision_of(models.context),
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
    print(f"{'rank':>4}  {'candidate':>9}  {'CLIP distance':>13}  {'gain':>6}  {'background':>10}  {'seam':>6}")
    for c in result.candidates:
        s = c.score
        distance = "–" if s.clip_distance is None else f"{s.clip_distance:.4f}"
        gain = "–" if s.gain is None else f"{s.gain:+.3f}"
        background = "–" if s.background_error is None else f"{s.background_error:.4g}"
        print(f"{c.rank:>4}  {c.index:>9}  {distance:>13}  {gain:>6}  {background:>10}  {s.seam_energy:>6.4f}")
    height, width = result.original.shape[-2:]
    print(f"background: difference to the original at {result.candidates[0].score.background_pixels:,} of {width * height:,} pixels")
    for note in notes:
        print_note(note, args)
    parts = ", ".join(f"{name} {value:.1f}" for name, value in result.seconds.items() if value >= 0.05)
    print(f"{'stopped after' if interrupted else 'done in'} {seconds:.1f} s ({parts})")
    print(args.out / SHEET if (args.out / SHEET).exists() else args.out / REPORT)
