"""The terminal: ``blended-diffusion demo``, ``edit``, ``inspect``, ``convert`` and ``evaluate``."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..adm.load import Checkpoint
    from ..adm.probe import ProbeOptions
    from ..options import EditOptions
    from ..result import EditResult
    from ..sample import Models

from ..errors import BlendedError, BlendedWarning, Note
from ..io.atomic import sha256, write_bytes
from ..io.results import REPORT, SHEET, Writer, as_json, library_versions, old_results, own_version, precision_of, sentence_of
from .process import keep_freed_memory

INTERRUPTED = 130  # exit code of a program that Ctrl-C ended
FAILED = 2
WAITING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
MACHINE = ("device", "dtype", "checkpointing", "threads")  # of a request; the only part that --from may change
DEMO_PROMPT = "an apple"
DEMO_BACKGROUND = "lake"
DEMO_SEED = 6  # three of its four candidates are apples, as many as of the held-back pairs (docs/quality.md); of seed 0 it is one


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Names a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, [], False) else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="blended-diffusion",
        description="Edit a region of a real picture from a text prompt; every other pixel stays as it is.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {own_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="make a scene of the embedded world and edit it; needs no files")
    demo.add_argument("--out", type=Path, default=Path("blended-diffusion-demo"), help="folder for the results (%(default)s)")
    demo.add_argument("--prompt", default=DEMO_PROMPT, help="what to draw (%(default)r)")
    demo.add_argument("--background", default=DEMO_BACKGROUND, help="scene to draw it into (%(default)s)")
    demo.add_argument("--candidates", type=int, default=4, metavar="N")
    demo.add_argument("--seed", type=int, default=DEMO_SEED)
    _shared(demo)

    edit = commands.add_parser("edit", help="edit a picture of yours", formatter_class=_Defaults)
    edit.add_argument("image", type=Path, nargs="?", help="the picture")
    edit.add_argument("--mask", type=Path, help="white where the picture should change (default: its transparent part)")
    edit.add_argument("--prompt", action="append", help="what to draw; '' removes; repeat for several texts at once")
    edit.add_argument("--prompt-weight", action="append", type=float, metavar="W", help="weight of each --prompt (1)")
    edit.add_argument("--out", type=Path, default=Path("blended-diffusion-out"), help="folder for the results")
    edit.add_argument("--overwrite", action="store_true", help="replace the results that the folder holds")
    edit.add_argument("--from", dest="from_report", type=Path, metavar="REPORT", help="repeat the run of a report.json")

    models = edit.add_argument_group("networks")
    models.add_argument("--ddpm", default="embedded", metavar="FILE", help="ADM checkpoint, .safetensors or .pt")
    models.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the checkpoint, e.g. num_heads=4"
    )
    models.add_argument(
        "--clip",
        default="embedded",
        metavar="MODEL[:WEIGHTS]",
        help="open_clip model with a tag or a file, e.g. ViT-B-16:openai, or a file alone",
    )
    models.add_argument("--lpips", default="auto", metavar="NET", help="network of D_bg: auto, embedded, vgg, alex or squeeze")

    method = edit.add_argument_group("method (where no default is named, the preset decides)")
    method.add_argument("--preset", choices=("best", "fast", "paper", "official"), default="best", help="where the options begin")
    method.add_argument("--algorithm", choices=("blended", "local"), default="blended", help="Algorithm 2 or Algorithm 1")
    method.add_argument("--steps", metavar="N", help="respacing: 100, ddim25, or 50,25,10")
    method.add_argument("--strength", type=float, metavar="S", help="share of the steps that is denoised, 0 to 1")
    method.add_argument("--skip", type=int, metavar="K", help="the same as steps left out, as the original script has it")
    method.add_argument("--sampler", choices=("ddpm", "ddim"))
    method.add_argument("--eta", type=float, help="of DDIM, 0 to 1")
    method.add_argument(
        "--ddim-guidance", choices=("matched", "score"), help="guidance moves a DDIM step as far as a DDPM step, or as the score has it"
    )
    method.add_argument("--seed", type=int, default=0)
    method.add_argument("--candidates", type=int, metavar="N", help="how many results")
    method.add_argument("--batch", type=int, metavar="N", help="how many at once; changes time and memory, not the draws")
    method.add_argument("--class", dest="class_choice", metavar="C", help="of a class-conditional model: zero, random or a number")

    guide = edit.add_argument_group("guidance")
    guide.add_argument("--guidance-scale", dest="scale", type=float, metavar="λ", help="weight of the CLIP loss")
    guide.add_argument("--range-scale", type=float, metavar="λ", help="weight of the range loss")
    guide.add_argument("--lambda", dest="background_scale", type=float, metavar="λ", help="weight of D_bg in Algorithm 1")
    guide.add_argument("--lpips-scale", type=float, metavar="λ", help="weight of LPIPS in the reference code's D_bg (--preset official)")
    guide.add_argument("--l2-scale", type=float, metavar="λ", help="weight of its squared error")
    guide.add_argument("--gradient", choices=("unet", "x0"), help="through the UNet, or with respect to x̂0 alone (fast)")
    guide.add_argument(
        "--x0-if-needed", action="store_const", const=True, help="where memory runs out, take --gradient x0, which is another picture"
    )
    guide.add_argument("--clip-input", choices=("x0", "mixed"), help="what CLIP sees")
    guide.add_argument("--distance", choices=("spherical", "spherical_unclamped", "cosine"))
    guide.add_argument("--views", type=int, metavar="N", help="views of extending augmentations; 1 turns them off")
    guide.add_argument("--early-views", type=int, metavar="N", help="views in the noisier half of the levels (0: as --views)")
    guide.add_argument("--guide-from", dest="start", type=float, metavar="F", help="guidance begins at this part of the levels (0)")
    guide.add_argument("--guide-to", dest="end", type=float, metavar="F", help="guidance ends at this part of the levels (1)")
    guide.add_argument("--view-chunk", type=int, metavar="N", help="views through CLIP at once (less memory, same result)")
    guide.add_argument(
        "--reference-size", type=int, metavar="PX", help="side of the pictures that the weights are meant for (256); 0: weights as they are"
    )
    guide.add_argument("--clamp", type=float, metavar="RMS", help="largest root mean square of a gradient")

    area = edit.add_argument_group("mask and region")
    area.add_argument("--invert-mask", action="store_true", default=None, help="edit what is black (background replacement)")
    area.add_argument("--soft-mask", action="store_true", help="greys of the mask mean how freely a pixel may change")
    area.add_argument("--context", type=float, metavar="F", help="side of the region over that of the mask")
    area.add_argument("--crop", choices=("region", "squash"), help="a square around the mask, or the whole picture squashed")
    area.add_argument("--feather", type=int, metavar="PX", help="fade the edit in over this many pixels, inwards")
    area.add_argument("--ranking", choices=("views", "corrected", "reference"))
    area.add_argument(
        "--enforce-background", action=argparse.BooleanOptionalAction, default=None, help="put the original back outside the mask"
    )
    _shared(edit)

    inspect = commands.add_parser("inspect", help="say what a checkpoint is, and how each of its settings was decided")
    inspect.add_argument("file", metavar="FILE", help="ADM checkpoint, or 'embedded'")
    inspect.add_argument("--json", action="store_true", help="as JSON, for programs")
    _checkpoint(inspect)

    convert = commands.add_parser("convert", help="write a checkpoint's weights and settings into one .safetensors file")
    convert.add_argument("file", metavar="FILE", help="ADM checkpoint, or 'embedded'")
    convert.add_argument("target", type=Path, metavar="OUT.safetensors", help="file to write")
    convert.add_argument("--half", action="store_true", help="in half precision: half the size, rounded to 11 bits")
    convert.add_argument("--overwrite", action="store_true", help="replace the file if there is one")
    _checkpoint(convert)

    evaluate = commands.add_parser("evaluate", help="measure how good edits of the embedded world are, by several rows of options")
    evaluate.add_argument("--only", nargs="+", metavar="NAME", help="rows to measure (default: all)")
    evaluate.add_argument("--pairs", type=int, default=50, metavar="N", help="pairs of a scene and an object (%(default)s)")
    evaluate.add_argument("--candidates", type=int, default=8, metavar="N", help="results of each pair (%(default)s)")
    evaluate.add_argument("--held-back", action="store_true", help="the other list of pairs, which no option was chosen by")
    evaluate.add_argument("--out", type=Path, default=Path("blended-diffusion-evaluation"), help="folder, goes on there (%(default)s)")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    evaluate.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="precision of the UNet")
    evaluate.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    evaluate.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    return parser


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting that you know better, e.g. num_heads=4")
    parser.add_argument("--picture", type=Path, metavar="IMAGE", help="picture of the kind that the model draws, for trying settings out")
    parser.add_argument("--no-probe", dest="probe", action="store_false", help="guess what the file does not tell, without trying")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")


def _shared(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine and output")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="precision of the UNet")
    group.add_argument("--checkpointing", action="store_true", help="gradient checkpointing: less memory, about a third slower")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    group.add_argument("--animate", action="store_true", help="write how each result came about, animations/*.webp")
    group.add_argument("--debug", action="store_true", help="show a traceback when something fails")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for an error, 130 after Ctrl-C."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # Two spinning threads on a busy machine are tens of times slower than waiting ones, and on a free one a quarter faster; those that spin
        # for some microseconds before they wait lose little there and win some of it here. Read when torch is imported.
        os.environ.update({**WAITING_THREADS, **os.environ})
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without λ or x̂ is no reason to fail
    args = build_parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _told_warnings():
            return COMMANDS[args.command](args)
    except KeyboardInterrupt as stop:
        # Where something is kept, run() says so in the exception.
        print(f"\n{stop}" if str(stop) else "\nstopped before a result was finished; nothing was written.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # whatever a library raises, a person gets a sentence; --debug shows the rest
        return _failed(sentence_of(error), args.debug)


def _failed(sentence: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {sentence}", file=sys.stderr)
    return FAILED


@contextlib.contextmanager
def _told_warnings() -> Iterator[None]:
    """Our own warnings as notes; those of libraries are kept quiet."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, BlendedWarning):
            print(f"note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", BlendedWarning)
        warnings.showwarning = show
        yield


