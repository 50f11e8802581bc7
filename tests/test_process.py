"""The process of the terminal: memory, wrong inputs, folders that several runs share, signals, streams and the environment."""

from __future__ import annotations

import ast
import ctypes
import json
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args, get_type_hints

import platformdirs
import pytest
from PIL import Image
from tqdm import tqdm

from blended_core.adm import cache
from blended_core.adm.cache import cache_file, load_cached, save_cached
from blended_core.adm.probe import ProbeResult
from blended_core.cli import edit, main
from blended_core.cli.checkpoints import probe_options
from blended_core.cli.process import STOP_SIGNALS, cache_folder, open_streams, stop_signals, uninterrupted
from blended_core.device import DeviceContext
from blended_core.errors import BlendedError
from blended_core.io import folder
from blended_core.io.folder import LOCK, claimed, claimed_path
from blended_core.io.request import Request
from blended_core.options import EditOptions, GuidanceOptions, declared, preset

ROOT = Path(__file__).parent.parent
FRESH_PAGES = """
import resource, sys
from threading import Thread
from blended_core.cli.process import keep_freed_memory
print(keep_freed_memory() if "keep" in sys.argv else False)
import torch

def work():
    for number in range(24):
        if number == 18:  # for the first blocks the freed ones are slightly too small, because of alignment
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(16_000_000).fill_(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if "thread" in sys.argv:
    thread = Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
"""


def fresh_pages(*how: str) -> tuple[bool, int]:
    """(whether freed memory is kept, page faults for six blocks of 64 MB, one after the other)."""
    run = subprocess.run([sys.executable, "-c", FRESH_PAGES, *how], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    kept, pages = run.stdout.split()
    return kept == "True", int(pages)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "mallopt"), reason="only glibc can be asked")
@pytest.mark.parametrize("where", ["", "thread"])
def test_freed_memory_is_reused(where: str) -> None:
    kept, few = fresh_pages("keep", where)
    asked, many = fresh_pages("", where)
    assert kept and not asked
    assert few < 0.2 * many


def test_freed_memory_is_kept_without_a_backward_pass_through_the_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(edit, "keep_freed_memory", lambda: asked.append(True))
    edit.keep_memory(preset("official"))
    assert not asked, "through the UNet it would need a third more"
    edit.keep_memory(preset("best"))
    assert asked == [True]


# --- wrong inputs, before what is slow to import is imported -------------------------------------------------------------------

