"""The command line: commands, arguments and help texts. The functions of the commands are in :mod:`~blended_core.cli.app`.

The arguments of an option come from its declaration (:mod:`~blended_core.options`). Only arguments that are not options of an edit are written here.
Each argument is None where it is not given, so that a preset can supply the value.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..errors import BlendedError
from ..io.formats import FAST, FORMATS, PNG_COMPRESSIONS
from ..io.request import MACHINE, Request
from ..io.versions import own_version
from ..options import PRESETS, REGION, EditOptions, GuidanceOptions, Option, declared
from ..paths import expanded
from .messages import say

DEMO_PROMPT = "an apple"
DEMO_BACKGROUND = "lake"
DEMO_SEED = 6
"""Three of the four candidates of this seed are apples, the same share as among the held-back pairs (docs/quality.md)."""
EDIT_USAGE = "%(prog)s IMAGE [--mask FILE] --prompt TEXT [option ...]\n       %(prog)s --from REPORT [option ...]"
GROUPS: tuple[tuple[Any, str], ...] = ((Request, "networks"), (EditOptions, "method"), (GuidanceOptions, "guidance"))
"""Classes of options, and the heading for those of their options that name no group."""
PICTURE = "picture and prompt"
HEADINGS = (PICTURE, "method", REGION, "guidance", "networks", MACHINE)
"""The headings of ``edit --help``, in this order."""
EDIT_EXAMPLES = """examples:
  Draw something inside a mask, with your own models:
    blended-diffusion edit photo.jpg --mask mask.png --prompt "a corgi" --ddpm model.pt --clip ViT-B-16:openai
  Remove what a mask covers:
    blended-diffusion edit photo.jpg --mask mask.png --prompt ""
  Replace the background; faster, with fewer results:
    blended-diffusion edit photo.jpg --mask person.png --invert-mask --prompt "a beach" --preset fast --candidates 4
  Keep the colors of a scribble:
    blended-diffusion edit scribble.png --mask mask.png --prompt "a red car" --strength 0.6
  Repeat a run:
    blended-diffusion edit --from out/report.json --out again