# --- commands ---------------------------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> int:
    """Makes a scene, edits it, writes everything that ``edit`` does."""
    from ..io.images import write_png
    from ..options import preset
    from ..toy.world import GUIDANCE_SCALE, demo_scene

    out: Path = args.out
    count = args.candidates
    options = preset("best", steps="40", candidates=count, batch=max(1, min(count, 4)), seed=args.seed, scale=GUIDANCE_SCALE)
    machine = _machine(args)
    _claim(out, "demo")
    source, mask = demo_scene(args.background, args.seed)
    request: dict[str, Any] = {
        "command": "demo",
        "image": str((out / "source.png").resolve()),
        "mask": str((out / "mask.png").resolve()),
        "prompts": [args.prompt],
        "weights": [1.0],
        "ddpm": "embedded",
        "overrides": {},
        "clip": "embedded",
        "lpips": "embedded",
        "options": options.to_dict(),
        **machine,
    }
    # The scene gets its place with the report: a demo that fails must not leave it beside the report of an earlier one.
    with tempfile.TemporaryDirectory() as folder:
        made = {"image": Path(folder, "source.png"), "mask": Path(folder, "mask.png")}
        write_png(made["image"], source)
        write_png(made["mask"], mask)
        return run(request, out, args.animate, args.argv, made)


