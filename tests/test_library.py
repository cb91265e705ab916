"""The compiled library: when it is built, and what is said when it cannot be."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import fused
from model.kernels import library as compiled
from tests.helpers import channels_last

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A cache of its own, and a compiler that has the library ready and notes how it is called."""
    fused.enable()
    (tmp_path / "kernels.so").write_bytes(Path(compiled.current._name).read_bytes()[:-32])
    script = tmp_path / "a compiler"
    script.write_text(
        f"""#!/bin/sh
echo "$*" >> '{tmp_path}/calls'
for last; do :; done
case "$*" in
    *-shared*) cp '{tmp_path}/kernels.so' "$last" ;;
    *" -c "*) touch "$last" ;;
esac
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{script}' -m64")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.load.cache_clear()
    yield script
    compiled.load.cache_clear()


def links(compiler):
    return (compiler.parent / "calls").read_text().count("-shared")


@pytest.mark.parametrize("damage", ["nothing", "empty", "cut off", "flipped byte", "deleted"])
def test_a_damaged_library_is_compiled_again(compiler, damage):
    fused.enable()
    assert (compiler.parent / "calls").read_text().startswith("-m64 ")
    (library,) = (compiler.parent / "od-cheap-convolution").iterdir()
    content = library.read_bytes()
    library.unlink()  # it is mapped
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    damaged = {"nothing": content, "empty": b"", "cut off": content[:5000], "flipped byte": flipped}
    if damage in damaged:
        library.write_bytes(damaged[damage])
    compiled.load.cache_clear()
    fused.enable()
    assert library.read_bytes() == content
    assert links(compiler) == (1 if damage == "nothing" else 2)
    norm, x = nn.BatchNorm2d(16), channels_last(2, 16, 4, 4)
    torch.testing.assert_close(fused.norm_relu(norm, x), F.relu(norm(x)))


def test_the_library_belongs_to_what_native_means_to_the_compiler(compiler):
    fused.enable()
    first = fused.kernels_hash()
    compiler.write_text(compiler.read_text().replace("esac", "    *-E*) echo '#define __AVX2__ 1' ;;\nesac"))
    compiled.load.cache_clear()
    fused.enable()
    assert fused.kernels_hash() != first
    assert links(compiler) == 2


def test_the_reason_given_is_the_first_line_that_says_error(compiler):
    compiler.write_text("#!/bin/sh\necho 'k.s: Assembler messages:\nk.s:3: Error: no such instruction' >&2; exit 1")
    with pytest.raises(fused.KernelsUnavailable, match=r"failed: k\.s:3: Error: no such instruction$"):
        fused.enable()


def test_a_compiler_that_fails_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.load.cache_clear()
    try:
        none = str(tmp_path / "none")
        for compiler, message in (("false", "false failed"), (none, "No such file"), ("'g++", "CXX='g.*quotation")):
            monkeypatch.setenv("CXX", compiler)
            with pytest.raises(fused.KernelsUnavailable, match=message):
                fused.enable()
    finally:
        compiled.load.cache_clear()