REFUSED = """
import sys
sys.path.insert(0, sys.argv[1])
from blended_core.cli import main
results = {}
for line in sys.stdin.read().splitlines():
    try:
        code = main(line.split("|"))
    except SystemExit as stop:
        code = stop.code
    results[line] = (code, [name for name in ("numpy", "PIL", "tqdm", "torch") if name in sys.modules])
print(results)
"""
WRONG = [
    "edit|{tmp}/none.png|--prompt|x", "edit|{tmp}|--prompt|x", "edit|{tmp}/rgb.png|--mask|{tmp}/none.png|--prompt|x",
    "edit|{tmp}/rgb.png|--prompt|x|--nothing", "edit|{tmp}/rgb.png|--prompt|x|--sampler|none", "edit|{tmp}/rgb.png|{tmp}/tall.png", "edit|{tmp}/rgb.png", "edit|--prompt|x",
    "edit|{tmp}/rgb.png|--prompt|x|--steps|lots", "edit|{tmp}/rgb.png|--prompt|x|--strength|2", "edit|{tmp}/rgb.png|--prompt|x|--views|0",
    "edit|{tmp}/rgb.png|--prompt|x|--class|²", "edit|{tmp}/rgb.png|--prompt|x|--ddpm|{tmp}/none.pt", "edit|{tmp}/rgb.png|--prompt|x|--set|x",
    "edit|{tmp}/rgb.png|--prompt|x|--out|{tmp}/text.png", "edit|{tmp}/rgb.png|--prompt|x|--out|{tmp}/text.png/in",
    "edit|{tmp}/rgb.png|--prompt|x|--out|{tmp}/full", "edit|{tmp}/rgb.png|--prompt|x|--ddpm|~nobody-of-this-name/x.pt",
    "edit|--from|{tmp}/none.json", "edit|--from|{tmp}/text.png", "edit|{tmp}/rgb.png|--prompt|x|--threads|100000",
    "demo|--candidates|0|--out|{tmp}/x", "demo|--out|{tmp}/full", "demo|--out|{tmp}/text.png",
    "inspect|{tmp}/none.pt", "convert|{tmp}/none.pt|{tmp}/x.safetensors", "convert|embedded|{tmp}/x.pt", "convert|embedded|{tmp}/a/x.safetensors",
    "convert|embedded|{tmp}/kept.safetensors", "evaluate|--only|nothing", "evaluate|--pairs|0", "evaluate|--candidates|0",
    "evaluate|--out|{tmp}/text.png", "evaluate|--out|{tmp}", "evaluate|--threads|0", "inspect|embedded|--set|x", "nothing", "",
]  # fmt: skip
WRONG_PICTURES = [
    "edit|{tmp}/text.png|--prompt|x", "edit|{tmp}/rgb.png|--prompt|x", "edit|{tmp}/rgb.png|--mask|{tmp}/text.png|--prompt|x",
    "edit|{tmp}/rgb.png|--mask|{tmp}/tall.png|--prompt|x", "demo|--background|moon|--out|{tmp}/x",
    "inspect|embedded|--picture|{tmp}/none.png",
]  # fmt: skip


def test_wrong_inputs_are_refused_before_what_is_slow_to_import(tmp_path: Path) -> None:
    """Arguments and paths before numpy and Pillow, pictures before torch."""
    Image.new("RGB", (32, 24)).save(tmp_path / "rgb.png")
    Image.new("L", (24, 32), 255).save(tmp_path / "tall.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "kept.safetensors").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "report.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    given = "\n".join(line.format(tmp=tmp_path) for line in [*WRONG, *WRONG_PICTURES])
    run = subprocess.run(
        [sys.executable, "-c", REFUSED, str(ROOT)], cwd=tmp_path, input=given, capture_output=True, text=True, timeout=300, check=True
    )
    results = ast.literal_eval(run.stdout.splitlines()[-1])
    assert len(results) == len(WRONG) + len(WRONG_PICTURES)
    expected = [(2, [])] * len(WRONG) + [(2, ["numpy", "PIL"])] * len(WRONG_PICTURES)
    assert {line: found for (line, found), wanted in zip(results.items(), expected, strict=True) if found != wanted} == {}, run.stderr
    assert sorted(tmp_path.rglob("*")) == before


NUMBERS = [
    ("--candidates", "1e9"), ("--candidates", "1000000000"), ("--candidates", "²"), ("--candidates", "1" * 5000), ("--candidates", "-1"),
    ("--batch", "0.5"), ("--batch", "9" * 19), ("--views", "1e3"), ("--view-chunk", "999999999"), ("--early-views", "999999999"),
    ("--seed", "9" * 21), ("--seed", "x"), ("--steps", "1" * 5000), ("--steps", "²"), ("--steps", "ddim" + "9" * 5000), ("--skip", "9" * 5000),
    ("--class", "²"), ("--class", "1" * 5000), ("--class", "1e3"), ("--class", "٣"), ("--strength", "nan"), ("--strength", "1e999"),
    ("--eta", "²"), ("--guidance-scale", "1e30"), ("--guidance-scale", "inf"), ("--range-scale", "1e30"), ("--lambda", "1" * 5000),
    ("--lpips-scale", "1e30"), ("--l2-scale", "nan"), ("--clamp", "1e30"), ("--reference-size", "9" * 18), ("--guide-from", "9" * 5000),
    ("--guide-to", "-inf"), ("--context", "1e300"), ("--feather", "9" * 20), ("--threads", "100000"), ("--threads", "1e3"),
    ("--prompt-weight", "1" * 5000), ("--prompt-weight", "²"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "text"), NUMBERS, ids=[f"{flag} {text[:12]}" for flag, text in NUMBERS])
def test_a_number_that_cannot_be_meant_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, text: str) -> None:
    Image.new("RGB", (32, 24)).save(tmp_path / "x.png")
    Image.new("L", (32, 24), 255).save(tmp_path / "mask.png")
    try:
        code = main(
            [
                "edit",
                str(tmp_path / "x.png"),
                "--mask",
                str(tmp_path / "mask.png"),
                "--prompt",
                "x",
                "--out",
                str(tmp_path / "out"),
                flag,
                text,
            ]
        )
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        code = stop.code
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert code == 2 and flag in line and len(line) <= 500 and not re.search(r"unexpected|digits|invalid|_number", line), line


