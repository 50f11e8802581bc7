"""The input of ``edit --from``: the request of a report, if its pictures and networks are unchanged."""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path

from ..errors import BlendedError, BlendedWarning, short_repr
from ..io.atomic import check_file, sha256, shown_path
from ..io.request import Request
from ..io.versions import library_versions, own_version
from ..toy.models import CLIP, DDPM, LPIPS

VERSION = re.compile(r"[\w.+-]{1,40}", re.ASCII)


def request_of_report(path: Path) -> Request:
    """The request of a ``report.json``, with the current paths of its picture and mask.

    Raises:
        BlendedError: if the file is not a report, or a picture or network is missing or has changed.

    Warns:
        BlendedWarning: if the run used other versions of the libraries.
    """
    check_file(path, "the report")
    try:
        report = json.loads(path.read_text("utf-8"))
        request = Request.from_dict(report["request"])
        inputs = {key: report["inputs"][key] for key in ("image", "mask")}
        networks = {name: str(digest) for name, digest in report.get("networks", {}).get("sha256", {}).items()}
        versions = {"blended-diffusion": report.get("version"), **report.get("versions", {})}
        files = network_files(request)
    except BlendedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BlendedError(f"{shown_path(path)} is not a report of blended-diffusion; give the report.json in a result folder.") from None
    request = replace(request, image=_found(path, "image", request.image, inputs["image"]))
    if request.mask is not None:
        request = replace(request, mask=_found(path, "mask", request.mask, inputs["mask"]))
    for name, digest in networks.items():
        file = files.get(name)
        if file is None or not os.path.isfile(file):
            where = short_repr(getattr(request, name, name)) if file is None else shown_path(file)
            raise BlendedError(f"the {short_repr(name)} network of that run, {where}, does not exist anymore; restore it.")
        if (now := sha256(file)) != digest:
            raise BlendedError(
                f"the {name} network {shown_path(file)} is not the one of that run (SHA-256 {now[:12]}… instead of {digest[:12]!r}…), so the "
                "result would differ; restore the file, or start a new run without --from."
            )
    present = {"blended-diffusion": own_version(), **library_versions()}
    told = {name: then if isinstance(then, str) and VERSION.fullmatch(then) else "of an unknown version" for name, then in versions.items()}
    if others := [f"{name} {told[name]} (now {now})" for name, now in present.items() if name in versions and versions[name] != now]:
        warnings.warn(BlendedWarning(f"that run used {', '.join(others)}; the result may differ."), stacklevel=2)
    return request


def _found(report: Path, key: str, name: str, digest: str) -> str:
    """The path of a file that a report names: there, or beside the report."""
    file = next((file for file in (Path(name), report.parent / Path(name).name) if os.path.isfile(file)), None)
    if file is None:
        raise BlendedError(
            f"the report's {key} {shown_path(Path(name))} does not exist anymore; restore it, or copy it beside {report.name}."
        )
    if sha256(file) != digest:
        raise BlendedError(
            f"the report's {key} {shown_path(file)} has changed since that run, so the result would differ; restore the file."
        )
    return str(file.resolve())


def network_files(request: Request) -> dict[str, Path]:
    """The networks of a request that are files: the embedded ones, and those given by path."""
    files = {"ddpm": DDPM if request.ddpm == "embedded" else Path(request.ddpm)}
    alone = Path(request.clip)  # a file without the name of a model before it
    weights = alone if alone.is_absolute() else Path(request.clip.partition(":")[2])
    if request.clip == "embedded":
        files["clip"] = CLIP
    elif weights.is_absolute():
        files["clip"] = weights
    if request.lpips == "embedded":
        files["lpips"] = LPIPS
    return files
