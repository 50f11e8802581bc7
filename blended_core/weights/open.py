"""Weights in files of any model: names, shapes and tensors, read without running anything that a file may carry.

Opening a file reads its description: the header of a safetensors file, or the pickle of a file of torch.save (:mod:`.pickled`). A tensor is read when it
is taken. Files are read, never mapped into memory: a mapped file that is shortened ends the process. Whatever a description claims is compared with
the size of the file first, so loading needs memory in proportion to the file.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from ..errors import BlendedError, reason
from .archive import Archive
from .pickled import MAX_DIMENSIONS, Module, PickleReader, RefusedName, StoredTensor

ZIP = b"PK\x03\x04"
"""First bytes of a file of torch.save since PyTorch 1.6, and of a TorchScript archive. The older format is a plain pickle."""
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""First two pickles of the older format."""
NAMES_BYTES = 1 << 23
"""Bytes at the beginning of a file that are searched for the names of its tensors."""
MAX_HEADER_BYTES = 6_000_000
"""Of the header of a safetensors file: more than 40,000 tensors. Parsed, it takes up to 25 times its size."""
MAX_PICKLE_BYTES = 1 << 25
"""Of the description in a file of torch.save."""
MAX_SIDECAR_BYTES = 1 << 20
MAX_NESTING = 32
"""Levels of dictionaries, lists and modules inside each other that are searched for tensors."""
MAX_TENSORS, MAX_NAME = 100_000, 500
"""Tensors of a file, and characters of the name of one. Tensors with longer names, or with control characters in them, are left out."""
SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
SHARD = re.compile(r"[-_.](\d{1,6})[-_]of[-_](\d{1,6})(?=[-_.])")
"""Part of the name of a file that holds one of several parts of a model."""


@dataclass(frozen=True)
class FileTensor:
    """Where a tensor is in a file.

    Attributes:
        dtype, shape, stride: of the tensor.
        begin: position of its first value in the file, in bytes.
        extent: values from its first to its last in the file.
        problem: why it cannot be read; '' if it can.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    begin: int
    extent: int
    problem: str = ""

    @property
    def nbytes(self) -> int:
        """Size in bytes when it is read."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check(self, name: str) -> None:
        """BlendedError, with this name, if the tensor cannot be read."""
        if self.problem:
            raise BlendedError(f"{name} is not a dense floating-point tensor: {self.problem}. Use the original file.")


@dataclass(frozen=True, eq=False)
class WeightsFile:
    """An opened file.

    Attributes:
        path: the file. size: in bytes.
        format: 'safetensors', 'torch' (a file of torch.save in either of its formats) or 'torchscript'.
        tensors: name → where the tensor is.
        metadata: texts of the metadata of a safetensors file; empty for other files.
    """

    path: Path
    size: int
    format: str
    tensors: Mapping[str, FileTensor]
    metadata: Mapping[str, str]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def check_size(self, names: Iterable[str]) -> None:
        """BlendedError if one of these tensors cannot be read, or if together they are larger than the file. Call it before a network gets memory."""
        tensors = {name: self.tensors[name] for name in names}
        for name, tensor in tensors.items():
            tensor.check(name)
        claimed = sum(tensor.nbytes for tensor in tensors.values())
        if claimed > self.size:
            raise BlendedError(
                f"its tensors claim {claimed} bytes, but the file has {self.size}: they share their values, which no network does. It is damaged, "
                "or made to use up memory; use another file."
            )

    def take(self, name: str) -> Tensor:
        """A tensor on the CPU in its stored precision, with memory of its own.

        Raises:
            BlendedError: if it is sparse, quantized or without values, or if the file has changed since it was opened.
        """
        tensor = self.tensors[name]
        tensor.check(name)
        values = torch.empty(tensor.extent * tensor.dtype.itemsize, dtype=torch.uint8)
        try:
            with self.path.open("rb", buffering=0) as stream:
                stream.seek(tensor.begin)
                rest = memoryview(cast(Any, values.numpy()))
                while rest and (count := stream.readinto(rest)):
                    rest = rest[count:]
                changed = bool(rest) or os.fstat(stream.fileno()).st_size != self.size
        except OSError as error:
            raise BlendedError(f"{name} cannot be read ({error.strerror or error}); check the disk.") from None
        if changed:
            raise BlendedError("the file has changed while it was read; wait until it is complete, and load it again.")
        return values.view(tensor.dtype).as_strided(tensor.shape, tensor.stride)