def test_every_number_of_an_option_is_bounded() -> None:
    for kind in (EditOptions, GuidanceOptions, Request):
        for name, (declaration, _) in declared(kind).items():
            kinds = set(get_args(get_type_hints(kind)[name])) or {get_type_hints(kind)[name]}
            if kinds & {int, float} and str not in kinds:
                assert declaration.low is not None and declaration.high is not None, name


# --- folders that two runs share --------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with claimed(folder):
        with pytest.raises(BlendedError, match="another run is writing to") as caught, claimed(folder):
            pytest.fail("two runs")
        assert caught.value.options == ("out",)
        with claimed(tmp_path / "other"):
            pass
    assert not (tmp_path / "a").exists(), "nothing was written, so nothing is left"
    with claimed(folder):
        (folder / "report.json").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["report.json"]
    with claimed(folder), pytest.raises(BlendedError), claimed(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["report.json"]


def test_a_killed_run_does_not_keep_its_folder(tmp_path: Path) -> None:
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from blended_core.io.folder import claimed\n"
        f"with claimed(Path({str(tmp_path / 'out')!r})): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 9
    assert (tmp_path / "out" / LOCK).exists()
    with claimed(tmp_path / "out"):
        pass
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_lock_whose_file_was_removed_is_not_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that kept the folder removes its lock file after this one has opened it and before it has locked it."""
    acquire, left = folder.FileLock.acquire, [2]

    def late(lock: Any, *given: Any, **options: Any) -> Any:
        got = acquire(lock, *given, **options)
        if left[0]:
            left[0] -= 1
            (tmp_path / LOCK).unlink()
        return got

    monkeypatch.setattr(folder.FileLock, "acquire", late)
    with claimed(tmp_path):
        assert left == [0] and (tmp_path / LOCK).exists()
        with pytest.raises(BlendedError, match="another run is writing"), claimed(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["edit", "demo", "evaluate", "convert"])
def test_a_second_run_into_one_folder_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    Image.new("RGB", (32, 24)).save(tmp_path / "x.png")
    Image.new("L", (32, 24), 255).save(tmp_path / "mask.png")
    out = str(tmp_path / ("x.safetensors" if command == "convert" else "out"))
    arguments = {
        "edit": ["edit", str(tmp_path / "x.png"), "--mask", str(tmp_path / "mask.png"), "--prompt", "x", "--out", out],
        "demo": ["demo", "--out", out], "evaluate": ["evaluate", "--out", out], "convert": ["convert", "embedded", out],
    }[command]  # fmt: skip
    codes: list[int] = []

    def working(*_: object, **__: object) -> None:
        if not codes:
            codes.append(-1)
            codes.append(main(arguments))
        raise RuntimeError("the first run ends here")

    monkeypatch.setattr(DeviceContext, "choose", working)
    assert main(arguments) == 2 and codes == [-1, 2]
    second, first = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    claimed_place = f"{out}/pairs/best" if command == "evaluate" else out
    assert f"another run is writing to {claimed_place}; wait until it has ended" in second and "the first run ends here" in first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.png", "x.png"]


def test_two_evaluations_may_share_a_folder_if_their_rows_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def working(*_: object) -> None:
        raise RuntimeError("it runs")

    monkeypatch.setattr(DeviceContext, "choose", working)
    (tmp_path / "pairs").mkdir()
    with claimed_path(tmp_path / "pairs" / "best"):
        for row, words in (("best", "another run is writing to"), ("paper", "it runs")):
            assert main(["evaluate", "--only", row, "--out", str(tmp_path)]) == 2
            assert words in capsys.readouterr().err
    assert list((tmp_path / "pairs").iterdir()) == []


def test_decisions_of_two_processes_are_all_kept(tmp_path: Path) -> None:
    """Each reads the file, adds its decision and writes it; without a lock, the slower one would drop the other's."""
    result = ProbeResult({"objective": "eps"}, {}, {}, {}, 0.1, 1.0, 4, 0.1)

    def save(worker: int) -> None:
        for number in range(10):
            save_cached(f"{worker}/{number}", result, tmp_path)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(4)))
    assert set(json.loads(cache_file(tmp_path).read_text())) == {f"{worker}/{number}" for worker in range(4) for number in range(10)}
    assert load_cached("3/9", tmp_path) is not None


