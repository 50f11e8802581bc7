"""A real ComfyUI with the pack in it: found, started, asked. No stand-in."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_PATH", Path.home() / "ComfyUI"))
FOLDERS = ("custom_nodes", "models", "input", "output", "temp", "user")
OTHER_CORES = tuple(map(Path, filter(None, os.environ.get("COMFYUI_PATHS", "").split(os.pathsep))))
"""Folders of other versions of ComfyUI."""
OTHER_FRONTENDS = tuple(map(Path, filter(None, os.environ.get("COMFYUI_FRONTENDS", "").split(os.pathsep))))
"""Folders with an index.html of other versions of the page (``static`` of comfyui-frontend-package)."""
ABSENT = "no ComfyUI was found by COMFYUI_PATH or in the home folder, so the pack was not tried in one"

needs_comfyui = pytest.mark.skipif(not (COMFYUI / "main.py").is_file(), reason=ABSENT)
Prompt = dict[str, dict[str, Any]]


def interpreter(comfyui: Path = COMFYUI) -> str:
    """ComfyUI's own Python where it has an environment, else this one."""
    for name in (".venv", "venv"):
        python = comfyui / name / "bin" / "python"
        if python.exists():
            return str(python)
    return sys.executable


def environment() -> dict[str, str]:
    """One thread, for the server and for what is compared with it."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass
class Outcome:
    """What a prompt came to, as the server told it."""

    outputs: dict[str, Any]
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    progress: list[dict[str, Any]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    error: dict[str, Any] | None = None
    interrupted: bool = False

    @property
    def sentence(self) -> str:
        """The error as the person reads it."""
        assert self.error is not None, "the prompt ran without an error"
        return str(self.error["exception_message"]).strip()


class Server:
    """A started ComfyUI and the folder it works in."""

    def __init__(self, folder: Path, port: int, log: Path, pid: int) -> None:
        self.folder, self.port, self.log, self.pid = folder, port, log, pid

    def memory(self) -> float:
        """Resident memory of the process in MiB."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        """JSON of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """JSON of a POST; the answer's body is in the exception where the server refuses."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} was refused: {error.read().decode()}") from None

    def run(self, prompt: Prompt, on_message: Callable[[str, dict[str, Any]], None] | None = None, timeout: float = 300) -> Outcome:
        """Queues a prompt and listens until it ends."""
        import websocket

        client = uuid.uuid4().hex
        channel = websocket.create_connection(f"ws://127.0.0.1:{self.port}/ws?clientId={client}", timeout=timeout)
        with contextlib.closing(channel):
            number = self.post("/prompt", {"prompt": prompt, "client_id": client})["prompt_id"]
            outcome = Outcome({})
            while True:
                message = channel.recv()
                if isinstance(message, bytes):
                    outcome.previews.append(message[8:])
                    continue
                told = json.loads(message)
                kind, data = told["type"], told.get("data") or {}
                if data.get("prompt_id") not in (None, number):
                    continue
                if kind == "executing" and data.get("node"):
                    outcome.executed.append(data["node"])
                elif kind == "execution_cached":
                    outcome.cached = data["nodes"]
                elif kind == "progress":
                    outcome.progress.append(data)
                elif kind == "execution_error":
                    outcome.error = data
                elif kind == "execution_interrupted":
                    outcome.interrupted = True
                if on_message is not None:
                    on_message(kind, data)
                if kind in ("execution_success", "execution_error", "execution_interrupted"):
                    break
        outcome.outputs = self.outputs_of(number)
        return outcome

    def outputs_of(self, number: str) -> dict[str, Any]:
        """By node, from the history, which is written a moment after the last message."""
        for _ in range(50):
            history = self.get(f"/history/{number}")
            if number in history:
                return dict(history[number]["outputs"])
            time.sleep(0.1)
        raise AssertionError(f"prompt {number} is not in the history")

    def pictures(self, outcome: Outcome, node: str) -> list[NDArray[np.uint8]]:
        """The pixels that a SaveImage or PreviewImage wrote."""
        files = outcome.outputs[node]["images"]
        return [np.array(Image.open(self.folder / f["type"] / f["subfolder"] / f["filename"])) for f in files]

    def put(self, name: str, pixels: NDArray[np.uint8]) -> str:
        """A PNG in ComfyUI's input folder."""
        Image.fromarray(pixels).save(self.folder / "input" / name)
        return name


@contextlib.contextmanager
def started(folder: Path, *options: str, comfyui: Path = COMFYUI) -> Iterator[Server]:
    """ComfyUI on a free port, with the pack linked into it."""
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    link = folder / "custom_nodes" / "blended-diffusion"
    if not link.exists():
        link.symlink_to(ROOT, target_is_directory=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    command = [interpreter(comfyui), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(folder)]
    command += ["--database-url", f"sqlite:///{folder}/user/comfyui.db", "--disable-api-nodes", "--preview-method", "auto", *options]
    with log.open("w") as stream:
        own_cache = {**environment(), "XDG_CACHE_HOME": str(folder / "cache")}
        process = subprocess.Popen(command, cwd=comfyui, stdout=stream, stderr=subprocess.STDOUT, env=own_cache)
        try:
            server = Server(folder, port, log, process.pid)
            for _ in range(600):
                if process.poll() is not None:
                    raise AssertionError(f"ComfyUI ended while it started:\n{log.read_text()[-3000:]}")
                with contextlib.suppress(OSError, ValueError):
                    server.get("/system_stats")
                    break
                time.sleep(0.5)
            else:
                raise AssertionError(f"ComfyUI did not start in five minutes:\n{log.read_text()[-3000:]}")
            yield server
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            shutil.rmtree(folder / "temp", ignore_errors=True)


def observed(script: str, seconds: int = 900) -> dict[str, Any]:
    """What a script of this folder found in ComfyUI's own process: the JSON in the last line that it prints."""
    command = [interpreter(), str(ROOT / "tests" / script)]
    run = subprocess.run(command, cwd=COMFYUI, capture_output=True, text=True, timeout=seconds, env=environment())
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def part(told: dict[str, Any], name: str) -> dict[str, Any]:
    """One part of what was found; a part that failed is its traceback."""
    found = told[name]
    assert isinstance(found, dict), found
    return found
