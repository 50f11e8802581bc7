"""The commands ``demo`` and ``edit`` until the run begins: from arguments to a request, its pictures, and its folder.

Every input that is wrong in itself is refused here, before torch is imported and networks are loaded; what is wrong without a look into a picture,
before numpy and Pillow are.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BlendedError, Note
from ..io.atomic import check_file, sha256
from ..io.folder import REPORT, SHEET, claimed, old_results, replaced_files
from ..io.request import MACHINE, Request
from ..options import EditOptions, GuidanceOptions, declared, preset
from ..paths import absolute, expanded
from ..respacing import LOG_SNR
from ..timer import Timer
from .messages import print_note
from .report_input import request_of_report

if TYPE_CHECKING:
    from ..io.images import Float32, Picture

MACHINE_OPTIONS = {name for name, (declaration, _) in declared(Request).items() if declaration.group == MACHINE}
OUTPUT_ARGUMENTS = {"command", "from_report", "out", "overwrite", "animate", "format", "png_compression", "debug", "argv", "flags"}
"""Arguments of ``edit`` that do not change the result."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """The picture and the mask [H, W] in 0..1 of a run.

    Attributes:
        timer: runs since the command began.
        sha256: of the files 'image' and 'mask', which may change during the run; None where there is none.
        generated: temporary files of the picture and the mask that are moved to the paths in the request with the results.
    """

    picture: Picture
    mask: Float32
    timer: Timer
    sha256: Mapping[str, str | None]
    generated: Mapping[str, Path] = field(default_factory=dict)


def demo(args: argparse.Namespace, timer: Timer) -> int:
    """Creates a scene of the embedded world and edits it."""
    count = args.candidates
    scene = {"image": args.out / "source.png", "mask": args.out / "mask.png"}
    request = Request(
        command="demo",
        image=str(absolute(scene["image"])),
        mask=str(absolute(scene["mask"])),
        prompts=(args.prompt,),
        weights=(1.0,),
        lpips="embedded",
        options=preset("best", steps="20", candidates=count, batch=max(1, min(count, 4)), seed=args.seed),
        **_given(args, Request),
    )
    # The scene is moved to the results with the report. A demo that fails must not leave it beside the report of an earlier one.
    with claimed(args.out), tempfile.TemporaryDirectory() as folder:
        _check_folder(args, [path.name for path in scene.values()])
        from ..io.images import write_png
        from ..toy.world import demo_scene

        source, mask = demo_scene(args.background, args.seed)
        generated = {"image": Path(folder, "source.png"), "mask": Path(folder, "mask.png")}
        write_png(generated["image"], source)
        write_png(generated["mask"], mask)
        return _run(request, args, replace(_inputs(generated, args, timer), generated=generated))


def edit(args: argparse.Namespace, timer: Timer) -> int:
    """Edits a picture, or repeats the run of a report."""
    request = None if args.from_report is not None else request_of_arguments(args)
    with claimed(args.out):
        _check_folder(args)
        if request is None:
            request = _repeated(args)
        files = {key: Path(path) for key in ("image", "mask") if (path := getattr(request, key))}
        _check_inputs(files, args.out)
        return _run(request, args, _inputs(files, args, timer))


def _run(request: Request, args: argparse.Namespace, inputs: Inputs) -> int:
    from .edit import run

    inputs.timer.lap("import")
    return run(request, args, inputs)


# --- from arguments to a request --------------------------------------------------------------------------------------


def request_of_arguments(args: argparse.Namespace) -> Request:
    """The request of an ``edit`` command line without ``--from``."""
    if args.image is None:
        raise BlendedError("no picture was given; write: blended-diffusion edit IMAGE --mask MASK --prompt TEXT")
    if args.prompts is None:
        raise BlendedError("no prompt was given; add --prompt TEXT, or --prompt '' to remove what the mask covers.")
    given = _given(args, Request)
    if "ddpm" in given:
        given["ddpm"] = str(checkpoint_path(given["ddpm"]))
    if "clip" in given:
        given["clip"] = _with_full_path(given["clip"])
    return Request(
        command="edit",
        image=str(absolute(args.image)),
        mask=str(absolute(args.mask)) if args.mask else None,
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
    return replace(request, command="edit", **{name: getattr(args, name) for name in given})


def options_of_arguments(args: argparse.Namespace) -> EditOptions:
    """The options of an ``edit`` command line: a preset and the changes to it."""
    changes = {**_given(args, EditOptions), **_given(args, GuidanceOptions)}
    name = args.preset or "best"
    if args.skip is not None:
        if args.strength is not None:
            raise BlendedError("--skip and --strength set the same value; give one of them.")
        steps = preset(name, **changes).steps
        if steps.strip().startswith(LOG_SNR):
            raise BlendedError(f"--skip counts equal steps, and those of {steps.strip()} are not; give --strength.", option="steps")
        # The numbers in the text. Whether the process of the model is long enough is checked when the model is loaded.
        total = sum(int(count) for count in steps.strip().removeprefix("ddim").split(","))
        if not 0 <= args.skip < total:
            raise BlendedError(f"--skip is {args.skip} of {total} steps; give 0 to {total - 1}.")
        changes["strength"] = (total - args.skip) / total
    return preset(name, **changes)


def _given(args: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """The arguments that were given for the options of a class."""
    return {name: value for name in declared(kind) if (value := getattr(args, name, None)) is not None}


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE arguments as a dictionary; values are JSON, or else text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise BlendedError(f"--set {pair!r} is not understood; write KEY=VALUE, for example --set num_heads=4.")
        try:
            values[key] = json.loads(value)
        except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or too many brackets
            values[key] = value
    return values


def checkpoint_path(name: str) -> str | Path:
    """'embedded', or the absolute path of a checkpoint. Raises BlendedError if there is no such file."""
    if name == "embedded":
        return name
    path = absolute(name)
    if not path.exists():
        raise BlendedError(f"{path.name}: there is no file {path}; check the name.", option="ddpm")
    return path


def _with_full_path(clip: str) -> str:
    """MODEL:FILE or FILE with the full path of the file, so that a report can be repeated in any folder; MODEL:TAG unchanged."""
    if os.path.isfile(expanded(clip)):
        return str(absolute(clip))
    model, colon, weights = clip.partition(":")
    return f"{model}:{absolute(weights)}" if colon and os.path.isfile(expanded(weights)) else clip


# --- files ------------------------------------------------------------------------------------------------------------


def _check_folder(args: argparse.Namespace, generated: Sequence[str] = ()) -> None:
    """Raises BlendedError if the run would replace or delete files and --overwrite was not given."""
    files = [] if args.overwrite else replaced_files(args.out, generated)
    if files:
        names = f"{files[0].name} and {len(files) - 1} more" if len(files) > 1 else files[0].name
        raise BlendedError(
            f"{args.out} already holds the results of a run, or files of the same names ({names}); choose another --out, or add --overwrite."
        )


def _check_inputs(files: Mapping[str, Path], out: Path) -> None:
    """Raises BlendedError if an input is no file, or the run would replace it: its report could not be repeated."""
    replaced = {absolute(path) for path in (*old_results(out), out / SHEET, out / REPORT)}
    for name, file in files.items():
        check_file(file, "the picture" if name == "image" else "the mask", name)
        if absolute(file) in replaced:
            raise BlendedError(
                f"the {name} {file} is one of the results in {out} that this run replaces; copy it, or choose another --out."
            )


def _inputs(files: Mapping[str, Path], args: argparse.Namespace, timer: Timer) -> Inputs:
    """Reads the picture and its mask, and prints what was converted."""
    from ..io.images import for_format, mask_values, read_picture, transparency

    timer.lap("start")
    picture = read_picture(files["image"])
    mask = mask_values(files["mask"], picture.size, picture.notes) if "mask" in files else transparency(picture)
    picture = for_format(picture, args.format)
    if args.png_compression is not None and args.format != "png":
        picture.notes.append(Note(f"png_compression {args.png_compression} has no effect: the format is {args.format}.", "png_compression"))
    for note in picture.notes:
        print_note(note, args)
    hashes = {key: sha256(files[key]) if key in files else None for key in ("image", "mask")}
    timer.lap("read")
    return Inputs(picture, mask, timer, hashes)
