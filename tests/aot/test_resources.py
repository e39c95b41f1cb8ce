import stat

import pytest

from lamina_jax.aot.resources import KernelResources, assemble, parse_ptxas

OUTPUT = """\
ptxas info    : 0 bytes gmem, 64 bytes cmem[4]
ptxas info    : Compiling entry function 'loop_add_fusion' for 'sm_90a'
ptxas info    : Function properties for loop_add_fusion
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
ptxas info    : Compile time = 2.139 ms
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    96 bytes stack frame, 120 bytes spill stores, 80 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 96 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compile time = 14.188 ms
"""
PTX = ".version 9.0\n.target sm_90a\n.visible .entry {}(\n)\n"


def test_registers_spills_and_memory_are_read():
    assert parse_ptxas(OUTPUT) == [
        KernelResources(name="loop_add_fusion", registers=10, spill_bytes=0, stack_bytes=0, shared_bytes=0),
        KernelResources(name="attend", registers=255, spill_bytes=200, stack_bytes=96, shared_bytes=4096),
    ]


def fake_ptxas(directory, script: str):
    tool = directory / "ptxas"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return tool


def test_a_kernel_without_a_report_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="expected ptxas to report on \\['attend'\\], got \\[\\]"):
        assemble(fake_ptxas(tmp_path, "exit 0"), [PTX.format("attend")])


def test_what_ptxas_refuses_is_an_error_with_its_words(tmp_path):
    with pytest.raises(RuntimeError, match="syntax error"):
        assemble(fake_ptxas(tmp_path, "echo syntax error >&2; exit 1"), [PTX.format("attend")])


def test_modules_of_constants_have_no_kernels(tmp_path):
    assert assemble(fake_ptxas(tmp_path, "exit 1"), [".version 9.0\n.target sm_90a\n"]) == []


def test_what_is_not_ptx_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="expected PTX"):
        assemble(fake_ptxas(tmp_path, "exit 1"), ["; LLVM"])
