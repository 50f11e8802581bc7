"""Reading weights of any model: sets of weights, file formats, hostile and damaged files."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from blended_core.adm.load import may_be_checkpoint
from blended_core.errors import BlendedError
from blended_core.weights.open import open_weights
from blended_core.weights.sets import choose_set, weight_sets

from .fuzz import mutated

ANCHOR, PARTS = "time_embed.0.weight", ("output_blocks.",)
OWN = {"time_embed.0.weight": (4, 2), "input_blocks.0.0.weight": (2, 3), "output_blocks.0.0.weight": (2, 2), "out.2.bias": (6,)}


def under(prefix: str) -> dict[str, tuple[int, ...]]:
    """The small network with a prefix."""
    return {prefix + name: shape for name, shape in OWN.items()}


# --- sets of weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "net_EMA.",
        "netEMA.",
        "ModelEMA.",
        "averaged_model.module.",
        "swa_model.module.",
        "params_ema.",
        "state_dict_ema.module.",
        "EMAModel.x.",
    ],
)
def test_an_average_is_recognized_by_a_word_of_its_prefix(prefix: str) -> None:
    best, other = weight_sets({**under("m."), **under(prefix), prefix + "n_averaged": ()}, ANCHOR, PARTS)
    assert (best.prefix, best.averaged, other.prefix, other.averaged) == (prefix, True, "m.", False)
    assert best.names == {**{name: prefix + name for name in OWN}, "n_averaged": prefix + "n_averaged"}
    assert not any(s.averaged for s in weight_sets({**under("schema."), **under("temax.")}, ANCHOR, PARTS))


def test_averages_with_other_names_are_matched_with_the_network() -> None:
    for container in ("", "state_dict."):
        lit = {f"{container}model_ema.diffusion_model{name.replace('.', '')}": shape for name, shape in OWN.items()}
        counts = {f"{container}model_ema.decay": (), f"{container}model_ema.num_updates": ()}
        best, other = weight_sets({**under(f"{container}model.diffusion_model."), **lit, **counts}, ANCHOR, PARTS)
        assert (best.name, best.averaged, dict(best.names)) == (f"{container}model_ema", True, dict(zip(OWN, lit, strict=True)))
        assert other.name == f"{container}model.diffusion_model" and other.complete
        shadow = {f"{container}ema.shadow_params.{i}": shape for i, shape in enumerate(OWN.values())}
        best, other = weight_sets({**under("model."), "model.betas": (9,), **shadow, "ema.decay": ()}, ANCHOR, PARTS)
        assert best.names == {**dict(zip(OWN, shadow, strict=True)), "betas": "model.betas"} and best.averaged and best.complete
    unfit = {f"ema.shadow_params.{i}": (5, 5) for i in range(len(OWN))}
    first, second = weight_sets({**under("model."), **unfit}, ANCHOR, PARTS)
    assert first.name == "model" and not second.complete
    with pytest.raises(BlendedError, match=r"shadow_params.*does not fit"):
        choose_set((first, second), second.name)


def test_a_set_is_chosen_by_its_name_or_a_part_of_it() -> None:
    sets = weight_sets({**under(""), **under("a.ema."), **under("b.model."), **under("c.model.")}, ANCHOR, PARTS)
    assert [choose_set(sets, name).prefix for name in ("root", "ema", "a.ema", "b.model.", "b")] == [
        "",
        "a.ema.",
        "a.ema.",
        "b.model.",
        "b.model.",
    ]
    for name, says in (
        ("model", "2 sets of weights named 'model'"),
        ("none", "no set of weights named 'none'; it holds a.ema .averaged., root"),
    ):
        with pytest.raises(BlendedError, match=says) as caught:
            choose_set(sets, name)
        assert caught.value.options == ("ddpm_weights",)


def test_the_search_for_sets_takes_time_in_proportion_to_the_names() -> None:
    many = range(40000)
    for shapes in (
        {f"p{i}.{name}": shape for i in many for name, shape in OWN.items()},
        {**{f"p{i}.time_embed0weight": (4, 2) for i in many}, **{f"m.{i}": () for i in range(2000)}, **under("m.")},
        {**{f"p{i}.shadow_params.0": (4, 2) for i in many}, **{f"m.{i}": () for i in range(2000)}, **under("m.")},
        {**{"." * i + "x": () for i in range(500)}, **under("")},
    ):
        began = time.process_time()
        assert weight_sets(shapes, ANCHOR, PARTS)
        assert time.process_time() - began < 20  # some tenths; minutes where every name is compared with every prefix


# --- formats --------------------------------------------------------------------------------------------------------


def many_tensors() -> dict[str, torch.Tensor]:
    """One tensor of every kind that torch.save and safetensors store."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
    )
    values = torch.randn(4, 3, 2, 2, generator=generator)
    return {
        **{"as " + str(dtype).removeprefix("torch."): (values * 3).to(dtype) for dtype in dtypes},
        "transposed": values.transpose(0, 1), "channels last": values.contiguous(memory_format=torch.channels_last), "part": values[1:3, :, 1],
        "number": torch.tensor(3.5), "nothing": torch.zeros(0, 3), "parameter": torch.nn.Parameter(values),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "torchscript"])
