"""What a run leaves behind: pictures as they are finished, then a report, a contact sheet and animations."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..options import EditOptions
    from ..result import Candidate, EditResult
    from ..sample import Models, Step
    from .images import Picture, UInt8

from ..errors import BlendedError
from .atomic import write_bytes

REPORT = "report.json"
SHEET = "contact_sheet.png"
TEXT_KEY = "blended-diffusion"
OUR_NAME = re.compile(r"(\d+_)?candidate_\d+")  # of candidates and animations, with their rank or not yet
SMALLER = "try --batch 1, --dtype bf16 or --device cpu."


class Writer:
    """Writes results as they come: a picture the moment it is finished, the rest at the end."""

    def __init__(
        self,
        out: Path,
        picture: Picture,
        request: dict[str, Any],
        options: EditOptions,
        models: Models,
        animate: bool,
        known: dict[str, Any],
        made: Mapping[str, Path],
    ) -> None:
        """``known`` is what the report says of things before the run, ``made`` as in :func:`run`."""
        self.out = out
        self.picture = picture
        self.request = request
        self.options = options
        self.models = models
        self.animate = animate
        self.known = known
        self.made = made
        self.result: EditResult | None = None
        self.frames: dict[int, list[Any]] = {}
        self.files: dict[int, Path] = {}
        self.thumbnails: dict[int, UInt8] = {}
        self.stale = {*old_results(out), out / SHEET}

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[Step], None]]:
        """A bar over all steps of all batches, with the time left; silent where nobody watches."""
        from tqdm import tqdm

        schedule = self.models.ddpm.config.respaced(self.options.steps)
        batches = -(-self.options.candidates // self.options.batch)
        total = batches * (schedule.start_index(self.options.strength) + 1)
        with tqdm(total=total, unit="step", disable=None, dynamic_ncols=True, leave=False) as bar:

            def on_step(step: Step) -> None:
                first, last = step.images[0], step.images[-1]
                bar.set_description(f"candidate {first}" if first == last else f"candidates {first}–{last}", refresh=False)
                if step.clip_distance is not None:
                    bar.set_postfix(clip=f"{float(step.clip_distance.mean()):.3f}", refresh=False)
                bar.update()
                if self.animate:
                    for row, image in enumerate(step.images):
                        small = ((step.x0[row : row + 1].clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
                        self.frames.setdefault(image, []).append(small)

            yield on_step

    def _alpha(self) -> Any:
        """The picture's own alpha; where it was the mask, the edited part becomes opaque."""
        import numpy as np

        alpha = self.picture.alpha
        if alpha is None or self.request["mask"] is not None or self.result is None:
            return alpha
        return np.where(self.result.mask.values[0, 0].numpy() > 0, np.uint8(255), alpha)

    def candidate(self, candidate: Candidate, result: EditResult) -> None:
        """Writes one result under its number."""
        from .contact_sheet import thumbnail
        from .images import to_uint8, write_png

        self.result = result
        path = self.out / "candidates" / f"candidate_{candidate.index:02d}.png"
        # A picture is passed on, so it tells the names of files, but not whose folders they are in.
        about = {
            "candidate": candidate.index,
            "score": candidate.score.to_dict(),
            "request": without_folders(self.request),
            "version": own_version(),
        }
        pixels = to_uint8(result.picture(candidate))
        self.thumbnails[candidate.index] = thumbnail(pixels)
        write_png(path, pixels, self._alpha(), {TEXT_KEY: as_json(about).decode()}, self.picture.icc)
        self.files[candidate.index] = path

    def finish(self, result: EditResult, interrupted: bool) -> list[BlendedError]:
        """Names the results by rank, and writes report, contact sheet and animations; returns what the last two failed of."""

        for candidate in result.candidates:
            old = self.files[candidate.index]
            new = old.with_name(f"{candidate.rank:02d}_{old.name}")
            os.replace(old, new)
            self.files[candidate.index] = new
        for key, file in self.made.items():
            write_bytes(Path(self.request[key]), file.read_bytes())
        self._report(result, interrupted)
        for path in self.stale - set(self.files.values()):
            path.unlink(missing_ok=True)
        failures = []
        for what, write in {"contact sheet": self._sheet, **({"animations": self._animations} if self.animate else {})}.items():
            try:
                write(result)
            except Exception as error:
                failure = BlendedError(f"the results and {REPORT} are in {self.out}, but not the {what}: {sentence_of(error)}")
                failure.__cause__ = error
                failures.append(failure)
        return failures

    def _animations(self, result: EditResult) -> None:
        from .contact_sheet import animation

        for candidate in result.candidates:
            frames = [result.preview(f.float() / 127.5 - 1) for f in self.frames.get(candidate.index, [])]
            frames.append(result.preview(candidate.edited))
            animation(self.out / "animations" / f"{self.files[candidate.index].stem}.webp", frames)

    def _sheet(self, result: EditResult) -> None:
        from .contact_sheet import contact_sheet

        tiles = []
        for c in result.candidates[:30]:
            first = f"#{c.rank}" if c.score.clip_distance is None else f"#{c.rank} · CLIP {c.score.clip_distance:.3f}"
            second = (
                f"candidate {c.index}"
                + ("" if c.score.gain is None else f" · gain {c.score.gain:+.3f}")
                + f" · seam {c.score.seam_energy:.3f}"
            )
            tiles.append((self.thumbnails[c.index], first, second))
        texts = [t for t in self.request["prompts"] if t.strip()]
        title = " + ".join(texts) if texts else "removal"
        o = self.options
        subtitle = f"blended diffusion · {o.preset} · {o.steps} steps, strength {o.strength:g} · seed {o.seed} · {len(result.candidates)} candidates, best first"
        contact_sheet(self.out / SHEET, self.picture.rgb, result.mask.values, tiles, title, subtitle)

    def _report(self, result: EditResult, interrupted: bool) -> None:

        report = {
            "version": own_version(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "interrupted": interrupted,
            "repeat": "blended-diffusion edit --from report.json --out DIR",
            "request": self.request,
            **self.known,
            "versions": library_versions(),
            "machine": {
                "device": str(self.models.context.device),
                "dtype": precision_of(self.models),
                "platform": platform.platform(),
            },
            "picture": {"width": self.picture.size[0], "height": self.picture.size[1], "notes": self.picture.notes},
            "region": dict(vars(result.region)),
            "source_distance": result.source_distance,
            "notes": result.notes,
            "seconds": {k: round(v, 3) for k, v in result.seconds.items()},
            "candidates": [
                {
                    "file": self.files[c.index].relative_to(self.out).as_posix(),
                    "rank": c.rank,
                    "candidate": c.index,
                    "seed": self.options.seed,
                    **c.score.to_dict(),
                }
                for c in result.candidates
            ],
        }
        write_bytes(self.out / REPORT, as_json(report, indent=2) + b"\n")


def as_json(value: object, indent: int | None = None) -> bytes:
    """JSON that every reader takes: no NaN, and what a file name has beside Unicode as an escape."""
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def _finite(value: Any) -> Any:
    """Numbers that are none as None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def without_folders(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request with file names in place of paths."""
    names = {key: Path(request[key]).name for key in ("image", "mask", "ddpm") if request[key]}
    model, colon, weights = request["clip"].partition(":")
    return {**request, **names, "clip": model + colon + (Path(weights).name if Path(weights).is_absolute() else weights)}


def old_results(out: Path) -> set[Path]:
    """Candidates and animations of an earlier run, which may have left no report. Other names are somebody else's files."""
    return {path for path in (*out.glob("candidates/*.png"), *out.glob("animations/*.webp")) if OUR_NAME.fullmatch(path.stem)}


def sentence_of(error: BaseException) -> str:
    """What a person reads of an error."""
    if isinstance(error, BlendedError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "Ctrl-C."
    from ..memory import is_out_of_memory

    if is_out_of_memory(error):
        return f"the device ran out of memory; {SMALLER}"
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or 'file system'}."
    if isinstance(error, RuntimeError):
        return f"{type(error).__name__}: {error}. Run again with --debug for the place."
    return f"something unexpected, {type(error).__name__}: {error}. Run again with --debug for the place."


def own_version() -> str:
    """Of this package, as it was installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("blended-diffusion")
    except PackageNotFoundError:
        return "unknown"


def library_versions() -> dict[str, str]:
    """Of Python and the libraries that the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "open_clip_torch", "lpips", "kornia", "numpy", "safetensors", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def precision_of(models: Models) -> str:
    """'float32', 'bfloat16' or 'float16'."""
    return str(models.context.dtype).removeprefix("torch.")
