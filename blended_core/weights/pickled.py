"""The description in a file of torch.save: a pickle, interpreted without running anything.

A pickle is a program for a machine with a stack. The standard library lists its instructions (:func:`pickletools.genops`), and the machine here carries
out those that files of weights need. It makes dictionaries, lists, numbers and texts, and for each tensor a note of where its values are
(:class:`StoredTensor`). The names of functions and classes in the file are compared with a list; none is imported or called, and no object of the
process is reachable from the file. Every claim is checked against the size of what it claims, so a small file cannot take much memory.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import torch

MAX_INSTRUCTIONS = 2_000_000
"""Of one pickle. The largest published checkpoints with their optimizers need a tenth of it."""
MAX_INTEGER_BITS = 128
MAX_DIMENSIONS = 16
DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
"""'torch.float32' → torch.float32."""
STORAGES = {
    **{f"torch.{name}Storage": dtype for name, dtype in {
        "Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64, "Char": torch.int8,
        "Byte": torch.uint8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64, "Bool": torch.bool,
        "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "QInt8": torch.qint8, "QUInt8": torch.quint8,
        "QInt32": torch.qint32, "QUInt4x2": torch.quint4x2, "QUInt2x4": torch.quint2x4,
    }.items()},
    "torch.storage.UntypedStorage": torch.uint8,
}  # fmt: skip
TENSORS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
PARAMETERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")
DICTIONARIES = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter"}
IGNORED = {
    "torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter", "torch.serialization._get_layout", "_codecs.encode",
    "argparse.Namespace", "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "complex", "bytearray", "list", "dict", "int", "float")),
    *(name for name in DTYPES if name.startswith("torch.")),
    "torch.per_tensor_affine", "torch.per_channel_affine", "torch.per_channel_affine_float_qparams",
}  # fmt: skip
"""Names of what stands beside weights and is not read: settings, and single numbers of numpy."""
SCRIPTED, TYPED_LISTS = "__torch__", "torch.jit._pickle."
"""Beginnings of names in TorchScript archives: classes of modules, and lists with a type."""


class RefusedName(Exception):
    """A pickle asks for a function or class that weights do not need; the argument is its name."""


@dataclass(frozen=True)
class Storage:
    """A block of values: the values are in the file under ``key``."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that was not read.

    Attributes:
        storage: where its values are; None if it has none in this file.
        offset, shape, stride: in values of ``dtype``, within the storage.
        problem: why the tensor cannot be read; '' if it can.
    """

    storage: Storage | None
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    problem: str = ""

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        """Number of values in the storage from the first to the last of this tensor."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) if self.count else 0


class Module:
    """Takes the place of a module of a TorchScript archive, or of another object whose class is not loaded; ``state`` has its attributes."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: dict[Any, Any] = {}


@dataclass(frozen=True)
class _Name:
    """The name of a function or a class."""

    text: str


class PickleReader:
    """Reads the pickles in a stream, one after the other.

    Attributes:
        storages: key → storage, of all storages that were named so far.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.storages: dict[str, Storage] = {}

    def read(self) -> Any:
        """The content of the next pickle; the stream is left at its end.

        Returns:
            Dictionaries, lists, tuples, numbers, texts, bytes, :class:`StoredTensor` and :class:`Module`; None in place of anything else that is known
            to be harmless.

        Raises:
            RefusedName: for the name of anything else.
            Exception: of nearly any kind, if the pickle is damaged.
        """
        return _Machine(self.storages).run(self.stream)