def edit_command(args: argparse.Namespace) -> int:
    """Edits the user's picture, or repeats the run of a report."""
    if args.from_report is not None:
        request = _request_from(args.from_report)
        given = {k for k, v in vars(build_parser().parse_args(["edit"])).items() if v != getattr(args, k)}
        if settings := sorted(given - {"from_report", "out", "overwrite", "animate", "debug", *MACHINE}):
            raise BlendedError(
                f"--from repeats a run with its own settings, so it cannot take others ({', '.join(settings)}); leave them out."
            )
        # Also of a demo's report, whose results a later demo would else take for its own and replace.
        request |= {"command": "edit", **{k: v for k, v in _machine(args).items() if k in given}}
        _claim(args.out, "edit" if not args.overwrite else None)
        return run(request, args.out, args.animate, args.argv)
    if args.image is None:
        raise BlendedError("no picture was given; write: blended-diffusion edit IMAGE --mask MASK --prompt TEXT")
    if args.prompt is None:
        raise BlendedError("no prompt was given; add --prompt TEXT, or --prompt '' to remove what the mask covers.")
    options = _options(args)
    if args.prompt_weight is not None and len(args.prompt_weight) != len(args.prompt):
        raise BlendedError(
            f"{len(args.prompt)} prompts were given with {len(args.prompt_weight)} weights; give one --prompt-weight for each."
        )
    if wrong := [w for w in args.prompt_weight or () if not math.isfinite(w)]:
        raise BlendedError(f"a --prompt-weight is {wrong[0]}; give a finite number.")
    request = {
        "command": "edit",
        "image": str(args.image.resolve()),
        "mask": str(args.mask.resolve()) if args.mask else None,
        "prompts": args.prompt,
        "weights": args.prompt_weight or [1.0] * len(args.prompt),
        "ddpm": args.ddpm if args.ddpm == "embedded" else str(Path(args.ddpm).expanduser().resolve()),
        "overrides": _overrides(args.set),
        "clip": _whole_clip(args.clip),
        "lpips": args.lpips,
        "options": options.to_dict(),
        **_machine(args),
    }
    _claim(args.out, "edit" if not args.overwrite else None)
    return run(request, args.out, args.animate, args.argv)


