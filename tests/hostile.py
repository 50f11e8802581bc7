"""Files that were made to harm, given to every loader in a process of its own: ``python -m tests.hostile FOLDER``.

Each pickle would create the file ``ran`` in FOLDER. Prints a JSON object: ``outcomes`` {'loader file': 'loaded' or the error}, which begins with RAN if
the pickle was run, and ``memory``, what a small file that names a large CLIP took in MiB, its size and the errors about it.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickle
import struct
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip

from blended_core import BlendedError, DeviceContext, load_clip, perceptual
from blended_core.adm.load import inspect_checkpoint, load_ddpm, may_be_checkpoint
from blended_core.clip.files import architecture_of, known_signatures
from blended_core.clip.model import load_clip_file, load_clip_tag

CONTEXT = DeviceContext.choose("cpu")
MODEL, TAG = "ViT-B-32", "laion2b_s34b_b79k"
REPOSITORY = "models--laion--CLIP-ViT-B-32-laion2B-s34B-b79K"
HEADER = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})]
"""Pickles before the content in the older format of torch.save."""


def text(value: str) -> bytes:
    """A pickled string, in the way that restricted unpicklers understand."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def payloads(marker: Path) -> dict[str, bytes]:
    """Pickles that create the marker when an ordinary unpickler reads them."""
    arguments = b"(" + text(str(marker)) + text("w") + b"t"
    run = b"cbuiltins\nopen\n" + arguments + b"R"
    mapping = b"ccollections\nOrderedDict\n)R"
    nested = b"".join(HEADER) + b"\x80\x02" + run + b"."
    return {
        "reduce": b"\x80\x02" + run + b".",
        # The restricted unpickler of PyTorch ends with a TypeError, which some callers answer by reading without restrictions.
        "typeerror": b"\x80\x02" + mapping + b"(N}" + text("x") + text("y") + b"stb" + run + b".",
        "wrong_call": b"\x80\x02" + run + b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01tR.",
        "state": b"\x80\x02" + mapping + b"}" + text("__setstate__") + run + b"sb.",
        "item": b"\x80\x02" + mapping + text("weight") + run + b"s.",
        "module": b"\x80\x02" + run + b"c__torch__\nNet\n)\x81}" + text("__setstate__") + b"cbuiltins\nopen\nsb" + arguments + b"b.",
        "nested": b"\x80\x02ctorch.storage\n_load_from_bytes\n(" + pickle.dumps(nested, 3)[2:-1] + b"tR.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\n(cbuiltins\n__dict__\n"
        + text("get")
        + b"tR"
        + text("open")
        + b"\x85R"
        + arguments
        + b"R.",
        "object": b"\x80\x02cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(" + text("O8") + b"I00\nI01\ntR" + run + b"tR.",
    }


def containers(payload: bytes) -> dict[str, bytes]:
    """The formats that a pickle may be in."""
    out = {"raw": payload, "legacy": b"".join(HEADER) + payload, "legacy_magic": payload + b"".join(HEADER)}
    for name, entries in {
        "zip": {"data.pkl": payload, "version": b"3", "byteorder": b"little"},
        "torchscript": {"data.pkl": payload, "code/__torch__.py": b"", "constants.pkl": payload, "version": b"3"},
        "deflated": {"data.pkl": payload, "version": b"3"},
    }.items():
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if name == "deflated" else zipfile.ZIP_STORED) as archive:
            for entry, data in entries.items():
                archive.writestr(f"archive/{entry}", data)
        out[name] = stream.getvalue()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tape:
        for entry in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(entry)
            info.size = len(payload)
            tape.addfile(info, io.BytesIO(payload))
    out["tar"] = stream.getvalue()
    header = b"{}".ljust(8)
    out["safetensors"] = struct.pack("<Q", len(header)) + header + payload
    return out


