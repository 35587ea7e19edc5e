"""The library behind the C++ products: compiled once, by one process, and done without where it cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from awq.kernels import LayerSpec, choose, cpu_native, native

SPEC = LayerSpec("cpu", torch.bfloat16, 128, 64, 32)
BUILT = 'from awq.kernels import cpu_native; f = cpu_native.load(); print(getattr(f, "instruction_set", f))'


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the library for the best instruction set: compiling takes seconds, copying does not."""
    native.load.cache_clear()
    found = cpu_native.load()
    if isinstance(found, str):
        pytest.skip(f"the C++ products cannot be used here: {found}")
    if found.instruction_set != native.available()[0] or native.compiler() is None:
        pytest.skip("needs a compiler that knows the processor")
    copy = tmp_path_factory.mktemp("library") / "library.so"
    copy.write_bytes(Path(found.library._name).read_bytes())
    return copy


@pytest.fixture
def compiler(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A compiler that is quick, and writes down that it was run; and an empty cache for what it makes."""
    copying = f'echo x >> "{tmp_path}/runs"\nfor last; do :; done\nsleep 0.2\ncp "{library}" "$last"'
    path = script(tmp_path, "quick", copying)
    monkeypatch.setenv("CXX", path)
    monkeypatch.setenv("AWQ_KERNEL_CACHE", str(tmp_path / "cache"))
    return path


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> object:
    """No memory of what has been loaded."""
    monkeypatch.delenv("AWQ_CPU_ISA", raising=False)
    native.load.cache_clear()
    yield
    native.load.cache_clear()


def libraries(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("*.so"))


def runs(folder: Path) -> int:
    return (folder / "runs").read_text().count("x")


def script(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def told() -> str:
    """Why the library cannot be used: in one warning, and in the reason of a choice."""
    with pytest.warns(UserWarning, match=r"C\+\+ product for CPUs cannot be used") as caught:
        choice = choose(SPEC)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(SPEC) == choice  # told once
    assert choice.kernel.name in ("cpu-int4", "torch")
    assert "not cpu-w4a16: " in choice.reason
    return choice.reason


@pytest.mark.usefixtures("compiler")
def test_the_library_is_compiled_once_and_found_again_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(SPEC).kernel.name == "cpu-w4a16"
    (file,) = libraries(tmp_path)
    native.load.cache_clear()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert choose(SPEC).kernel.name == "cpu-w4a16"
    assert libraries(tmp_path) == [file]
    assert runs(tmp_path) == 1


@pytest.mark.usefixtures("compiler")
def test_importing_compiles_nothing(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", "import awq, awq.kernels, awq.nn, awq.hf"], check=True)
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("compiler")
def test_processes_that_start_together_compile_once_and_all_succeed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILT]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert {process.communicate()[0].strip() for process in running} == {native.available()[0]}
    assert runs(tmp_path) == 1
    assert len(libraries(tmp_path)) == 1


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("content", [b"", b"not a library", None])
def test_a_damaged_library_is_compiled_anew(content: bytes | None, tmp_path: Path) -> None:
    assert isinstance(cpu_native.load(), native.Native)
    (file,) = libraries(tmp_path)
    whole = file.read_bytes()
    # A new file: writing into one that is loaded would end this process.
    file.unlink()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    native.load.cache_clear()
    assert isinstance(cpu_native.load(), native.Native)
    assert file.read_bytes() == whole


@pytest.mark.usefixtures("compiler")
def test_a_library_that_multiplies_wrong_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    for file in native._SOURCES.iterdir():
        text = file.read_text().replace("x_sum[at] = float(", "x_sum[at] = 0.0f * float(")
        (sources / file.name).write_text(text)
    monkeypatch.setattr(native, "_SOURCES", sources)
    monkeypatch.setattr(native, "_OPTIONS", ("-std=c++17", "-O0", *native._OPTIONS[2:]))
    monkeypatch.delenv("CXX")
    assert "gives wrong products" in told()


@pytest.mark.usefixtures("compiler")
def test_a_missing_compiler_is_told_once_and_another_product_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no C++ compiler was found" in told()


@pytest.mark.usefixtures("compiler")
def test_a_compiler_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "CXX names /nowhere/c++, which does not exist" in told()


@pytest.mark.usefixtures("compiler")
def test_a_compiler_that_fails_is_told_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = script(tmp_path, "failing", "echo warning: hm >&2; echo 'error: no such option' >&2; exit 1")
    monkeypatch.setenv("CXX", failing)
    assert f"{failing} cannot compile it for {native.available()[0]}: error: no such option" in told()
    assert not libraries(tmp_path)


@pytest.mark.usefixtures("compiler")
def test_a_compiler_too_old_for_the_best_instruction_set_serves_the_next(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *rest = native.available()
    if not rest:
        pytest.skip("this processor has one instruction set only")
    refusing = f'case "$*" in *{native._flags(first)[-1]}*) exit 1;; esac\nexec {compiler} "$@"'
    monkeypatch.setenv("CXX", script(tmp_path, "old", refusing))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cpu_native.load()
    assert isinstance(found, native.Native)
    assert found.instruction_set == rest[0]


@pytest.mark.usefixtures("compiler")
def test_a_compiler_killed_half_way_leaves_nothing_that_is_taken_for_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = 'for last; do :; done\nprintf half > "$last"\nkill -9 $$'
    monkeypatch.setenv("CXX", script(tmp_path, "dying", dying))
    assert "cannot compile it" in told()
    assert not libraries(tmp_path)


@pytest.mark.usefixtures("compiler")
def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AWQ_KERNEL_CACHE", str(tmp_path / "file" / "cache"))
    assert choose(SPEC).kernel.name == "cpu-w4a16"


@pytest.mark.usefixtures("compiler")
def test_a_library_of_another_user_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(cpu_native.load(), native.Native)
    (file,) = libraries(tmp_path)
    stat = os.stat_result((*file.stat()[:4], 12345, *file.stat()[5:]))
    monkeypatch.setattr(Path, "stat", lambda *_, **__: stat)
    assert "belongs to another user" in str(
        native._loaded(file, native.available()[0], native._Check(0, cpu_native.is_right))
    )


@pytest.mark.usefixtures("compiler")
def test_an_instruction_set_can_be_asked_for_or_all_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    last = native.available()[-1]
    monkeypatch.setenv("AWQ_CPU_ISA", last)
    found = cpu_native.load()
    assert isinstance(found, native.Native)
    assert found.instruction_set == last
    for name, reason in (("none", "AWQ_CPU_ISA=none is set"), ("vax", "AWQ_CPU_ISA=vax is not what")):
        native.load.cache_clear()
        monkeypatch.setenv("AWQ_CPU_ISA", name)
        assert reason in choose(SPEC).reason


def test_another_system_is_refused_by_name_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "freebsd14")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = choose(SPEC)
    assert "not cpu-w4a16: it is written for Linux on x86-64 and ARM" in choice.reason
    assert choice.kernel.name in ("cpu-int4", "torch")


def test_a_processor_without_the_instructions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", list)
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    assert cpu_native.load() == "the processor lacks AVX2"


@pytest.mark.parametrize(
    ("system", "machine", "features", "expected"),
    [
        ("linux", "aarch64", "Features\t: fp asimd asimddp", ["neon-dot", "neon"]),
        ("linux", "aarch64", "Features\t: fp asimd", ["neon"]),
        ("linux", "x86_64", "flags\t\t: sse2 avx2 fma f16c", ["avx2"]),
        ("darwin", "arm64", "", ["neon-dot", "neon"]),
        ("darwin", "x86_64", "", []),
    ],
)
def test_what_a_processor_has_is_read_where_each_system_says_it(
    system: str, machine: str, features: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(native.platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", lambda _: f"processor\t: 0\n{features}\n")
    assert native.available() == expected