def test_every_kind_of_tensor_is_read_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    tensors, path = many_tensors(), tmp_path / "named.bin"
    if kind == "safetensors":
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path, {"format": "pt", "text": "é"})
    elif kind == "torchscript":
        del tensors["as float8_e4m3fn"]  # not in TorchScript

        class Net(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name, value in tensors.items():
                    self.register_buffer(name.replace(" ", "_"), value.detach())

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + self.as_float32  # type: ignore[operator]

        torch.jit.trace(Net(), torch.zeros(4, 3, 2, 2)).save(str(path))
        tensors = {name.replace(" ", "_"): value for name, value in tensors.items()}
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    file = open_weights(path)
    assert file.format == {"zip": "torch", "legacy": "torch"}.get(kind, kind) and file.size == path.stat().st_size
    assert file.metadata == ({"format": "pt", "text": "é"} if kind == "safetensors" else {})
    assert file.shapes == {name: tuple(value.shape) for name, value in tensors.items()}
    for name, value in tensors.items():
        taken = file.take(name)
        assert taken.dtype == value.dtype and torch.equal(taken.to(torch.float64), value.detach().to(torch.float64)), name


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    state = {"weight": torch.arange(6.0).view(2, 3)}
    for suffix in (".bin", ".pt", ".ckpt", ".safetensors"):
        for save in (
            lambda path: save_file(state, path),
            lambda path: torch.save(state, path),
            lambda path: torch.save(state, path, _use_new_zipfile_serialization=False),
        ):
            save(tmp_path / f"x{suffix}")
            assert torch.equal(open_weights(tmp_path / f"x{suffix}").take("weight"), state["weight"])


def test_one_part_of_several_says_so(tmp_path: Path) -> None:
    for name in ("model-00002-of-00003.safetensors", "pytorch_model-00002-of-00003.bin", "x_2_of_3.pt"):
        torch.save({"weight": torch.zeros(1)}, tmp_path / name)
        with pytest.raises(BlendedError, match=r"part 2 of 3 .*shards.*Join the parts"):
            open_weights(tmp_path / name)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "model-00001-of-00001.pt")
    assert open_weights(tmp_path / "model-00001-of-00001.pt").shapes == {"weight": (1,)}