# --- the environment --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without HOME, of a user that the system does not know, as in many containers."""
    for name in ("HOME", "USERPROFILE", "HOMEPATH", "HOMEDRIVE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if sys.platform != "win32":
        import pwd

        def unknown(_: object) -> None:
            raise KeyError

        monkeypatch.setattr(pwd, "getpwuid", unknown)
        monkeypatch.setattr(pwd, "getpwnam", unknown)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows always knows a home folder")
def test_a_user_without_a_home_folder_can_work(
    tmp_path: Path, no_home: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache, "user_cache_path", platformdirs.user_cache_path)
    result = ProbeResult({"objective": "eps"}, {}, {}, {}, 0.1, 1.0, 4, 0.1)
    save_cached("key", result)
    assert load_cached("key") is None and list(tmp_path.iterdir()) == [], "no folder that is called ~"
    monkeypatch.setenv("BLENDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    folder = cache_folder()
    with probe_options() as options:
        assert options.cache == folder == tmp_path / "cache"
    save_cached("key", result, folder)
    assert load_cached("key", folder) is not None and cache_file(folder) == tmp_path / "cache" / "probes.json"
    for path in ("~/x.pt", "~nobody-of-this-name/x.pt"):
        for arguments in (
            ["inspect", path],
            ["edit", path, "--prompt", "x"],
            ["edit", "--from", path],
            ["demo", "--out", path],
            ["edit", "x.png", "--prompt", "x", "--clip", path],
        ):
            try:
                assert main(arguments) == 2
            except SystemExit as stop:
                assert stop.code == 2
            assert f"the home folder in {path} is unknown; write the whole path" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_closed_streams_do_not_matter(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    shell = f'exec "$0" -m blended_core.cli convert embedded {shlex.quote(str(target))} <&- >&- 2>&-'
    run = subprocess.run(["sh", "-c", shell, sys.executable], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "Traceback" not in run.stderr + run.stdout
    assert target.read_bytes()[8:9] == b"{", "what is printed does not go into the file"


def test_a_progress_bar_needs_no_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    open_streams()
    for _ in tqdm(range(3), disable=None):
        pass
    print("to nothing")
    assert sys.stderr is not None and sys.stdout is not None
    sys.stderr.close()
    sys.stdout.close()


def test_a_signal_that_the_caller_ignores_stays_ignored(heeded_signals: None) -> None:
    """As after nohup."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    signal.signal(STOP_SIGNALS[0], signal.SIG_IGN)
    try:
        with stop_signals():
            signal.raise_signal(STOP_SIGNALS[0])
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
            for number in STOP_SIGNALS[1:]:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(number)
    finally:
        signal.signal(STOP_SIGNALS[0], signal.SIG_DFL)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
