"""Messages: nothing that a file, a prompt or another library says reaches the terminal, a log or a node with control characters or without an end."""

from __future__ import annotations

import ast
import json
import logging
import re
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blended_core.cli import edit as cli
from blended_core.cli import main
from blended_core.cli.messages import message_of, say
from blended_core.cli.parser import build_parser
from blended_core.device import DeviceContext
from blended_core.errors import MAX_MESSAGE, MAX_TEXT, BlendedError, BlendedWarning, Note, one_line, reason, with_controls
from blended_core.io import atomic

from . import tiny
from .messages import HOSTILE, LONGEST, is_clean

ROOT = Path(__file__).parent.parent


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Everything that a command prints to stdout and stderr."""
    capsys.readouterr()
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        assert stop.code in (0, 2)
    captured = capsys.readouterr()
    assert is_clean(captured.out + captured.err), arguments
    return captured.out + captured.err


@pytest.mark.parametrize("name", HOSTILE)
def test_every_kind_of_message_is_one_short_printable_line(name: str) -> None:
    text = f"the file {HOSTILE[name]} is wrong; choose another."
    args = build_parser().parse_args(["edit"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn(BlendedWarning(text, "seed"), stacklevel=1)
    for text_of_library in (str(BlendedError(text)), Note(text), str(caught[0].message)):
        assert len(text_of_library) <= MAX_TEXT and is_clean(text_of_library[:LONGEST]) and is_clean(text_of_library[LONGEST:])
        assert text_of_library.startswith("the file ") and text_of_library.endswith("choose another."), "the middle is left out"
    messages = [
        with_controls(Note(text), lambda _: None), with_controls(text, lambda _: None), with_controls(caught[0].message, lambda _: None),
        with_controls(BlendedError(text, ("seed", "steps")), args.flags.get), message_of(RuntimeError(text), args),
        message_of(OSError(2, "No such file", HOSTILE[name]), args), message_of(KeyError(text), args), reason(ValueError(text)),
    ]  # fmt: skip
    assert all(is_clean(message) and "\n" not in message for message in messages)
    assert all(message.startswith("the file ") and message.endswith("choose another.") for message in messages[:3])
    assert messages[3].endswith("choose another (--seed, --steps).")


def test_text_that_may_be_printed_is_not_changed() -> None:
    for text in ("λ = 3000; x̂₀ → «ein Hügel», 사과, 🙂‍↔️ 1\u00a0000", "a" * MAX_MESSAGE, ""):
        assert one_line(text) == text
    assert one_line("x" * 1000, None) == "x" * 1000
    assert len(one_line("x" * 1000)) == MAX_MESSAGE


def test_the_terminal_prints_in_one_place_only() -> None:
    """A new ``print`` would not pass the function that cleans texts."""
    places = []
    for file in sorted((ROOT / "blended_core").rglob("*.py")):
        if "training" in file.parts:  # scripts of developers
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "sys.stdout.write",
                "sys.stderr.write",
                "traceback.print_exc",
            ):
                places.append(file.relative_to(ROOT / "blended_core").as_posix())
    assert places == ["cli/messages.py"]


# --- through the commands ---------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> list[str]:
    """Arguments that name a picture and its mask."""
    pixels = np.full((24, 32, 3), 90, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    pixels[4:20, 8:24] = 255
    pixels[:4] = 0
    Image.fromarray(np.where(pixels == 255, 255, 0).astype(np.uint8)).save(tmp_path / "mask.png")
    return [str(tmp_path / "picture.png"), "--mask", str(tmp_path / "mask.png")]


SMALL = ["--steps", "2", "--candidates", "1", "--views", "1"]


@pytest.mark.parametrize("name", HOSTILE)
def test_arguments_reach_the_terminal_clean(tmp_path: Path, picture: list[str], capsys: pytest.CaptureFixture[str], name: str) -> None:
    text = HOSTILE[name].replace("\0", "")
    out = ["--out", tmp_path / "out"]
    for arguments in (
        ["edit", text, "--mask", text, "--prompt", text, *out], ["edit", *picture, "--prompt", "x", "--steps", text, *out],
        ["edit", *picture, "--prompt", "x", "--set", text, *out], ["edit", *picture, "--prompt", "x", "--ddpm", text, *out],
        ["edit", *picture, "--prompt", "x", "--class", text, *out], ["edit", *picture, "--prompt", "x", "--seed", text, *out],
        ["edit", *picture, text], ["edit", *picture, f"--{text}"], [text], ["inspect", text], ["convert", text, text],
        ["edit", "--from", text, *out], ["edit", *picture, "--prompt", "x", "--out", tmp_path / "mask.png" / text], ["evaluate", "--only", text],
        ["demo", "--background", text, *out],
    ):  # fmt: skip
        said = printed(capsys, *arguments)
        assert "error: " in said and "unexpected" not in said


@pytest.mark.parametrize("name", ["color", "long", "line feed"])
def test_a_prompt_and_the_names_of_files_reach_the_terminal_clean(
    tmp_path: Path, picture: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(cli, "load_models", lambda request: tiny.tiny_models())
    file = tmp_path / f"{HOSTILE[name][:100]}.png"
    Image.open(picture[0]).convert("L").save(file)
    arguments = ["edit", file, *picture[1:], "--prompt", HOSTILE[name], *SMALL, "--out", tmp_path / file.stem]
    said = printed(capsys, *arguments)
    assert "done in" in said and "is a grayscale picture" in said
    report = json.loads((tmp_path / file.stem / "report.json").read_text("utf-8"))
    assert report["request"]["prompts"] == [HOSTILE[name]], "data is kept as it is"
    assert all(is_clean(note) for note in report["notes"])


def test_a_report_reaches_the_terminal_clean(
    tmp_path: Path, picture: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "load_models", lambda request: tiny.tiny_models())
    out = tmp_path / "out"
    printed(capsys, "edit", *picture, "--prompt", "x", *SMALL, "--out", out)
    good = (out / "report.json").read_text("utf-8")
    for number, text in enumerate(HOSTILE.values()):
        report = json.loads(good)
        report["version"] = report["versions"]["torch"] = text
        (tmp_path / "hostile.json").write_text(json.dumps(report), "utf-8")
        assert "that run used" in printed(capsys, "edit", "--from", tmp_path / "hostile.json", "--out", tmp_path / str(number))
        report["request"]["image"] = report["request"]["options"][text] = text
        (tmp_path / "hostile.json").write_text(json.dumps(report), "utf-8")
        assert "error: " in printed(capsys, "edit", "--from", tmp_path / "hostile.json", "--out", tmp_path / "x")


def test_the_names_of_tensors_reach_the_terminal_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in HOSTILE.values():
        names = {
            f"{text}{name}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("out.2.bias", "input_blocks.0.0.weight")
        }
        header = json.dumps(names).encode()
        # One length for all tensors, and names that are no names: whatever the reader objects to, it must say so in one line.
        for table in (header, header[:-1], json.dumps({text: text}).encode()):
            (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(table)) + table + b"\0" * 4)
            assert "error: " in printed(capsys, "inspect", tmp_path / "x.safetensors")


def test_the_texts_of_libraries_reach_the_terminal_clean(
    tmp_path: Path, picture: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest's own handlers would put the texts into the report of this test, which cannot hold what is not UTF-8.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for text in HOSTILE.values():

        def load(request: object, text: str = text) -> Any:
            logging.getLogger("library").warning("a log of %s", text)
            raise RuntimeError(text)

        monkeypatch.setattr(cli, "load_models", load)
        for debug in ([], ["--debug"]):
            said = printed(capsys, "edit", *picture, "--prompt", "x", "--out", tmp_path / "out", *debug)
            assert "note: library: a log of" in said and "error: RuntimeError: " in said and ("Traceback" in said) == bool(debug)


@pytest.mark.parametrize("device", ["mps", "cuda:99", "xpu", "hpu", "privateuseone", "meta", "abacus", "", *HOSTILE.values()])
def test_a_device_that_cannot_be_used_is_one_sentence_of_ours(device: str) -> None:
    """The errors of torch advise how to build torch, or name a web page."""
    if (device == "mps" and torch.backends.mps.is_available()) or (device == "xpu" and torch.xpu.is_available()):
        pytest.skip("this computer has one")
    with pytest.raises(BlendedError) as caught:
        DeviceContext.choose(device)
    text = with_controls(caught.value, lambda _: None)
    assert is_clean(text) and "cannot be used on this computer" in text and "cpu" in text and caught.value.options == ("device",)
    assert not re.search(r"https?:|torch\.|nvidia|apple|backend|build", text.replace(repr(device), ""), re.IGNORECASE)


def test_the_devices_of_the_computer_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(BlendedError, match=r"'cuda:99' cannot be used on this computer.*; use cuda:0, cuda:1 or cpu"):
        DeviceContext.choose("cuda:99")


# --- the streams ------------------------------------------------------------------------------------------------------


class Broken:
    """A stream that cannot be written."""

    def __init__(self, error: int) -> None:
        self.error = error

    def write(self, _: str) -> None:
        raise OSError(self.error, "cannot")

    def flush(self) -> None: ...


def test_a_reader_that_has_gone_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "fileno", lambda _: (_ for _ in ()).throw(OSError()), raising=False)
    for error in (32, 5):
        monkeypatch.setattr(sys, "stdout", Broken(error))
        say("a result")
    monkeypatch.setattr(sys, "stdout", Broken(28))
    with pytest.raises(OSError):
        say("a result that is lost on a full disk")


def test_an_error_of_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError) as caught:
        atomic.write_bytes(tmp_path / "a" / "x.png", b"x")
    assert caught.value.filename == str(tmp_path / "a" / "x.png")