def inspect_command(args: argparse.Namespace) -> int:
    """``inspect``: a table, or JSON."""
    from ..adm.describe import as_dict, as_table

    loaded = _examined(args)
    if args.json:
        print(json.dumps(as_dict(loaded.detection, loaded.path), indent=1, ensure_ascii=False))
    else:
        print(as_table(loaded.detection, loaded.path))
    return 0


def convert_command(args: argparse.Namespace) -> int:
    """``convert``: one file with everything in it."""
    from ..adm.convert import convert

    if args.target.suffix.lower() != ".safetensors":
        raise BlendedError(f"{args.target} does not end in .safetensors; that is the only kind of file written.")
    if args.target.exists() and not args.overwrite:
        raise BlendedError(f"{args.target} exists; take another name, or --overwrite.")
    if not args.target.absolute().parent.is_dir():
        raise BlendedError(f"there is no folder {args.target.absolute().parent}; create it first.")
    loaded = _examined(args)
    size = convert(loaded.model, args.target, half=args.half)
    print(f"{loaded.path.name} → {args.target}: {size / 1e6:.1f} MB{' in half precision' if args.half else ''}, settings included")
    return 0


def evaluate_command(args: argparse.Namespace) -> int:
    """``evaluate``: rows of options on pairs of scene and object, judged."""
    import torch
    from tqdm import tqdm

    from ..adm.load import load_ddpm
    from ..clip.model import load_clip
    from ..device import DeviceContext
    from ..evaluation.judge import Judge
    from ..evaluation.metrics import ROWS, as_table, evaluate, finished, pairs
    from ..evaluation.plots import comparison, plot, row_sheet
    from ..perceptual import load_perceptual
    from ..sample import Models
    from ..toy.models import CLIP, DDPM, JUDGE, LPIPS

    if unknown := sorted(set(args.only or ()) - set(ROWS)):
        raise BlendedError(f"there is no row {', '.join(unknown)}; known are {', '.join(ROWS)}.")
    if args.pairs < 1 or args.candidates < 1:
        raise BlendedError(f"--pairs is {args.pairs} and --candidates {args.candidates}; both must be at least 1.")
    if args.out.exists() and not args.out.is_dir():
        raise BlendedError(f"{args.out} is a file; name a folder.")
    _check_threads(args.threads)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = {name: options for name, options in ROWS.items() if name in (args.only or ROWS)}
    context = DeviceContext.choose(args.device, args.dtype)
    perceptual = load_perceptual(context, "embedded")
    models = Models(load_ddpm(context), load_clip(context), perceptual, context)
    files = {"ddpm": DDPM, "clip": CLIP, "lpips": LPIPS, "judge": JUDGE}
    networks = {name: sha256(file) for name, file in files.items()} | {"precision": _short_dtype(models), "device": context.device.type}
    cases = pairs(args.pairs, args.held_back)
    out = args.out / "held-back" if args.held_back else args.out
    with tqdm(total=len(cases) * len(rows), unit="pair", disable=None, dynamic_ncols=True, leave=False) as bar:

        def on_pair(name: str, pair: Any, taken_over: bool) -> None:
            bar.set_description(f"{name}: {pair.prompt}", refresh=False)
            if taken_over and not bar.disable:  # takes no time, which the time left should not be reckoned with
                bar.initial += 1
            bar.update()

        try:
            evaluate(out, models, perceptual, Judge(), rows, cases, args.candidates, networks, on_pair=on_pair)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; what is finished is kept in {out}, and the same command goes on from there.") from None
    table = finished(out, ROWS, cases, args.candidates, networks)  # with what earlier calls have measured of the same
    about = {
        "pairs": len(cases),
        "candidates": args.candidates,
        "held_back": args.held_back,
        "networks": networks,
        "version": own_version(),
    }
    write_bytes(out / "evaluation.json", as_json({**about, "rows": table}, indent=2) + b"\n")
    write_bytes(out / "evaluation.md", f"{as_table(table)}\n".encode())
    plot(out / "evaluation.png", table)
    for name in (names := [row["name"] for row in table]):
        row_sheet(out / f"{name}.png", out, name, cases[:12])
    comparison(out / "comparison.png", out, names, cases[:5])
    print(as_table(table))
    print(f"\n{out / 'evaluation.json'}, a plot, and a sheet of each row beside it")
    return 0


