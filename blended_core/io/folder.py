"""The folder of a run: the names of its files, what it holds already, and the claim on it. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from ..errors import BlendedError, reason
from .formats import FORMATS

REPORT = "report.json"
SHEET = "contact_sheet.png"
SUBFOLDERS = ("candidates", "animations")
LOCK = ".blended-diffusion.lock"
RESERVE, RESERVE_BYTES = ".blended-diffusion.reserve", 1 << 16
"""A file that keeps room for the report while a run fills the disk."""
OUR_NAME = re.compile(r"(\d+_)?candidate_\d+")
"""The names of candidates and animations, with or without a rank."""
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""Errors of file systems that know no locks."""


def old_results(out: Path) -> set[Path]:
    """Candidates and animations of an earlier run, which may have left no report. Files with other names do not belong to a run."""
    candidates = (path for suffix in FORMATS for path in out.glob(f"candidates/*.{suffix}"))
    return {path for path in (*candidates, *out.glob("animations/*.webp")) if OUR_NAME.fullmatch(path.stem)}


def replaced_files(out: Path, generated: Iterable[str] = ()) -> list[Path]:
    """The files in a folder that a run would replace or delete; ``generated`` are further names that it writes."""
    return sorted(path for path in {*old_results(out), *(out / name for name in (REPORT, SHEET, *generated))} if os.path.lexists(path))


@contextlib.contextmanager
def writable(folder: Path, subfolders: Sequence[str] = ()) -> Iterator[None]:
    """Creates a folder where needed. Afterwards folders that are still empty are removed again if they did not exist before.

    Raises:
        BlendedError: if it is a file, or the folder or one of its ``subfolders`` cannot be written.
    """
    created: list[Path] = []
    try:
        try:
            if folder.exists() and not folder.is_dir():
                raise BlendedError(f"the result folder {folder} is a file; name a folder.", option="out")
            created += [path for path in (*(folder / name for name in subfolders), folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            for path in (folder, *(folder / name for name in subfolders)):
                if path.exists() and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        except OSError as error:
            raise _unwritable(folder, error) from None
        yield
    finally:
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()  # fails if it is not empty


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A :func:`writable` folder that is kept for one run, with room for a report that :func:`free_reserve` frees.

    Check what the folder holds inside of the claim, so that no other run can change it in between.

    Raises:
        BlendedError: as for :func:`writable`, and if the folder has no room, or another run keeps it.
    """
    with writable(folder, SUBFOLDERS), _locked(folder / LOCK, folder):
        try:
            _write_reserve(folder)
            yield
        finally:
            free_reserve(folder)


def _write_reserve(folder: Path) -> None:
    try:
        (folder / RESERVE).write_bytes(bytes(RESERVE_BYTES))
    except OSError as error:
        raise _unwritable(folder, error) from None


def free_reserve(folder: Path) -> None:
    """Deletes the file that keeps room for the report."""
    with contextlib.suppress(OSError):
        (folder / RESERVE).unlink(missing_ok=True)


@contextlib.contextmanager
def claimed_path(path: Path, seconds: float = 0.0) -> Iterator[None]:
    """Keeps a file or folder that will be written, in a folder that exists, for one process.

    Raises:
        BlendedError: if it cannot be written, or another process still keeps it after some seconds.
    """
    with _locked(path.with_name(f".{path.name}.lock"), path, seconds):
        yield


@contextlib.contextmanager
def _locked(lock_file: Path, target: Path, seconds: float = 0.0) -> Iterator[None]:
    """Holds a lock, whose file is removed afterwards. The system releases the lock of a process that ends, whatever ends it."""
    lock: BaseFileLock = FileLock(lock_file, timeout=seconds)
    try:
        lock.acquire()
        lock = _on_disk(lock, lock_file)
    except Timeout:
        raise BlendedError(f"another run is writing to {target}; wait until it has ended, or name another place.", option="out") from None
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise _unwritable(target, error) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # before the release, so that the file of a later run is never removed
            lock_file.unlink(missing_ok=True)
        lock.release()


def _on_disk(lock: BaseFileLock, lock_file: Path) -> BaseFileLock:
    """A lock of the file that has the name now. Between the opening of a file and its locking, the run that held it may have removed it; then another
    process could lock a new file of the same name."""
    while True:
        other = FileLock(lock_file, timeout=0)
        try:
            other.acquire()
        except Timeout:
            return lock
        lock.release()
        lock = other


def _unwritable(target: Path, error: OSError) -> BlendedError:
    return BlendedError(f"{target} cannot be written ({error.strerror or reason(error)}); choose another place.", option="out")