@contextlib.contextmanager
def file_errors(path: Path, option: str) -> Iterator[None]:
    """Puts the name of a file before the errors about it, and names the option that chose the file where an error names none."""
    try:
        yield
    except BlendedError as error:
        raise BlendedError(f"{path.name}: {error}", error.options or option) from None


def open_weights(path: Path, advice: str = "") -> WeightsFile:
    """Reads the names and shapes in a file; the format is determined from its first bytes, then from its name.

    Args:
        path: a safetensors file, or a file of torch.save in either of its formats: a state dict, or one inside dictionaries and lists. Names inside
            containers are joined by dots: 'ema.module.out.2.bias'.
        advice: a sentence about which file to use instead, for files without a state dict.

    Raises:
        BlendedError: if the file is absent, damaged, holds no tensors, or could only be read by running code. The text does not name the file.
    """
    try:
        if (path / "model_index.json").is_file() or (path / "unet" / "config.json").is_file():
            raise BlendedError(f"it is a folder in the layout of the diffusers library, not a checkpoint file. {advice}")
        if path.is_dir():
            raise BlendedError(f"{path} is a folder; give the checkpoint file in it.")
        if not path.exists():
            raise BlendedError(f"there is no file {path}; check the name.")
        shard = SHARD.search(path.name)
        if shard is not None and int(shard[2]) > 1:
            raise BlendedError(
                f"it is part {int(shard[1])} of {int(shard[2])} of a model that was saved in several files (shards). Join the parts into one file: "
                "load each, and save all tensors together as safetensors."
            )
        if not stat.S_ISREG(path.stat().st_mode):
            raise BlendedError(f"{path} is a pipe or a device, not a file.")
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(512)
            stream.seek(0)
            if not start:
                raise BlendedError("the file is empty; download it again.")
            if start.startswith(b"version https://git-lfs"):
                raise BlendedError("it is a Git LFS pointer, not the weights; download them with `git lfs pull`.")
            if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
                raise BlendedError(
                    "it is a web page, not a checkpoint: the server answered the download with an error or a form; download it again."
                )
            # Names of files lie, so the content decides. Neither a zip file nor a pickle has a brace as its ninth byte.
            if start.startswith(ZIP):
                return _open_torch(path, stream, size, start, advice)
            if start[8:9] == b"{" or (path.suffix.lower() == ".safetensors" and start[:1] != b"\x80"):
                return _open_safetensors(path, stream, size)
            return _open_torch(path, stream, size, start, advice)
    except OSError as error:
        raise BlendedError(f"the file cannot be read: {error.strerror or error}.") from None


def raw_names(path: Path) -> bytes | None:
    """Bytes that contain the names of the tensors in a file, at most :data:`NAMES_BYTES`; None if they cannot be located. Reads no tensor."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return b""
        with path.open("rb") as stream:
            start = stream.read(9)
            if start.startswith(ZIP):
                archive = Archive(stream)
                return archive.read(archive.description, NAMES_BYTES)
            if start[8:9] == b"{":
                stream.seek(8)
                return stream.read(min(int.from_bytes(start[:8], "little"), NAMES_BYTES))
            return start + stream.read(NAMES_BYTES)
    except Exception:  # a damaged archive can raise nearly anything
        return None


def read_sidecar(path: Path) -> dict[str, Any]:
    """The JSON object in FILE.json beside FILE.pt; empty if there is no such file.

    Raises:
        BlendedError: if it cannot be read or is not a JSON object.
    """
    sidecar = path.with_suffix(".json")
    if sidecar == path or not os.path.isfile(sidecar):
        return {}
    try:
        with sidecar.open("rb") as stream:
            data = stream.read(MAX_SIDECAR_BYTES + 1)
        if len(data) > MAX_SIDECAR_BYTES:
            raise ValueError(f"it has more than {MAX_SIDECAR_BYTES} bytes")
        text = data.decode()
    except (OSError, ValueError) as error:
        raise BlendedError(f"its sidecar {sidecar.name} cannot be read ({reason(error)}); fix or remove it.") from None
    return json_object(text, f"its sidecar {sidecar.name}")


def json_object(text: str, name: str) -> dict[str, Any]:
    """Parses a JSON object; ``name`` is the subject of the error if it is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BlendedError(f"{name} is not valid JSON ({reason(error)}); fix or remove it.") from None
    if not isinstance(value, dict):
        raise BlendedError(f"{name} must be a JSON object of settings, not a {type(value).__name__}; fix or remove it.")
    return value


