"""The input of ``edit --from``: the request of a report, if its pictures and networks are unchanged."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

from ..errors import BlendedError, BlendedWarning
from ..io.atomic import sha256
from ..io.request import Request
from ..io.versions import library_versions, own_version
from ..toy.models import CLIP, DDPM, LPIPS


def request_of_report(path: Path) -> Request:
    """The request of a ``report.json``, with the current paths of its picture and mask.

    Raises:
        BlendedError: if the file is not a report, or a picture or network is missing or has changed.

    Warns:
        BlendedWarning: if the run used other versions of the libraries.
    """
    try:
        report = json.loads(path.read_text("utf-8"))
        request = Request.from_dict(report["request"])
        inputs = {key: report["inputs"][key] for key in ("image", "mask")}
        networks = dict(report.get("networks", {}).get("sha256", {}))
        versions = {"blended-diffusion": report.get("version"), **report.get("versions", {})}
    except FileNotFoundError:
        raise BlendedError(f"the report {path} does not exist; check the path.") from None
    except BlendedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BlendedError(f"{path} is not a report of blended-diffusion; give the report.json in a result folder.") from None
    request = replace(request, image=_found(path, "image", request.image, inputs["image"]))
    if request.mask is not None:
        request = replace(request, mask=_found(path, "mask", request.mask, inputs["mask"]))
    for name, digest in networks.items():
        file = network_files(request).get(name)
        if file is None or not file.is_file():
            raise BlendedError(f"the {name} network of that run, {file or getattr(request, name)}, does not exist anymore; restore it.")
        if (now := sha256(file)) != digest:
            raise BlendedError(
                f"the {name} network {file} is not the one of that run (SHA-256 {now[:12]}… instead of {str(digest)[:12]}…), so the result "
                "would differ; restore the file, or start a new run without --from."
            )
    present = {"blended-diffusion": own_version(), **library_versions()}
    if others := [f"{name} {then} (now {present[name]})" for name, then in versions.items() if present.get(name, then) != then]:
        warnings.warn(BlendedWarning(f"that run used {', '.join(others)}; the result may differ."), stacklevel=2)
    return request


def _found(report: Path, key: str, name: str, digest: str) -> str:
    """The path of a file that a report names: there, or beside the report."""
    file = next((file for file in (Path(name), report.parent / Path(name).name) if file.is_file()), None)
    if file is None:
        raise BlendedError(f"the report's {key} {name} does not exist anymore; restore it, or copy it beside {report.name}.")
    if sha256(file) != digest:
        raise BlendedError(f"the report's {key} {file} has changed since that run, so the result would differ; restore the file.")
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