def test_what_stands_beside_weights_does_not_matter(tmp_path: Path) -> None:
    import argparse

    import numpy as np

    beside = {
        "args": argparse.Namespace(lr=0.1, name="x"), "best": np.float64(0.5), "size": torch.Size((2, 3)), "device": torch.device("cpu"), "set": {1, 2},
        "dtype": torch.float16, "bytes": b"1", ("a", "tuple"): 1, 3: None, "big": 2**70, "sparse": torch.eye(2).to_sparse(),
    }  # fmt: skip
    for zipped in (True, False):
        torch.save({**beside, "model": {"weight": torch.ones(2)}}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        file = open_weights(tmp_path / "x.pt")
        assert file.shapes == {"sparse": (2, 2), "model.weight": (2,)} and torch.equal(file.take("model.weight"), torch.ones(2))
        with pytest.raises(BlendedError, match="sparse is not a dense"):
            file.take("sparse")


# --- files that change, and folders with anything in them -----------------------------------------------------------


def test_a_file_that_is_shortened_while_it_is_read_gives_an_error(tmp_path: Path) -> None:
    """A file that is mapped into memory would end the process instead."""
    state = {"a": torch.zeros(100_000), "b": torch.ones(100_000)}
    for name, save in (("x.pt", torch.save), ("x.safetensors", save_file)):
        path = tmp_path / name
        save(state, path)
        file = open_weights(path)
        assert torch.equal(file.take("a"), state["a"])
        maps = Path("/proc/self/maps")
        assert not maps.exists() or name not in maps.read_text()
        with path.open("r+b") as stream:
            stream.truncate(500_000)
        for key in state:
            with pytest.raises(BlendedError, match="has changed while it was read"):
                file.take(key)
        path.unlink()
        with pytest.raises(BlendedError, match="cannot be read"):
            file.take("a")


def small_files(folder: Path) -> list[Path]:
    """A network without values in every format, compressed ones included."""
    names = [*OWN, *(f"output_blocks.{i}.0.in_layers.0.weight" for i in range(20))]
    state = {name: torch.zeros(1) for name in names}
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "x.safetensors")
    with zipfile.ZipFile(folder / "zip.pt") as whole, zipfile.ZipFile(folder / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.namelist():
            packed.writestr(entry, whole.read(entry))
    return sorted(folder.iterdir())


def mutated_files(source: Path, target: Path, count: int) -> None:
    """Damaged copies of :func:`small_files`."""
    source.mkdir()
    target.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    whole = small_files(source)
    for number in range(count):
        file = whole[number % len(whole)]
        (target / f"{number}{file.suffix}").write_bytes(mutated(file.read_bytes(), rng))


def test_whether_a_damaged_file_is_listed_never_raises(tmp_path: Path) -> None:
    mutated_files(tmp_path / "whole", tmp_path / "there", 1000)
    for path in sorted((tmp_path / "there").iterdir()):
        assert may_be_checkpoint(path) in (True, False)
        try:
            open_weights(path)
        except BlendedError as error:
            assert str(error).endswith(".")
    if hasattr(os, "mkfifo"):  # opening one waits for a writer
        os.mkfifo(tmp_path / "pipe.pt")
        assert not may_be_checkpoint(tmp_path / "pipe.pt")
        with pytest.raises(BlendedError, match="a pipe or a device"):
            open_weights(tmp_path / "pipe.pt")


# --- hostile files --------------------------------------------------------------------------------------------------


def archive(path: Path, description: bytes, *, code: bool = True, pack: int = zipfile.ZIP_STORED, **values: bytes) -> Path:
    """A file of torch.save, or with ``code`` a TorchScript archive, with this description; ``_0``: the values of storage 0."""
    with zipfile.ZipFile(path, "w", pack) as made:
        made.writestr("x/data.pkl", description)
        if code:
            made.writestr("x/code/__torch__.py", "")
        for name, data in values.items():
            made.writestr(f"x/data/{name[1:]}", data)
    return path


class Stored:
    """Pickled as a tensor on storage 0."""

    def __init__(self, count: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> None:
        self.storage, self.call = ("storage", torch.FloatStorage, "0", "cpu", count), (offset, size, stride, False, {})


def described(content: Any) -> bytes:
    """The pickle of a content with :class:`Stored` tensors."""

    class Place:
        def __init__(self, pid: tuple[Any, ...]) -> None:
            self.pid = pid

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return item.pid if isinstance(item, Place) else None

        def reducer_override(self, item: Any) -> Any:
            return (torch._utils._rebuild_tensor_v2, (Place(item.storage), *item.call)) if isinstance(item, Stored) else NotImplemented

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(content)
    return stream.getvalue()


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


NET = b"\x80\x02c__torch__\nNet\n"
"""Beginning of a TorchScript description: the class of a module is on the stack."""
POISONS = {
    "__new__": NET + b"}X\x07\0\0\0__new__NsbN.",
    "__setstate__": NET + b"}X\x0c\0\0\0__setstate__NsbN.",
    "slots": NET + b"N}X\x0c\0\0\0__setstate__Ns\x86bN.",
    "class of a module": NET + b")\x81}X\x09\0\0\0__class__Nsb.",
    "defaults of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\0\0\0__defaults__Ns\x86bN.",
    "dictionary of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\0\0\0xNsbN.",
    "class of dictionaries": b"\x80\x02ccollections\nOrderedDict\nN}X\x06\0\0\0updateNs\x86bN.",
    "an ordered dictionary": b"\x80\x02ccollections\nOrderedDict\n)RN}X\x08\0\0\0__dict__Ns\x86bN.",
    "attribute of torch": b"\x80\x02ctorch\nFloatStorage\n}X\x05\0\0\0dtypeNsbN.",
}


def test_no_file_changes_how_the_next_one_is_read(tmp_path: Path) -> None:
    values = torch.arange(4.0)
    description = NET + b")\x81}X\x06\0\0\0weight" + described(Stored(4, (2, 2), (2, 1)))[2:-1] + b"sb."
    good = archive(tmp_path / "good.pt", description, _0=values.numpy().tobytes())
    torch.save({"a": values}, tmp_path / "plain.pt")
    for name, poison in POISONS.items():
        for code in (True, False):
            with pytest.raises(BlendedError):
                open_weights(archive(tmp_path / "bad.pt", poison, code=code))
            file = open_weights(good)
            assert file.format == "torchscript" and file.shapes == {"weight": (2, 2)}, name
            assert torch.equal(file.take("weight"), values.view(2, 2)) and torch.equal(
                open_weights(tmp_path / "plain.pt").take("a"), values
            ), name


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_file_runs_anything(protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target = tmp_path / "ran"
    for content in (
        Calls(os.system, f"touch {target}"),
        Calls(Path.touch, target),
        Calls(exec, "1"),
        Calls(getattr, 1, "real"),
        Calls(__import__, "os"),
    ):
        for wrapped in (content, {"weight": torch.zeros(2), "extra": content}, [content]):
            data = pickle.dumps(content, protocol)
            for path in (archive(tmp_path / "a.pt", data, code=True), archive(tmp_path / "b.pt", data, code=False), tmp_path / "c.pt"):
                if path.name == "c.pt":
                    torch.save(wrapped, path, pickle_protocol=max(2, protocol), _use_new_zipfile_serialization=protocol == 4)
                with pytest.raises(BlendedError, match=r"holds more than tensors: it asks for .*refused"):
                    open_weights(path)
    assert not target.exists()


def test_no_text_of_a_file_reaches_the_terminal_as_a_control_sequence(tmp_path: Path) -> None:
    path, escape = tmp_path / "x.pt", "\x1b[2J"
    contents: list[Any] = [
        {escape: torch.zeros(1), "a": torch.zeros(1)},
        {"a": {escape * 3: {"b": torch.zeros(1)}}},
        {"a" * 600: torch.zeros(1)},
    ]
    for content in contents:
        torch.save(content, path)
        try:
            assert list(open_weights(path).shapes) == ["a"]
        except BlendedError as error:
            assert "no tensors" in str(error)
    archive(path, b"\x80\x02c" + escape.encode() + b"\nx\n.", code=False)
    with pytest.raises(BlendedError) as caught:
        open_weights(path)
    assert "asks for \N{REPLACEMENT CHARACTER}[2J.x" in str(caught.value) and str(caught.value).isprintable()


def hostile_files(folder: Path) -> None:
    """Small files that claim much memory, in every way that the formats have."""
    from blended_core.adm.unet import UNetConfig

    from .families import FAMILIES, table

    large = UNetConfig(256, 4096, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), num_head_channels=64, resblock_updown=True, use_scale_shift_norm=True)
    for name, config in (("large", large), ("published", FAMILIES["openai 256 uncond"][0])):
        claims = {k: torch.zeros(1).expand(shape) for k, shape in table(config).items()}
        torch.save(claims, folder / f"one value, {name}.pt")
        torch.save(claims, folder / f"one value, {name}, legacy.pt", _use_new_zipfile_serialization=False)
    config = UNetConfig(32, 256, (1, 2, 2), 2, (2, 4), num_head_channels=64)
    most = max(torch.Size(shape).numel() for shape in table(config).values())
    shared = torch.zeros(most)
    torch.save({k: shared[: torch.Size(s).numel()].view(s) for k, s in table(config).items()}, folder / "one storage.pt")
    module = b")\x81}X\x06\0\0\0weight%bsb."
    archive(folder / "script.pt", NET + module % described(Stored(1 << 31, (1 << 31,), (1,)))[2:-1])
    archive(folder / "script, one value.pt", NET + module % described(Stored(1, (1 << 31,), (0,)))[2:-1], _0=bytes(4))
    archive(folder / "packed.pt", b"\x80\x02" + b"}" * 100_000_000 + b".", pack=zipfile.ZIP_DEFLATED)
    archive(
        folder / "packed values.pt",
        described({"w": Stored(1 << 26, (1 << 26,), (1,))}),
        pack=zipfile.ZIP_DEFLATED,
        code=False,
        _0=bytes(1 << 28),
    )
    for name, text in {
        "memo": b"\x80\x02Nr\xff\xff\xff\x7f.", "text": b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"a.",
        "bytes": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"a.", "frame": b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b"N.",
        "number": b"\x80\x02\x8b" + (1 << 24).to_bytes(4, "little") + b"\x7f" * (1 << 24) + b".",
        "array": pickle.dumps(Calls(bytearray, 10**10), 2), "dictionaries": b"\x80\x04" + b"}\x94" * 5_000_000 + b".", "marks": b"\x80\x02" + b"(" * 8_000_000 + b".",
        "deep": b"\x80\x02}N" + b"\x85" * 1_000_000 + b"Ns.", "wide": b"\x80\x02X" + (30_000_004).to_bytes(4, "little") + "😀".encode() + b"a" * 30_000_000 + b".",
        "names": b"\x80\x02}X\x40\x42\x0f\0" + b"a" * 1_000_000 + described({str(i): Stored(1, (1,), (1,)) for i in range(5000)})[2:-1] + b"s.",
    }.items():  # fmt: skip
        archive(folder / f"{name}.pt", text, code=False, _0=bytes(4))
        (folder / f"{name}, legacy.pt").write_bytes(text)
    header = b'{"a":[' + b"[]," * 1_990_000 + b"[]]}"
    (folder / "header.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "long header.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    claim = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / "values.safetensors").write_bytes(len(claim).to_bytes(8, "little") + claim)
    with zipfile.ZipFile(folder / "entries.pt", "w") as made:
        made.writestr("x/data.pkl", b"\x80\x02}.")
        for number in range(150_000):
            made.writestr(zipfile.ZipInfo(f"x/data/{number:050}"), b"")
    small = {k: torch.zeros(s) for k, s in table(UNetConfig(16, 32, (1,), 1, (1,))).items()}
    for name, numbers in (
        ("steps", {"steps": 10**9}),
        ("size", {"image_size": 10**9}),
        ("heads", {"num_heads": 10**9}),
        ("mult", {"channel_mult": [1e300]}),
    ):
        save_file(small, folder / f"metadata, {name}.safetensors", {"diffusion" if name == "steps" else "unet": json.dumps(numbers)})
        torch.save(small, folder / f"sidecar, {name}.pt")
        (folder / f"sidecar, {name}.json").write_text(json.dumps(numbers))
    torch.save(small, folder / "long sidecar.pt")
    (folder / "long sidecar.json").write_text("[" + "[]," * 5_000_000 + "[]]")


MEASURE = """
import os, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from blended_core.adm.load import load_checkpoint, may_be_checkpoint
from blended_core.adm.cache import cache_file
from blended_core.device import DeviceContext
from blended_core.errors import BlendedError

def status(name):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name)) * 1024

for path in sorted(Path(sys.argv[1]).iterdir()):
    if path.suffix == ".json":
        continue
    if os.fork() == 0:  # a process of its own, whose peak begins at what it has
        before = status("VmRSS")
        resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + (3 << 30),) * 2)
        try:
            may_be_checkpoint(path)
            load_checkpoint(DeviceContext(), path, probe=None)
            end = "loaded"
        except BlendedError as error:
            end = "refused: " + str(error)[:200].replace(chr(10), " ")
        except BaseException as error:
            end = f"RAISED {type(error).__name__}: {error}"
        print(status("VmHWM") - before, path.stat().st_size, path.name, end, sep="\t", flush=True)
        os._exit(0)
    _, code = os.wait()
    if code:
        print(0, 0, path.name, f"ENDED with {code}", sep="\t", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_the_memory_for_a_file_is_in_proportion_to_its_size(tmp_path: Path) -> None:
    hostile_files(tmp_path)
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.split("\t") for line in run.stdout.splitlines()]
    assert len(lines) == sum(path.suffix != ".json" for path in tmp_path.iterdir()) > 40
    for peak, size, name, end in lines:
        assert end.startswith("refused: "), (name, end)
        assert int(peak) <= 3 * int(size) + 200e6, (name, f"{int(peak) / 1e6:.0f} MB for {int(size) / 1e6:.1f} MB", end)
