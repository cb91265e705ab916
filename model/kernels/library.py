"""The shared library of the kernels: compiled for this machine's CPU on first use, and kept in the user's cache."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from utils.errors import UserError
from utils.files import atomic_write

SOURCES = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC"]
current: ctypes.CDLL | None = None  # the library in use; None: PyTorch's operators are


class KernelsUnavailable(Exception):
    """The kernels cannot be compiled or loaded on this machine; the message says why."""


def enable() -> None:
    """Use the compiled kernels from now on. The first time on a machine this takes a few seconds.

    Raises:
        KernelsUnavailable: no compiler, or one that cannot build them.
    """
    global current
    current = load()


def disable() -> None:
    """Use PyTorch's own operators from now on."""
    global current
    current = None


def kernels_hash() -> str | None:
    """Hash of the sources, compiler and processor of the kernels in use; None while PyTorch's operators are."""
    return Path(current._name).stem.removeprefix("kernels-") if current else None


@functools.cache
def load() -> ctypes.CDLL:
    """Compile or load the kernels without using them yet; raises as `enable` does."""
    try:
        library = _open()
    except OSError as error:
        raise KernelsUnavailable(str(error)) from error
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_double
    norm, size, run = [pointer] * 4 + [real], [ctypes.c_int64, integer], [integer] * 2
    library.norm_relu_forward.argtypes = [pointer] * 2 + norm + [real] + [pointer] * 2 + size + run
    library.norm_relu_backward.argtypes = [pointer] * 6 + size + run
    library.norm_relu_infer.argtypes = [pointer] * 2 + norm + [pointer] + size + run
    library.cheap_conv_forward.argtypes = [pointer] * 4 + norm + [real] + [pointer] * 3 + [integer] * 6 + run
    library.cheap_conv_backward.argtypes = [pointer] * 12 + [integer] * 6 + run
    library.cheap_conv_infer.argtypes = [pointer] * 4 + norm + [pointer] + [integer] * 8 + run
    return library


def _open() -> ctypes.CDLL:
    """The shared library, out of the user's cache, which has one for each source, compiler and kind of processor."""
    try:
        command = shlex.split(os.environ.get("CXX") or "") or [shutil.which("g++") or shutil.which("c++")]
    except ValueError as error:  # quotes that do not end
        raise KernelsUnavailable(f"CXX={os.environ['CXX']} cannot be split into words: {error}") from error
    if command == [None]:
        raise KernelsUnavailable("there is no C++ compiler (g++)")
    name = f"kernels-{_key(command)}.so"
    try:
        library = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "od-cheap-convolution", name)
        if not _is_whole(library):
            library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(library) as file:
                file.write(_compile(command))
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, UserError):  # it cannot be written or executed there; no home directory
        with tempfile.TemporaryDirectory() as folder:  # what is loaded stays when its file is deleted
            library = Path(folder, name)
            library.write_bytes(_compile(command))
            return ctypes.CDLL(str(library))


def _key(command: list[str]) -> str:
    """A hash of the sources, flags, and what the compiler says of itself and of the processor that is `native`."""
    sources = b"".join(path.read_bytes() for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]))
    macros = _run_compiler(command, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull)
    return hashlib.sha256(sources + repr((FLAGS, command[1:])).encode() + macros).hexdigest()[:16]


def _compile(command: list[str]) -> bytes:
    """The shared library; its SHA-256 stands at the end, where the loader does not look."""
    with tempfile.TemporaryDirectory() as folder:
        compiled, linked = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        _run_compiler(command, *FLAGS, "-c", SOURCES / "kernels.cpp", "-o", compiled)
        # Linked without -fopenmp, for a second OpenMP runtime would fight with PyTorch's for the cores: what is left
        # undefined is found in the one that PyTorch has loaded.
        _run_compiler(command, "-shared", compiled, "-o", linked)
        content = linked.read_bytes()
    return content + hashlib.sha256(content).digest()


def _is_whole(library: Path) -> bool:
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _run_compiler(command: list[str], *arguments: str | Path) -> bytes:
    """Run the compiler. Returns its standard output.

    Raises:
        KernelsUnavailable: it fails; the message has the first line of its output that says "error".
    """
    english = os.environ | {"LC_ALL": "C"}
    try:
        return subprocess.run([*command, *arguments], capture_output=True, check=True, env=english).stdout
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or [str(error)]
        line = next((line for line in lines if "error:" in line.lower()), lines[0])
        raise KernelsUnavailable(f"{shlex.join(command)} failed: {line}") from error