class _Machine:
    def __init__(self, storages: dict[str, Storage]) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages

    def run(self, stream: BinaryIO) -> Any:
        for number, (code, argument, _) in enumerate(pickletools.genops(stream)):
            if number > MAX_INSTRUCTIONS:
                raise ValueError(f"its description has more than {MAX_INSTRUCTIONS} instructions")
            if code.name == "STOP":
                return self.stack.pop()
            self.step(code.name, argument)
        raise ValueError("its description has no end")

    def pop_mark(self) -> list[Any]:
        """What was pushed since the last mark."""
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def step(self, code: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        match code:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "POP":
                pop()
            case "POP_MARK":
                self.pop_mark()
            case "DUP":
                push(self.stack[-1])
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(code == "NEWTRUE")
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4":
                if argument.bit_length() > MAX_INTEGER_BITS:
                    raise ValueError("a number in its description is too large")
                push(argument)
            case (
                "FLOAT" | "BINFLOAT" | "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE"
                | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8"
            ):  # fmt: skip
                push(argument)
            case "EMPTY_LIST" | "EMPTY_SET":
                push([])
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_DICT":
                push({})
            case "LIST" | "FROZENSET":
                push(self.pop_mark())
            case "TUPLE":
                push(tuple(self.pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(code[-1])
                items = self.stack[-count:]
                del self.stack[-count:]
                if len(items) < count:
                    raise ValueError("its description takes more than it has")
                push(tuple(items))
            case "DICT":
                items = self.pop_mark()
                push({})
                self.fill(self.stack[-1], items)
            case "APPEND":
                item = pop()
                self.top(list).append(item)
            case "APPENDS" | "ADDITEMS":
                items = self.pop_mark()
                self.top(list).extend(items)
            case "SETITEM":
                value, key = pop(), pop()
                self.fill(self.top(dict), [key, value])
            case "SETITEMS":
                items = self.pop_mark()
                self.fill(self.top(dict), items)
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GLOBAL":
                push(_known(".".join(argument.split(" ", 1))))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                push(_known(f"{module}.{name}"))
            case "REDUCE" | "NEWOBJ":
                arguments, called = pop(), pop()
                push(_result(called, arguments))
            case "BUILD":
                state, item = pop(), self.stack[-1]
                if isinstance(item, Module) and isinstance(state, dict):
                    item.state = state
            case "BINPERSID":
                push(self.storage(pop()))
            case _:
                raise RefusedName(f"the instruction {code}")

    def storage(self, pid: Any) -> tuple[Storage, int]:
        """The storage of a persistent id, and where in it a view of an old file begins."""
        kind, dtype, key, _, count = pid[:5]
        if kind != "storage" or not isinstance(dtype, _Name) or not str(key).isdecimal() or type(count) is not int or count < 0:
            raise ValueError("a part of its description is not a storage")
        found = Storage(str(key), STORAGES[dtype.text], count)
        if self.storages.setdefault(found.key, found) != found:
            raise ValueError(f"its storage {found.key} has two sizes")
        return found, 0 if len(pid) < 6 or pid[5] is None else pid[5][1]

    def top(self, kind: type) -> Any:
        """The last item, which must be of a kind. What is not read is replaced by an empty one."""
        item = self.stack[-1]
        if item is None:
            return kind()
        if type(item) is not kind:
            raise ValueError(f"its description has a {type(item).__name__} where a {kind.__name__} belongs")
        return item

    @staticmethod
    def fill(target: dict[Any, Any], items: Sequence[Any]) -> None:
        """Adds keys and values, which alternate. Other keys than texts and numbers are left out: the names of weights need none."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, (str, int, float, bytes)):
                target[key] = value


def _known(text: str) -> _Name:
    """A name of the list of known ones."""
    text = text.replace("torch.cuda.", "torch.", 1)
    module, _, name = text.rpartition(".")
    known = (
        text in STORAGES
        or (module == "torch._utils" and name in (*TENSORS, *PARAMETERS, "_rebuild_sparse_tensor", "_rebuild_meta_tensor_no_storage"))
        or text in DICTIONARIES
        or text in IGNORED
        or text == "torch._tensor._rebuild_from_type_v2"
        or text.startswith((SCRIPTED + ".", TYPED_LISTS))
    )
    if not known:
        raise RefusedName(text)
    return _Name(text)


def _result(called: Any, arguments: Any) -> Any:
    """What takes the place of the result of a call, or of a new object."""
    if not isinstance(called, _Name) or not isinstance(arguments, tuple):
        raise ValueError("its description calls something that is not a name")
    name = called.text.rpartition(".")[2]
    if called.text.startswith(SCRIPTED + "."):
        return Module()
    if called.text.startswith(TYPED_LISTS) or called.text == "torch.Size":
        return arguments[0] if arguments else None
    if called.text in DICTIONARIES:
        made: dict[Any, Any] = {}
        for pair in arguments[0] if arguments and isinstance(arguments[0], list) else ():
            _Machine.fill(made, pair)
        return made
    if name in TENSORS:
        storage, offset, shape, stride = arguments[:4]
        dtype = _dtype(arguments[6]) if name.endswith("_v3") else None
        return _tensor(storage, offset, shape, stride, dtype)
    if name in PARAMETERS:
        return arguments[0]
    if name == "_rebuild_from_type_v2":
        return _result(arguments[0], arguments[2])
    if name == "_rebuild_sparse_tensor":
        return _without_values(arguments[1][2], "it is sparse")
    if name == "_rebuild_meta_tensor_no_storage":
        return _without_values(arguments[1], "it has no values")
    return None


def _dtype(name: Any) -> torch.dtype:
    return DTYPES[name.text]


def _sizes(*sizes: Any) -> tuple[tuple[int, ...], ...]:
    out = []
    for size in sizes:
        if len(size) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in size):
            raise ValueError("a tensor exceeds its storage")
        out.append(tuple(size))
    return tuple(out)


def _without_values(size: Any, problem: str) -> StoredTensor:
    (shape,) = _sizes(size)
    return StoredTensor(None, torch.float32, 0, shape, (0,) * len(shape), problem)


def _tensor(stored: Any, offset: Any, size: Any, step: Any, dtype: torch.dtype | None) -> StoredTensor:
    storage, begin = stored
    if not isinstance(storage, Storage) or type(offset) is not int or type(begin) is not int or min(offset, begin) < 0:
        raise ValueError("a tensor exceeds its storage")
    shape, stride = _sizes(size, step)
    made = StoredTensor(storage, dtype or storage.dtype, begin + offset, shape, stride)
    capacity = storage.nbytes // made.dtype.itemsize
    if made.extent and made.offset + made.extent > capacity:
        raise ValueError("a tensor exceeds its storage")
    if str(made.dtype).startswith("torch.q"):
        return replace(made, problem="it is quantized")
    if made.count > capacity:
        return replace(made, problem=f"it claims {made.count} values, but the file has {capacity} for it")
    return made