def _examined(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint that a command names, in float32."""
    from ..adm.load import load_checkpoint
    from ..device import DeviceContext

    context = DeviceContext.choose(args.device, "fp32")
    picture = None
    if args.picture is not None:
        from ..io.images import read_picture

        picture = read_picture(args.picture).tensor() * 2 - 1
    with context.autograd(), _trial(picture) as probe:
        return load_checkpoint(context, args.file, _overrides(args.set), probe=probe if args.probe else None)


@contextlib.contextmanager
def _trial(picture: Tensor | None = None) -> Iterator[ProbeOptions]:
    """How the calibration probe runs here: with a bar, silent where nobody watches."""
    from tqdm import tqdm

    from ..adm.probe import ProbeOptions

    # Most checkpoints need no probe, and a bar that nothing moves says something wrong: it comes with the first forward.
    with tqdm(desc="trying settings", unit="forward", disable=None, dynamic_ncols=True, leave=False, delay=1e-3) as bar:

        def on_forward(done: int, expected: int) -> None:
            bar.total = expected
            bar.update(done - bar.n)

        yield ProbeOptions(picture, on_forward=on_forward)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": demo,
    "edit": edit_command,
    "inspect": inspect_command,
    "convert": convert_command,
    "evaluate": evaluate_command,
}


def _whole_clip(spec: str) -> str:
    """MODEL:FILE or FILE with the file's whole path, so that a report finds it from any folder; MODEL:TAG as it is."""
    if Path(spec).expanduser().is_file():
        return str(Path(spec).expanduser().resolve())
    model, colon, weights = spec.partition(":")
    file = Path(weights).expanduser()
    return f"{model}:{file.resolve()}" if colon and file.is_file() else spec


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise BlendedError(f"--threads is {threads}; give at least 1.")


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    _check_threads(args.threads)
    return {key: getattr(args, key) for key in MACHINE}


def _options(args: argparse.Namespace) -> EditOptions:
    from ..options import PRESETS, EditOptions, GuidanceOptions, preset

    names = {f.name for f in fields(EditOptions)} | {f.name for f in fields(GuidanceOptions)}
    names -= {"preset", "guidance"}
    changes = {k: v for k, v in vars(args).items() if k in names and v is not None}
    if args.soft_mask:
        changes["mask_rule"] = "soft"
    if "class_choice" in changes and changes["class_choice"].lstrip("-").isdigit():
        changes["class_choice"] = int(changes["class_choice"])
    if args.skip is not None:
        if args.strength is not None:
            raise BlendedError("--skip and --strength say the same thing; give one of them.")
        total = _step_count(changes.get("steps", PRESETS[args.preset].steps))
        if not 0 <= args.skip < total:
            raise BlendedError(f"--skip is {args.skip} of {total} steps; give 0 to {total - 1}.")
        changes["strength"] = (total - args.skip) / total
    options = preset(args.preset, **changes)
    if args.eta is not None and options.sampler != "ddim":
        warnings.warn(f"--eta {args.eta:g} is of DDIM alone and changes nothing here; add --sampler ddim.", BlendedWarning, stacklevel=2)
    return options


def _step_count(respacing: str) -> int:
    """Steps as the text has them: how long the model's own process is, only the loaded model knows."""
    from ..schedule import check_respacing

    check_respacing(respacing)
    return sum(int(count) for count in respacing.strip().removeprefix("ddim").split(","))


def _overrides(pairs: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise BlendedError(f"--set {pair!r} is not understood; write KEY=VALUE, e.g. --set num_heads=4.")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return values


def _claim(out: Path, command: str | None) -> None:
    """Refuses a folder whose results this run would mix with its own. ``demo`` replaces an earlier demo."""
    if out.exists() and not out.is_dir():
        raise BlendedError(f"--out {out} is a file; name a folder.")
    report = out / REPORT
    if command is None or not (report.exists() or old_results(out)):
        return
    if command == "demo":
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(report.read_text("utf-8"))["request"]["command"] == "demo":
                return
    raise BlendedError(
        f"{out} already holds the results of a run; choose another --out" + ("." if command == "demo" else ", or add --overwrite.")
    )


def _spare_inputs(files: Mapping[str, Path], out: Path) -> None:
    """Refuses to read what the end of this run would delete or write over: no report could ever repeat that."""
    doomed = {path.resolve() for path in (*old_results(out), out / SHEET, out / REPORT)}
    for name, file in files.items():
        if file.resolve() in doomed:
            raise BlendedError(
                f"the {name} {file} is one of the results in {out} that this run replaces; copy it, or choose another --out."
            )


BEFORE_THERE_WAS_A_CHOICE = {"ddim_guidance": "score"}
GUIDANCE_BEFORE_THERE_WAS_A_CHOICE = {"reference_size": 0}
"""What a report that does not know an option was made with, where that is not its default now."""


def _request_from(path: Path) -> dict[str, Any]:
    """The request of a report; its pictures and networks are checked to be the same as then."""
    try:
        report = json.loads(path.read_text("utf-8"))
        request: dict[str, Any] = report["request"]
        hashes = {key: report["inputs"][key] for key in ("image", "mask")}
        networks = dict(report.get("networks", {}).get("sha256", {}))
        versions = {"blended-diffusion": report.get("version"), **report.get("versions", {})}
        for key in ("image", "mask", "prompts", "weights", "ddpm", "overrides", "clip", "lpips", "options", *MACHINE):
            request[key]
    except FileNotFoundError:
        raise BlendedError(f"the report {path} does not exist; check the path.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BlendedError(f"{path} is no report.json of blended-diffusion; give the one in a result folder.") from None
    for key in ("image", "mask"):
        name = request.get(key)
        if name is None:
            continue
        file = Path(name)
        if not file.is_file():
            beside = path.parent / file.name
            if not beside.is_file():
                raise BlendedError(f"the report's {key} {name} is not there any more; put it back, or beside {path.name}.")
            file = beside
        if sha256(file) != hashes[key]:
            raise BlendedError(f"the report's {key} {file} has changed since that run; the result would be another.")
        request[key] = str(file.resolve())
    for name, digest in networks.items():
        network = _network_files(request).get(name)
        if network is None or not network.is_file():
            raise BlendedError(f"the {name} network of that run, {network or request.get(name)}, is not there any more; put it back.")
        if (now := sha256(network)) != digest:
            raise BlendedError(
                f"the {name} network {network} is not that run's (SHA-256 {now[:12]}… instead of {str(digest)[:12]}…), so the result would "
                "be another; put the same file back, or make a new run without --from."
            )
    for given, before in (
        (request["options"], BEFORE_THERE_WAS_A_CHOICE),
        (request["options"].get("guidance", {}), GUIDANCE_BEFORE_THERE_WAS_A_CHOICE),
    ):
        given.update({name: value for name, value in before.items() if name not in given})
    present = {"blended-diffusion": own_version(), **library_versions()}
    if others := [f"{name} {then} (now {present[name]})" for name, then in versions.items() if present.get(name, then) != then]:
        warnings.warn(f"that run had {', '.join(others)}; the result may differ from it.", BlendedWarning, stacklevel=2)
    return request


def _network_files(request: Mapping[str, Any]) -> dict[str, Path]:
    """The networks of a request that are files: the package's own, and those given by path."""
    from ..toy.models import CLIP, DDPM, LPIPS

    files = {"ddpm": DDPM if request["ddpm"] == "embedded" else Path(request["ddpm"])}
    alone = Path(request["clip"])  # a file without a model's name before it
    weights = alone if alone.is_absolute() else Path(request["clip"].partition(":")[2])
    if request["clip"] == "embedded":
        files["clip"] = CLIP
    elif weights.is_absolute():
        files["clip"] = weights
    if request["lpips"] == "embedded":
        files["lpips"] = LPIPS
    return files


def _keep_memory(options: EditOptions) -> None:
    """Where nothing is kept for a way back through the UNet, memory that is kept between operations costs none and saves a fifth of the time; with it
    a third more would be needed."""
    if options.guidance.gradient == "x0":
        keep_freed_memory()


# --- the run ----------------------------------------------------------------------------------------------------------


def run(request: dict[str, Any], out: Path, animate: bool, argv: Sequence[str], made: Mapping[str, Path] | None = None) -> int:
    """Carries out a request and writes its results; what is finished is kept if Ctrl-C or an error ends it.

    ``made`` are the files of a picture and a mask that get their places, those of the request, with the results.
    """
    import torch

    from ..edit import choose_region, edit_picture
    from ..io.images import mask_from_alpha, read_mask, read_picture
    from ..mask import EditMask
    from ..options import EditOptions

    began = time.perf_counter()
    options = EditOptions.from_dict(request["options"])
    files = made or {key: Path(request[key]) for key in ("image", "mask") if request[key]}
    _spare_inputs(files, out)
    picture = read_picture(files["image"])
    mask = read_mask(files["mask"], picture.size, picture.notes) if "mask" in files else mask_from_alpha(picture)
    # Now, not with the report: by then somebody may have painted on.
    inputs = {key: sha256(files[key]) if key in files else None for key in ("image", "mask")}
    for note in picture.notes:
        print(f"note: {note}", file=sys.stderr)
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    _keep_memory(options)
    models = _load(request, options)
    # As they turned out here, so that the report repeats this run and not another machine's defaults.
    request = {
        **request,
        "device": str(models.context.device),
        "dtype": _short_dtype(models),
        "threads": torch.get_num_threads(),
        "lpips": getattr(models.perceptual, "name", request["lpips"]),
    }
    known = {
        "command": shlex.join(["blended-diffusion", *argv]),
        "inputs": inputs,
        "networks": _networks(request, models),
    }
    _note_classes(options, models)
    edited = EditMask.of(mask, options.mask_rule, options.invert_mask)
    region = choose_region(edited, models.ddpm.image_size, options.crop, options.context)
    prompt = None
    if models.clip is not None:
        prompt = models.clip.prompt(*request["prompts"], weights=request["weights"])
    loading = time.perf_counter() - began

    texts = [t for t in request["prompts"] if t.strip()]
    wish = "«" + "» + «".join(texts) + "»" if texts else "removal (no prompt)"
    width, height = picture.size
    where = f"{region.side}×{region.side} region of " if hasattr(region, "side") else ""
    print(
        f"{wish} in a {where}{width}×{height} picture, {options.candidates} candidates, on {models.context.device}, {precision_of(models)}"
    )
    writer = Writer(out, picture, request, options, models, animate, known, made or {})
    trouble: BaseException | None = None
    try:
        try:
            with writer.progress() as on_step:
                result = edit_picture(picture.tensor(), mask, prompt, models, options, on_step, writer.candidate)
        except (KeyboardInterrupt, Exception) as error:
            if writer.result is None or not writer.files:
                raise
            trouble, result = error, writer.result
        with _uninterrupted():
            if trouble is not None:
                traceback.clear_frames(trouble.__traceback__)  # their tensors may be what the memory was needed for
                result.candidates = [
                    c for c in result.candidates if c.index in writer.files
                ]  # one may have been in the middle of being written
                result.rank()
                finished = f"{len(result.candidates)} of {options.candidates} candidates were finished"
                result.notes.append(Note(f"Stopped early, {finished}. The reason: {sentence_of(trouble)}"))
            result.seconds = {"load": loading, **result.seconds}
            failures = writer.finish(result, trouble is not None)
            _tell(result, out, trouble is not None, time.perf_counter() - began)
    except KeyboardInterrupt:
        if not writer.files:
            raise
        raise KeyboardInterrupt(f"stopped; {len(writer.files)} finished results are in {out / 'candidates'}.") from None
    if trouble is not None and not isinstance(trouble, KeyboardInterrupt):
        raise trouble
    if failures:
        raise failures[0]
    return INTERRUPTED if trouble is not None else 0


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C is ignored: an impatient second one must not cost what the first one kept."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals, and may set them
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)


def _note_classes(options: EditOptions, models: Models) -> None:
    from ..options import PRESETS

    usual = PRESETS[options.preset].class_choice if options.preset in PRESETS else "zero"
    if models.ddpm.num_classes is None and options.class_choice != usual:
        warnings.warn(f"--class {options.class_choice} changes nothing: this model knows no classes.", BlendedWarning, stacklevel=2)


def _networks(request: Mapping[str, Any], models: Models) -> dict[str, Any]:
    """The networks for the report; ``sha256`` of those that took part and are files."""
    present = {"ddpm": models.ddpm, "clip": models.clip, "lpips": models.perceptual}
    files = {name: file for name, file in _network_files(request).items() if present[name] is not None and file.is_file()}
    return {
        "ddpm": {"file": request["ddpm"], **_described(models)},
        "clip": models.clip.name if models.clip else None,
        "lpips": getattr(models.perceptual, "name", None),
        "sha256": {name: sha256(file) for name, file in files.items()},
    }


def _short_dtype(models: Models) -> str:
    from ..device import DTYPES

    return next(name for name, dtype in DTYPES.items() if dtype == models.context.dtype)


def _load(request: dict[str, Any], options: EditOptions) -> Models:
    from ..adm.load import load_ddpm
    from ..clip.model import load_clip
    from ..device import DeviceContext
    from ..perceptual import load_perceptual
    from ..sample import Models

    context = DeviceContext.choose(request["device"], request["dtype"])
    with context.autograd():
        with _trial() as probe:
            ddpm = load_ddpm(context, request["ddpm"], request["overrides"], probe=probe)
        if request["checkpointing"]:
            ddpm.network.gradient_checkpointing = True  # type: ignore[assignment]
        wanted = any(t.strip() for t in request["prompts"])
        clip = load_clip(context, request["clip"]) if wanted else None
        perceptual = load_perceptual(context, request["lpips"]) if wanted and options.guidance.needs_perceptual else None
    return Models(ddpm, clip, perceptual, context)


def _tell(result: EditResult, out: Path, interrupted: bool, seconds: float) -> None:
    print(f"{'rank':>4}  {'candidate':>9}  {'CLIP distance':>13}  {'gain':>6}  {'background':>10}  {'seam':>6}")
    for c in result.candidates:
        s = c.score
        distance = "–" if s.clip_distance is None else f"{s.clip_distance:.4f}"
        gain = "–" if s.gain is None else f"{s.gain:+.3f}"
        print(f"{c.rank:>4}  {c.index:>9}  {distance:>13}  {gain:>6}  {s.background_error:>10.4g}  {s.seam_energy:>6.4f}")
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    parts = ", ".join(f"{name} {value:.1f}" for name, value in result.seconds.items() if value >= 0.05)
    print(f"{'stopped after' if interrupted else 'done in'} {seconds:.1f} s ({parts})")
    print(out / SHEET if (out / SHEET).exists() else out / REPORT)


def _described(models: Models) -> dict[str, Any]:
    config = getattr(models.ddpm.network, "config", None)
    return {"unet": config.to_dict() if config is not None else None, "diffusion": models.ddpm.config.to_dict()}