def loaders(hub: Path) -> dict[str, Callable[[Path], Any]]:
    """Everything of the library that opens a file of weights."""

    def tag(path: Path) -> Any:
        copy = hub / REPOSITORY / "snapshots" / "abc" / "open_clip_pytorch_model.bin"
        copy.write_bytes(path.read_bytes())
        return load_clip_tag(CONTEXT, f"{MODEL}:{TAG}")

    return {
        "load_clip FILE": lambda path: load_clip(CONTEXT, str(path)),
        "load_clip MODEL:FILE": lambda path: load_clip(CONTEXT, f"{MODEL}:{path}"),
        "load_clip_file": lambda path: load_clip_file(CONTEXT, path, MODEL),
        "load_clip_tag": tag,
        "architecture_of": architecture_of,
        "load_ddpm": lambda path: load_ddpm(CONTEXT, path),
        "inspect_checkpoint": inspect_checkpoint,
        "may_be_checkpoint": may_be_checkpoint,
        "load_perceptual": lambda path: perceptual.load_perceptual(CONTEXT, "squeeze", path),
    }


def large_claim(path: Path) -> None:
    """A small safetensors file with the tensors that determine the largest CLIP of open_clip."""
    known = known_signatures()["ViT-bigG-14"]
    text, vision = known["text"], known["vision"]
    shapes = {
        "token_embedding.weight": (text["vocab_size"], text["width"]),
        "positional_embedding": (text["context_length"], text["width"]),
        "text_projection": (text["width"], known["embed_dim"]),
        "logit_scale": (),
        "visual.conv1.weight": (vision["width"], 3, vision["patch_size"], vision["patch_size"]),
        "visual.positional_embedding": ((vision["image_size"] // vision["patch_size"]) ** 2 + 1, vision["width"]),
        f"transformer.resblocks.{text['layers'] - 1}.x": (0,),
        f"visual.transformer.resblocks.{vision['layers'] - 1}.x": (0,),
    }
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": (end, end + math.prod(shape))}
        end += math.prod(shape)
    described = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(described)) + described)
        stream.truncate(8 + len(described) + end)


def peak() -> float:
    """The largest memory of this process in MiB; 0 where Python does not know it."""
    if sys.platform != "linux":
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(folder: Path) -> dict[str, Any]:
    """What :func:`large_claim` takes; first of all, because a peak is never forgotten."""
    path, told = folder / "claims.safetensors", []
    large_claim(path)
    before = peak()
    for spec in (str(path), f"ViT-bigG-14:{path}", f"RN50x64:{path}", f"coca_ViT-L-14:{path}"):
        try:
            load_clip(CONTEXT, spec)
        except BlendedError as error:
            told.append(str(error))
    return {"taken": peak() - before, "size": path.stat().st_size / 2**20, "told": told}


def main(folder: Path) -> None:
    """Writes the files, and gives each to each loader."""
    from huggingface_hub import constants

    assert TAG in open_clip.list_pretrained_tags_by_model(MODEL)
    hub, marker = folder / "hub", folder / "ran"
    (hub / REPOSITORY / "snapshots" / "abc").mkdir(parents=True)
    (hub / REPOSITORY / "refs").mkdir()
    (hub / REPOSITORY / "refs" / "main").write_text("abc")
    constants.HF_HUB_CACHE = str(hub)
    measured, outcomes = memory(folder), {}
    squeeze = perceptual._network("squeeze")
    perceptual._network = lambda *_: squeeze  # building it takes longer than all the rest
    for name, payload in payloads(marker).items():
        with contextlib.suppress(Exception):
            pickle.loads(payload)
        outcomes[f"pickle {name}"] = "RAN" if marker.exists() else "did not run"
        marker.unlink(missing_ok=True)
        for container, data in containers(payload).items():
            for suffix in ("pt", "safetensors", "bin") if container in ("zip", "raw", "safetensors") else ("pt",):
                path = folder / f"{name}.{container}.{suffix}"
                path.write_bytes(data)
                for loader, load in loaders(hub).items():
                    try:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            load(path)
                        outcome = "loaded"
                    except BlendedError as error:
                        outcome = f"BlendedError: {error}"
                    except Exception as error:
                        outcome = f"{type(error).__name__}: {error}"
                    if marker.exists():
                        marker.unlink()
                        outcome = f"RAN: {outcome}"
                    outcomes[f"{loader} {path.name}"] = outcome
                path.unlink()
    json.dump({"memory": measured, "outcomes": outcomes}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