blended-diffusion edit --preset fast --help shows the defaults of that preset."""
FILE_NAME = re.compile(r".+\.[A-Za-z]\w{1,4}")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Puts the help texts into a column of fixed width."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


class _Parser(argparse.ArgumentParser):
    """A parser that prints as the other parts of the terminal do, and says what may have been meant by an argument that it does not know."""

    def __init__(self, **given: Any) -> None:
        super().__init__(formatter_class=_Formatter, add_help=False, **given)
        self.color = False  # Python 3.14 colors help texts
        self.heading = self.add_argument_group("general")
        self.heading.add_argument("-h", "--help", action="help", help="Show this help.")

    def _print_message(self, message: str, file: Any = None) -> None:
        say(message.rstrip("\n"), error=file is sys.stderr)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown argument {unknown[0]}{self._advice(unknown[0], found)}")
        return found, unknown

    def _advice(self, unknown: str, found: argparse.Namespace) -> str:
        """'; did you mean …?' for an argument that no rule of this parser covers, or ''."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        if unknown.startswith("-"):
            close = difflib.get_close_matches(unknown.partition("=")[0], flags, 1)
            return f"; did you mean {close[0]}?" if close else ""
        is_file = FILE_NAME.fullmatch(unknown) is not None
        if is_file and "--mask" in flags and found.mask is None:
            return f"; did you mean --mask {shlex.quote(unknown)}?"
        if not is_file and "--prompt" in flags:
            if getattr(found, "prompts", None) is None:
                return f"; did you mean --prompt {shlex.quote(unknown)}?"
            return "; put quotes around a text with spaces"
        return ""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line, which they hold as ``argv``. Exits with code 2 where it cannot be understood."""
    named = [text for before, text in zip(["", *argv], argv, strict=False) if before == "--preset"]
    named += [text.partition("=")[2] for text in argv if text.startswith("--preset=")]
    args = build_parser(next((name for name in reversed(named) if name in PRESETS), "best")).parse_args(argv)
    args.argv = list(argv)
    return args


def build_parser(preset: str = "best") -> argparse.ArgumentParser:
    """The parser of all commands. Parsed arguments hold, besides their values, ``flags``: {name of an option: its flag}.

    ``edit --help`` shows the defaults of ``preset``.
    """
    parser = _Parser(
        prog="blended-diffusion",
        description="Edit a region of a picture from a text prompt. Every pixel outside the region stays unchanged.",
        epilog="blended-diffusion COMMAND --help lists the arguments of a command.",
    )
    parser.heading.add_argument("--version", action="version", version=f"%(prog)s {own_version()}", help="Show the version.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, description: str, **given: Any) -> _Parser:
        command: _Parser = commands.add_parser(name, help=description, description=description, **given)
        return command

    _demo(add("demo", "Create a scene of the embedded world and edit it. Needs no files."))
    _edit(add("edit", "Edit a picture inside a mask.", usage=EDIT_USAGE, epilog=EDIT_EXAMPLES), preset)
    _inspect(add("inspect", "Show the settings of a checkpoint and how each was determined."))
    _convert(add("convert", "Write the weights and settings of a checkpoint to one .safetensors file."))
    _evaluate(add("evaluate", "Measure the quality of edits in the embedded world for several sets of options."))
    for command in commands.choices.values():
        command.heading.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
        command.set_defaults(flags={action.dest: action.option_strings[0] for action in command._actions if action.option_strings})
    return parser


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=path, metavar="DIR", default=Path("blended-diffusion-demo"), help="Folder for the results. Default: %(default)s."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace the results in the folder.")
    parser.add_argument("--prompt", metavar="TEXT", default=DEMO_PROMPT, help="Text of what to draw. Default: %(default)s.")
    parser.add_argument("--background", metavar="NAME", default=DEMO_BACKGROUND, help="Scene to draw it in. Default: %(default)s.")
    _add_options(parser, EditOptions, candidates=4, seed=DEMO_SEED)
    _machine(parser.add_argument_group(MACHINE))


def _edit(parser: argparse.ArgumentParser, preset: str) -> None:
    parser.description = f"Edit a picture inside a mask. The defaults below are those of the preset {preset}."
    groups = {heading: parser.add_argument_group(heading) for heading in HEADINGS}
    picture, output = groups[PICTURE], groups[MACHINE]
    picture.add_argument("image", type=path, nargs="?", metavar="IMAGE", help="The picture.")
    picture.add_argument(
        "--mask", type=path, metavar="FILE", help="Mask file, white where the picture changes. Default: the transparent part of IMAGE."
    )
    picture.add_argument(
        "--prompt", dest="prompts", action="append", metavar="TEXT",
        help="Text of what to draw. '' removes what the mask covers. Repeat the argument to combine several texts.",
    )  # fmt: skip
    picture.add_argument(
        "--prompt-weight", dest="weights", action="append", type=number, metavar="W",
        help="Weight of a prompt. Give one for each --prompt. Default: 1.",
    )  # fmt: skip
    picture.add_argument(
        "--from", dest="from_report", type=path, metavar="REPORT",
        help="Repeat the run of a report.json. Only arguments for machine and output may be added.",
    )  # fmt: skip
    output.add_argument(
        "--out", type=path, metavar="DIR", default=Path("blended-diffusion-out"), help="Folder for the results. Default: %(default)s."
    )
    output.add_argument("--overwrite", action="store_true", help="Replace the results in the folder.")
    groups["method"].add_argument("--preset", choices=tuple(PRESETS), help="Set of options that the others modify. Default: best.")
    for kind, heading in GROUPS:
        for name, (declaration, _) in declared(kind).items():
            if declaration.group != MACHINE:
                _add_options(groups[declaration.group or heading], kind, preset, **{name: None})
    _overrides(groups["networks"])
    groups["method"].add_argument(
        "--skip", type=whole_number, metavar="K",
        help="Number of steps to leave out, as in the original script; another way to give --strength.",
    )  # fmt: skip
    groups[REGION].add_argument(
        "--soft-mask",
        dest="mask_rule",
        action="store_const",
        const="soft",
        help="Gray values of the mask set how freely a pixel may change.",
    )
    _machine(output)


def _inspect(parser: argparse.ArgumentParser) -> None:
    _checkpoint(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def _convert(parser: argparse.ArgumentParser) -> None:
    _checkpoint(parser)
    parser.add_argument("target", type=path, metavar="OUT.safetensors", help="The file to write.")
    parser.add_argument("--half", action="store_true", help="Store half precision: half the size, values rounded to 11 bits.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the file if it exists.")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Rows to measure. Default: all.")
    parser.add_argument(
        "--pairs", type=whole_number, default=50, metavar="N", help="Number of pairs of scene and object. Default: %(default)s."
    )
    parser.add_argument(
        "--candidates", type=whole_number, default=8, metavar="N", help="Number of results for each pair. Default: %(default)s."
    )
    parser.add_argument("--held-back", action="store_true", help="Use the second list of pairs, by which no option was chosen.")
    parser.add_argument(
        "--out", type=path, metavar="DIR", default=Path("blended-diffusion-evaluation"),
        help="Folder for the results. Pairs that are finished there are not measured again. Default: %(default)s.",
    )  # fmt: skip
    _add_options(parser, Request, device=None, dtype=None, threads=None)


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="ADM checkpoint, or 'embedded'.")
    _overrides(parser)
    _add_options(parser, Request, ddpm_weights=None)
    parser.add_argument(
        "--picture", type=path, dest="probe_picture", metavar="IMAGE", help="Picture similar to the training images, for the probe."
    )
    parser.add_argument(
        "--no-probe", dest="probe", action="store_false", help="Guess settings that are not in the file, without the probe."
    )
    _add_options(parser, Request, device=None)


def _overrides(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        metavar="KEY=VALUE",
        help="Override a setting of the checkpoint, for example num_heads=4.",
    )


def _machine(group: argparse._ActionsContainer) -> None:
    options: dict[str, Any] = {name: None for name, (declaration, _) in declared(Request).items() if declaration.group == MACHINE}
    _add_options(group, Request, **options)
    group.add_argument(
        "--format", choices=tuple(FORMATS), default="png",
        help="Format of the results. Only png, webp and tiff, which are lossless, keep the pixels outside the mask exactly. Default: %(default)s.",
    )  # fmt: skip
    group.add_argument(
        "--png-compression", choices=PNG_COMPRESSIONS, metavar="LEVEL",
        help="How hard png results are compressed; their pixels are the same. fast is best for photographs; 0 to 9 are levels of zlib: 6 makes drawings "
        f"smaller, and takes several times as long. Default: {FAST}.",
    )  # fmt: skip
    group.add_argument("--animate", action="store_true", help="Write an animation of each candidate, animations/*.webp.")


def flag_of(name: str, declaration: Option) -> str:
    """The flag of an option; '' if it has none."""
    return f"--{name.replace('_', '-')}" if declaration.flag is None else declaration.flag


def _add_options(parser: argparse._ActionsContainer, kind: Any, preset: str = "best", **defaults: Any) -> None:
    """Adds arguments for options of a class, each with its default for this command, or None. Help texts name the default of a preset."""
    values = {EditOptions: PRESETS[preset], GuidanceOptions: PRESETS[preset].guidance}.get(kind)
    for name, own_default in defaults.items():
        declaration, declared_default = declared(kind)[name]
        hint = get_type_hints(kind)[name]
        given: dict[str, Any] = {"metavar": declaration.metavar, "type": _converter(hint)}
        if hint is bool:
            given = {"action": "store_const", "const": True}
        elif bool in get_args(hint):
            given = {"action": argparse.BooleanOptionalAction}
        elif declaration.choices:
            given = {"choices": declaration.choices}
        default = getattr(values, name, declared_default) if own_default is None else own_default
        text = declaration.help + ("" if default is None or default is False or default == "" else f" Default:\u00a0{_shown(default)}.")
        if flag := flag_of(name, declaration):
            parser.add_argument(flag, dest=name, default=own_default, help=text.replace("%", "%%"), **given)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _converter(hint: Any) -> Callable[[str], Any]:
    """The function that reads the value of an option with this annotation."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    return whole_number_or_text if len(kinds) > 1 else {int: whole_number, float: number}.get(kinds[0], kinds[0])


def path(text: str) -> Path:
    """The value of an argument that names a file or a folder. The shell leaves a ~ as it is after an equals sign: --out=~/results."""
    try:
        return expanded(text)
    except BlendedError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole_number(text: str) -> int:
    """The value of an argument that counts something."""
    if not re.fullmatch(r"[+-]?[0-9]{1,20}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, such as 8")
    return int(text)


def number(text: str) -> float:
    """The value of an argument that is a quantity."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, such as 0.5") from None


def whole_number_or_text(text: str) -> int | str:
    """The value of an argument that is either."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,20}", text, re.ASCII) else text
