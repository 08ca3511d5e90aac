"""The peak of one core: what it multiplies in a second where nothing else is to be done.

    python benchmarks/encoder_peaks.py

Loops in C on registers alone, compiled where there is a compiler: fp32, int8 by VNNI, int8 by AMX,
each where the processor has it. Beside them what large products reach: fp32 by numpy, int8 by
onnxruntime. A product and an addition are two operations; seconds are the process's CPU time.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

_SOURCE = r"""
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

#define TIMES 4000000L
#define BEST(NAME, OPERATIONS, BODY)                                   \
    do {                                                               \
        double best = 0;                                               \
        for (int round = 0; round < 8; round++) {                      \
            double begin = now();                                      \
            for (long n = 0; n < TIMES; n++) { BODY }                  \
            double rate = (double)TIMES * (OPERATIONS) / (now() - begin); \
            if (rate > best) best = rate;                              \
        }                                                              \
        printf("%s %.0f\n", NAME, best / 1e9);                         \
    } while (0)
#define TWELVE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

int main(void) {
#if defined(__AVX512F__)
    {
        __m512 a = _mm512_set1_ps(1.0001f), b = _mm512_set1_ps(0.9999f);
#define DECLARE(i) register __m512 f##i = _mm512_set1_ps(i);
#define MULTIPLY(i) __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(f##i) : "v"(a), "v"(b));
        TWELVE(DECLARE)
        BEST("fp32", 12 * 32, TWELVE(MULTIPLY));
    }
#elif defined(__FMA__)
    {
        __m256 a = _mm256_set1_ps(1.0001f), b = _mm256_set1_ps(0.9999f);
#define DECLARE(i) register __m256 f##i = _mm256_set1_ps(i);
#define MULTIPLY(i) __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(f##i) : "v"(a), "v"(b));
        TWELVE(DECLARE)
        BEST("fp32", 12 * 16, TWELVE(MULTIPLY));
    }
#endif
#if defined(__AVX512VNNI__)
    {
        __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(2);
#define DECLARE8(i) register __m512i q##i = _mm512_set1_epi32(i);
#define MULTIPLY8(i) __asm__ volatile("vpdpbusd %1, %2, %0" : "+v"(q##i) : "v"(a), "v"(b));
        TWELVE(DECLARE8)
        BEST("int8 by VNNI", 12 * 128, TWELVE(MULTIPLY8));
    }
#endif
#if defined(__AMX_INT8__) && defined(__linux__)
    /* The kernel grants tiles to a process that asks: ARCH_REQ_XCOMP_PERM, XTILEDATA. */
    if (syscall(SYS_arch_prctl, 0x1023, 18) == 0) {
        struct __attribute__((packed)) {
            uint8_t palette, start, reserved[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        } tiles = {.palette = 1};
        for (int i = 0; i < 8; i++) { tiles.bytes[i] = 64; tiles.rows[i] = 16; }
        _tile_loadconfig(&tiles);
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
        BEST("int8 by AMX", 4 * 2 * 16 * 16 * 64,
             _tile_dpbusd(0, 4, 6); _tile_dpbusd(1, 4, 7);
             _tile_dpbusd(2, 5, 6); _tile_dpbusd(3, 5, 7););
        _tile_release();
    }
#endif
    return 0;
}
"""


def peaks() -> dict[str, float]:
    """Billions of operations a second of one core, by how they are done."""
    return {**loops(), "fp32, numpy": _numpy(), "int8, onnxruntime": _onnxruntime()}


def loops() -> dict[str, float]:
    """Loops on registers; empty where there is no compiler, or no x86."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "peaks.c", Path(folder) / "peaks"
        source.write_text(_SOURCE)
        made = subprocess.run(
            [compiler, "-O2", "-march=native", str(source), "-o", str(program)],
            capture_output=True,
        )
        if made.returncode:
            return {}
        lines = subprocess.run([str(program)], capture_output=True, text=True).stdout.splitlines()
    return {name: float(rate) for name, _, rate in (line.rpartition(" ") for line in lines)}


def _best(operations: float, run: Callable[[], object]) -> float:
    best = 0.0
    for _ in range(8):
        begin = time.process_time()
        run()
        best = max(best, operations / max(time.process_time() - begin, 1e-9))
    return round(best / 1e9, 1)


def _numpy() -> float:
    a = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    return _best(2 * 1024**3, lambda: a @ a)


def _onnxruntime() -> float:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rows, width = 1024, 1536
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (width, width)).astype(np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "z"], ["y"])],
        "peak",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [rows, width])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [rows, width])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.uint8(128), "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = random.integers(0, 256, (rows, width)).astype(np.uint8)
    return _best(2.0 * rows * width * width, lambda: session.run(None, {"x": x}))


if __name__ == "__main__":
    for how, rate in peaks().items():
        print(f"{how:20} {rate:8.0f} GOP/s")
