"""The files of a run: candidates as they are finished, then the report, the contact sheet and animations."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..device import DTYPES
from ..result import Candidate, EditResult
from ..sample import Step
from ..timer import Timer
from .atomic import write_bytes
from .contact_sheet import animation, contact_sheet, thumbnail
from .folder import REPORT, SHEET, free_reserve, old_results
from .formats import FAST
from .images import Picture, UInt8, to_uint8, write_picture
from .request import Request
from .versions import library_versions, own_version

TEXT_KEY = "blended-diffusion"
TILES_OF_SHEET = 30


class Writer:
    """Writes the files of a run: each candidate when it is finished, the rest at the end."""

    def __init__(
        self,
        out: Path,
        request: Request,
        picture: Picture,
        provenance: Mapping[str, Any],
        generated: Mapping[str, Path] | None = None,
        animate: bool = False,
        format: str = "png",
        png_compression: str = FAST,
    ) -> None:
        """Nothing is written yet.

        Args:
            out: the result folder.
            request: with the device, precision and number of threads that the run uses.
            picture: the source, with the metadata that the results take over (:func:`~blended_core.io.images.for_format`).
            provenance: entries of the report that are known before the run: the command, hashes of inputs and networks.
            generated: temporary files of a picture and a mask that are copied to ``request.image`` and ``request.mask``.
            animate: also write an animation of each candidate.
            format: of the candidates: png, jpg, webp or tiff.
            png_compression: as in :func:`~blended_core.io.formats.png_options`.
        """
        self.format, self.png_compression = format, png_compression
        self.out, self.request, self.picture, self.provenance = out, request, picture, provenance
        self.generated, self.animate = generated or {}, animate
        self.result: EditResult | None = None
        self.files: dict[int, Path] = {}
        self._frames: dict[int, list[Tensor]] = {}
        self._thumbnails: dict[int, UInt8] = {}
        self._old_files = {*old_results(out), out / SHEET}

    def step(self, step: Step) -> None:
        """Keeps the frames of an animation."""
        if self.animate:
            for row, image in enumerate(step.images):
                frame = ((step.x0[row : row + 1].clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
                self._frames.setdefault(image, []).append(frame)

    def candidate(self, candidate: Candidate, result: EditResult) -> None:
        """Writes one candidate under its number."""
        self.result = result
        path = self.out / "candidates" / f"candidate_{candidate.index:02d}.{self.format}"
        # People share pictures, so the text in the file names other files without their folders.
        about = {
            "candidate": candidate.index,
            "score": candidate.score.to_dict(),
            "request": self.request.without_folders(),
            "version": own_version(),
        }
        box, part = result.part(candidate)
        pixels = self.picture.rgb.copy()  # the source in 8 bits, which the rest of the result equals bit for bit
        pixels[box.slices[2:]] = to_uint8(part)
        self._thumbnails[candidate.index] = thumbnail(pixels)
        # An entry of an earlier edit of this picture is replaced.
        picture = replace(self.picture, rgb=pixels, alpha=self._alpha(result))
        write_picture(path, picture, self.format, {TEXT_KEY: as_json(about).decode()}, self.png_compression)
        self.files[candidate.index] = path

    def _alpha(self, result: EditResult) -> UInt8 | None:
        """The alpha channel of the picture. Where it served as the mask, the edited part becomes opaque."""
        alpha = self.picture.alpha
        if alpha is None or self.request.mask is not None:
            return alpha
        return np.where(result.mask.values[0, 0].numpy() > 0, np.uint8(255), alpha)

    def finish(self, result: EditResult, interrupted: bool, timer: Timer) -> dict[str, Exception]:
        """Renames the candidates by rank, and writes the report, the contact sheet and animations.

        ``timer`` has measured the stages before; those of this function are added. The result and the report hold all of them.

        Returns:
            The errors of the contact sheet and the animations, by the name of what is missing.

        Raises:
            OSError: if the report cannot be written.
        """
        for candidate in result.candidates:
            old = self.files[candidate.index]
            new = old.with_name(f"{candidate.rank:02d}_{old.name}")
            os.replace(old, new)
            self.files[candidate.index] = new
        timer.lap("write")
        free_reserve(self.out)
        try:
            self._report(result, interrupted, timer)
        except OSError:
            # The disk may be full: the files of an earlier run make room. Its report does not describe the present candidates in any case.
            (self.out / REPORT).unlink(missing_ok=True)
            self._delete_old_files()
            self._report(result, interrupted, timer)
        self._delete_old_files()
        errors: dict[str, Exception] = {}
        for name, write in {"contact sheet": self._sheet, **({"animations": self._animations} if self.animate else {})}.items():
            try:
                write(result)
            except Exception as error:
                errors[name] = error
            timer.lap(name)
        # Again, with the seconds that these took. The first report is there in case that they do not end, or that the disk is full now.
        with contextlib.suppress(OSError):
            self._report(result, interrupted, timer)
        return errors

    def _delete_old_files(self) -> None:
        for path in self._old_files - set(self.files.values()):
            path.unlink(missing_ok=True)

    def _animations(self, result: EditResult) -> None:
        for candidate in result.candidates:
            frames = [result.preview(f.float() / 127.5 - 1) for f in self._frames.get(candidate.index, [])]
            frames.append(result.preview(candidate.edited))
            animation(self.out / "animations" / f"{self.files[candidate.index].stem}.webp", frames)

    def _sheet(self, result: EditResult) -> None:
        tiles = []
        for c in result.candidates[:TILES_OF_SHEET]:
            distance = "" if c.score.clip_distance is None else f" · CLIP {c.score.clip_distance:.3f}"
            gain = "" if c.score.gain is None else f" · gain {c.score.gain:+.3f}"
            tiles.append((self._thumbnails[c.index], f"#{c.rank}{distance}", f"candidate {c.index}{gain} · seam {c.score.seam_energy:.3f}"))
        o, count = self.request.options, len(result.candidates)
        title = " + ".join(self.request.texts) or "removal"
        subtitle = (
            f"blended diffusion · {o.preset} · {o.steps} steps, strength {o.strength:g} · seed {o.seed} · {count} candidates, best first"
        )
        contact_sheet(self.out / SHEET, self.picture.rgb, result.mask.values, tiles, title, subtitle)

    def _report(self, result: EditResult, interrupted: bool, timer: Timer) -> None:
        result.seconds = dict(timer.seconds)
        for key, file in self.generated.items():
            write_bytes(Path(getattr(self.request, key)), file.read_bytes())
        report = {
            "version": own_version(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "interrupted": interrupted,
            "repeat": "blended-diffusion edit --from report.json --out DIR",
            "request": self.request.to_dict(),
            **self.provenance,
            "versions": library_versions(),
            "machine": {
                "device": self.request.device,
                "dtype": str(DTYPES[self.request.dtype]).removeprefix("torch."),
                "platform": platform.platform(),
            },
            "picture": {"width": self.picture.size[0], "height": self.picture.size[1], "notes": self.picture.notes},
            "region": dict(vars(result.region)),
            "source_distance": result.source_distance,
            "notes": result.notes,
            "seconds": {k: round(v, 3) for k, v in timer.seconds.items()},
            "total_seconds": round(timer.total, 3),
            "candidates": [
                {
                    "file": self.files[c.index].relative_to(self.out).as_posix(),
                    "rank": c.rank,
                    "candidate": c.index,
                    "seed": self.request.options.seed,
                    **c.score.to_dict(),
                }
                for c in result.candidates
            ],
        }
        write_bytes(self.out / REPORT, as_json(report, indent=2) + b"\n")


def as_json(value: object, indent: int | None = None) -> bytes:
    """Strict JSON: NaN and Inf become null, and bytes of a file name that are not UTF-8 are escaped."""
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def _finite(value: Any) -> Any:
    """A copy with None in place of NaN and Inf."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