def _is_name(text: str) -> bool:
    return len(text) <= MAX_NAME and text.isprintable()


def _open_safetensors(path: Path, stream: BinaryIO, size: int) -> WeightsFile:
    try:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise ValueError(f"its header has {length} bytes, but the file {size}")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes, more than any checkpoint")
        header = json.loads(stream.read(length).decode())
        metadata = header.pop("__metadata__", {})
        if len(header) > MAX_TENSORS or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its header is not that of a checkpoint")
        found = {name: _safetensor(entry, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for tensor, stop in sorted(found.values(), key=lambda pair: (pair[0].begin, pair[1])):
            if tensor.begin != end:
                raise ValueError("its tensors do not lie one after the other")
            end = stop
        if end != size:
            raise ValueError(f"its tensors end at byte {end}, but the file has {size}")
    except Exception as error:  # a damaged header can raise nearly anything
        raise BlendedError(f"it is not a complete safetensors file ({reason(error)}); download it again.") from None
    return WeightsFile(path, size, "safetensors", {name: tensor for name, (tensor, _) in found.items() if _is_name(name)}, metadata)


def _safetensor(entry: Mapping[str, Any], base: int) -> tuple[FileTensor, int]:
    """A tensor of the header of a safetensors file, and where its values end."""
    shape, (begin, end), kind = tuple(entry["shape"]), entry["data_offsets"], str(entry["dtype"])
    if any(type(n) is not int or n < 0 for n in (*shape, begin, end)) or end < begin or len(shape) > MAX_DIMENSIONS:
        raise ValueError("the shape or the position of a tensor is not a list of numbers")
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    dtype = SAFETENSORS.get(kind)
    if dtype is None:  # a type of less than a byte
        return FileTensor(torch.uint8, shape, stride, base + begin, 0, f"its values are of the type {kind[:20]}"), base + end
    count = math.prod(shape)
    if count * dtype.itemsize != end - begin:
        raise ValueError("a tensor does not have the size of its shape")
    return FileTensor(dtype, shape, stride, base + begin, count), base + end


def _open_torch(path: Path, stream: BinaryIO, size: int, start: bytes, advice: str) -> WeightsFile:
    kind = "PyTorch checkpoint"
    try:
        if start.startswith(ZIP):
            archive = Archive(stream)
            kind = "TorchScript archive" if archive.is_torchscript else kind
            content, positions = _read_archive(archive)
        else:
            content, positions = _read_legacy(stream, size)
        found = _flatten(content)
        tensors = {name: _placed(tensor, positions) for name, tensor in found.items()}
    except BlendedError:
        raise
    except RefusedName as refused:
        raise BlendedError(_refusal(str(refused), advice)) from None
    except Exception as error:  # a damaged or malicious file can raise nearly anything
        raise BlendedError(
            f"it is not a complete {kind} ({reason(error)}); download it again, or use a .safetensors or .pt file."
        ) from None
    if not tensors and isinstance(content, dict) and "param_groups" in content:
        raise BlendedError("it is the state of an optimizer, not a network. Use the file with the weights, usually in the same folder.")
    if not tensors:
        raise BlendedError(f"it holds no tensors, only a {type(content).__name__}. {advice}".strip())
    return WeightsFile(path, size, "torchscript" if kind.startswith("TorchScript") else "torch", tensors, {})


def _read_archive(archive: Archive) -> tuple[Any, dict[str, tuple[int, int]]]:
    """(content, key of a storage → its position and size in bytes) of a zip file."""
    name = archive.description
    root = name.removesuffix("data.pkl")
    if f"{root}byteorder" in archive.entries and archive.read(f"{root}byteorder", 8).strip() == b"big":
        raise BlendedError("its values have the byte order of another kind of computer; save it again on an ordinary one.")
    if archive.locate(name)[1] > MAX_PICKLE_BYTES:
        raise ValueError("its description is larger than that of any checkpoint")
    content = PickleReader(io.BytesIO(archive.read(name, MAX_PICKLE_BYTES))).read()
    data = f"{root}data/"
    return content, {entry[len(data) :]: archive.locate(entry) for entry in archive.names if entry.startswith(data)}


def _read_legacy(stream: BinaryIO, size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The same for the older format: pickles, then the values of one storage after the other, each with their number before them."""
    description = io.BytesIO(stream.read(MAX_PICKLE_BYTES))
    reader = PickleReader(description)
    if reader.read() != LEGACY_MAGIC or reader.read() != LEGACY_PROTOCOL:
        raise ValueError("it does not begin as files of torch.save do")
    if reader.read().get("little_endian") is not True:
        raise BlendedError("its values have the byte order of another kind of computer; save it again on an ordinary one.")
    content, keys = reader.read(), reader.read()
    positions, at = {}, description.tell()
    for key in keys:
        stream.seek(at)
        count = int.from_bytes(stream.read(8), "little")
        nbytes = count * reader.storages[str(key)].dtype.itemsize
        positions[str(key)] = at + 8, nbytes
        at += 8 + nbytes
        if at > size:
            raise ValueError("its values are cut off")
    return content, positions


def _placed(tensor: StoredTensor, positions: Mapping[str, tuple[int, int]]) -> FileTensor:
    """The place of a tensor in the file."""
    if tensor.storage is None:
        return FileTensor(tensor.dtype, tensor.shape, tensor.stride, 0, 0, tensor.problem)
    begin, nbytes = positions.get(tensor.storage.key, (0, -1))
    if nbytes != tensor.storage.nbytes:
        raise ValueError(f"storage {tensor.storage.key} does not have the declared size")
    at = begin + tensor.offset * tensor.dtype.itemsize
    return FileTensor(tensor.dtype, tensor.shape, tensor.stride, at, tensor.extent, tensor.problem)


def _refusal(name: str, advice: str) -> str:
    """Why a file that asks for a function or a class is refused."""
    if name.startswith(("torch_utils.", "dnnlib.")):
        return f"it is a pickle with program code in the format of EDM and StyleGAN (torch_utils), which is not run here. {advice}".strip()
    return (
        f"it holds more than tensors: it asks for {name[:100]}; reading it would run code, which weights do not need, so it is refused. If you trust "
        "the file, save its state dict alone, preferably as safetensors, and use that."
    )


def _flatten(content: object) -> dict[str, StoredTensor]:
    """All tensors in nested dictionaries, lists and modules, with their keys joined by dots. Each container is visited once, however often it is
    referenced."""
    tensors: dict[str, StoredTensor] = {}
    seen: set[int] = set()

    def visit(item: object, name: str, depth: int) -> None:
        if not _is_name(name):
            return
        if isinstance(item, StoredTensor):
            tensors.setdefault(name, item)
            if len(tensors) > MAX_TENSORS:
                raise ValueError(f"it holds more than {MAX_TENSORS} tensors")
        elif isinstance(item, (dict, list, tuple, Module)) and id(item) not in seen and depth <= MAX_NESTING:
            seen.add(id(item))
            item = item.state if isinstance(item, Module) else item
            for key, value in item.items() if isinstance(item, dict) else enumerate(item):
                if isinstance(value, (StoredTensor, dict, list, tuple, Module)):
                    visit(value, f"{name}.{key}" if depth else str(key), depth + 1)

    visit(content, "", 0)
    return tensors
