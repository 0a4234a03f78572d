"""Kernels in C++: compiled once, whoever asks first, and clear words where that cannot be."""

import ctypes
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from decoders.flashdecoder import attention_cpu
from decoders.layers import frames, native

ROOT = Path(__file__).parent.parent
KERNEL = 'extern "C" int answer() { return 42; }\n'
pytestmark = pytest.mark.skipif(bool(native.missing()), reason=f"C++ kernels: {native.missing()}")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small kernel, and a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    native.library.cache_clear()
    yield tmp_path.joinpath("kernel.cpp")
    native.library.cache_clear()


def answer(library: ctypes.CDLL) -> int:
    return library.answer()


def compiled(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.so"))


def test_it_is_compiled_once_and_again_when_its_source_changes(source: Path, tmp_path: Path, monkeypatch) -> None:
    source.write_text(KERNEL)
    assert answer(native.library(source)) == 42
    native.library.cache_clear()
    with monkeypatch.context() as other:
        other.setattr(native, "_build", lambda *_: pytest.fail("compiled a second time"))
        assert answer(native.library(source)) == 42
    native.library.cache_clear()
    source.write_text(KERNEL.replace("42", "43"))
    assert answer(native.library(source)) == 43
    assert len(compiled(tmp_path)) == 2


def test_processes_that_build_at_the_same_time_all_get_it(source: Path, tmp_path: Path) -> None:
    source.write_text(KERNEL)
    script = "import sys; from pathlib import Path; from decoders.layers import native\n"
    script += "assert native.library(Path(sys.argv[1])).answer() == 42"
    runs = [subprocess.Popen([sys.executable, "-c", script, str(source)], cwd=ROOT) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert [path.name.partition("_")[0] for path in (tmp_path / "cache" / "video_decoders").iterdir()] == ["kernel"]


def test_where_the_cache_cannot_be_written_a_folder_of_this_user_serves(source: Path, tmp_path: Path) -> None:
    source.write_text(KERNEL)
    (tmp_path / "cache").write_text("a file where the folder would be; root may write to any folder")
    assert answer(native.library(source)) == 42
    (found,) = compiled(tmp_path / "temporary")
    assert stat.S_IMODE(found.parent.stat().st_mode) == 0o700


def test_nothing_runs_out_of_a_folder_that_others_can_write(source: Path, tmp_path: Path) -> None:
    source.write_text(KERNEL)
    (tmp_path / "cache").write_text("")
    shared = tmp_path / "temporary" / f"video_decoders_{os.getuid()}"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(RuntimeError, match="could be written by others.*XDG_CACHE_HOME"):
        native.library(source)


def test_no_place_at_all(source: Path, tmp_path: Path) -> None:
    source.write_text(KERNEL)
    (tmp_path / "cache").write_text("")
    (tmp_path / "temporary").rmdir()
    (tmp_path / "temporary").write_text("")
    with pytest.raises(RuntimeError, match="no place for the compiled kernel.cpp; set XDG_CACHE_HOME"):
        native.library(source)


def test_the_compilers_own_words(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text("no C++\n")
    with pytest.raises(RuntimeError, match="cannot compile kernel.cpp: .*error"):
        native.library(source)
    assert not compiled(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler -O0")
    with pytest.raises(RuntimeError, match="kernel.cpp cannot run: CXX=no-such-compiler -O0 is no program here"):
        native.library(source)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX")
    with pytest.raises(RuntimeError, match="there is no C\\+\\+ compiler; install g\\+\\+ or set CXX"):
        native.library(source)


def test_cxx_may_have_options(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text(KERNEL.replace("42", "ANSWER"))
    monkeypatch.setenv("CXX", f"{native.compiler()[0]} -DANSWER=7")
    assert answer(native.library(source)) == 7


def test_both_kernels_compile_without_an_error(source: Path) -> None:
    for kernel, function in ((frames.SOURCE, "winograd"), (attention_cpu.SOURCE, "attention_bf16")):
        assert hasattr(native.library(kernel), function)
