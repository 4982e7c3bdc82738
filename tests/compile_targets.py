"""Compile every kernel for chips that are not here, as ``python tests/compile_targets.py 80 90``; prints a JSON line for each.

Triton needs no GPU to compile: registers, spills and shared memory of each configuration in the tables are read off the binary.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from teint8.kernels import (
    activation_rows,
    attention,
    block_mm,
    channel_norm,
    conv,
    dequantize,
    finish,
    gemv,
    grouped_mm,
    hopper,
    int8_mm,
    norm,
    quantize,
    quantize_both,
    quantize_both_kernels,
    quantize_long,
    rotate,
    weight_only,
)

POINTERS = {"seed_ptr": "*i64"}
INTS = ("tops_ptr", "sums_ptr")
FLOATS32 = ("scale_ptr", "given_ptr", "xs_ptr", "ws_ptr", "us_ptr", "scale0_ptr", "scale1_ptr", "mean_ptr", "factor_ptr")
CODES = ("codes", "x_ptr_i8", "w_ptr", "up_ptr")


def pointer(name: str, overrides: dict) -> str:
    if name in overrides:
        return overrides[name]
    if name in POINTERS:
        return POINTERS[name]
    if name in INTS:
        return "*i32"
    if name in FLOATS32:
        return "*fp32"
    return "*i8" if "codes" in name or name in CODES else "*bf16"


def signature(kernel, constants: dict, overrides: dict) -> tuple[dict, dict]:
    kinds, attributes = {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            kinds[name] = "constexpr"
            continue
        kinds[name] = overrides.get(name) or (pointer(name, overrides) if name.endswith("_ptr") else "i32")
        if not kinds[name].startswith("tensordesc"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return kinds, attributes


def report(name: str, arch: int, compiled) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(v) for v in re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    line = {"kernel": name, "arch": arch, "registers": registers, "stack": stack, "shared": compiled.metadata.shared}
    print(json.dumps(line), flush=True)


def core(name: str, arch: int, kernel, constants: dict, overrides: dict | None = None, **options) -> None:
    kinds, attributes = signature(kernel, constants, overrides or {})
    names = [p.name for p in kernel.params]
    source = ASTSource(kernel, kinds, {(names.index(n),): v for n, v in constants.items()}, attributes)
    report(name, arch, triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False, **options}))


def gluon(name: str, tile: hopper.Tile, tma: bool, split: int = 1, two: bool = False, bias: bool = False,
          residual: str = "", even: bool = False, rows: int = 64) -> None:  # fmt: skip
    """``rows``: how many of x are read."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = hopper.kernel()
    part = min(64, tile.block_n)
    of_codes, of_values = (gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2) for bits in (8, 16))
    x, w = f"tensordesc<i8[{rows}, 128],{of_codes!r}>", f"tensordesc<i8[{tile.block_n}, 128],{of_codes!r}>"
    y = f"tensordesc<bf16[64, {part}],{of_values!r}>" if tma else x
    constants = dict(
        PROGRAMS=132, CONSUMERS=tile.consumers, GROUP=tile.group, STAGES=tile.stages, PART=part, BUFFERS=tile.buffers,
        REGISTERS=tile.registers, SCALES_FIRST=tile.scales_first and not bias and residual != "load",
        BIAS=bias, RESIDUAL=residual, TMA_STORE=tma, SPLIT=split, TWO=two, EVEN=even,
    )  # fmt: skip
    overrides = {"x_desc": x, "w_desc": w, "u_desc": w, "y_desc": y, "y_ptr": "*i32" if split > 1 else "*bf16"}
    kinds, attributes = signature(kernel, constants, overrides)
    names = [p.name for p in kernel.params]
    source = GluonASTSource(kernel, kinds, {(names.index(n),): v for n, v in constants.items()}, attributes)
    options = {"num_warps": 4, "maxnreg": tile.limit, "enable_fp_fusion": False}
    report(name, 90, triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options))


def kernels(arch: int) -> None:
    for c in (*(c for _, c in int8_mm.table(arch // 10)), *((int8_mm.NARROW,) if arch == 90 else ())):
        sizes = dict(BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, GROUP=8)
        constants = dict(HAS_BIAS=True, EVEN_K=True, WIDE=False, WIDE_EVERY=1024, **sizes)
        core(f"int8_mm {tuple(c)}", arch, int8_mm._int8_mm_kernel, constants, {"x_ptr": "*i8"}, num_warps=c.warps, num_stages=c.stages)
        sizes.pop("GROUP")
        grouped = dict(EVEN_K=True, WIDE=False, WIDE_EVERY=1024, MOST_GROUPS=16, **sizes)
        core(f"grouped_mm {tuple(c)}", arch, grouped_mm._grouped_mm_kernel, grouped, {"x_ptr": "*i8", "ends_ptr": "*i32"},
             num_warps=c.warps, num_stages=c.stages)  # fmt: skip
    for m in (16, 32, 4096):
        c = int8_mm.config_of(m, arch // 10, int8_mm.MAX_INT32_K + 1)
        sizes = dict(WIDE=True, WIDE_EVERY=1024, EVEN_K=False, BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k)
        for kernel, name, more, pointers in (
            (int8_mm._int8_mm_kernel, "int8_mm", dict(HAS_BIAS=True, GROUP=8), {"x_ptr": "*i8"}),
            (grouped_mm._grouped_mm_kernel, "grouped_mm", dict(MOST_GROUPS=16), {"x_ptr": "*i8", "ends_ptr": "*i32"}),
        ):
            core(f"{name} long {tuple(c)}", arch, kernel, {**sizes, **more}, pointers, num_warps=c.warps, num_stages=c.stages)
    shapes = ((16,), (32,), (128,), (65536, 64), (65536, 256), (8192, 256, 2304), (3136, 512, 4608), (65536, 64, 147, True))
    for sizes, by_tap in (*((sizes, True) for sizes in shapes), ((32,), False), ((65536, 256), False)):
        c = conv.tile_of(*sizes, major=arch // 10)
        blocks = dict(BY_ROW=len(sizes) > 3, BY_TAP=by_tap, BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, GROUP=8)
        core(f"conv {sizes} {by_tap}", arch, conv._conv_kernel, dict(HAS_BIAS=True, **blocks), {"x_ptr": "*i8"},
             num_warps=c.warps, num_stages=c.stages)  # fmt: skip
    core("depthwise", arch, conv._depthwise_kernel, dict(HAS_BIAS=True, BLOCK_M=32, BLOCK_C=64), {"x_ptr": "*i8"}, num_warps=4)
    rows = dict(STOCHASTIC=False, STATIC=False, BLOCK_M=1, BLOCK_K=16384, ONE_BLOCK=True)
    core("quantize", arch, quantize._quantize_kernel, rows, num_warps=4)
    core("quantize stochastic", arch, quantize._quantize_kernel, {**rows, "STOCHASTIC": True}, num_warps=4)
    core("quantize static", arch, quantize._quantize_kernel, {**rows, "STATIC": True}, num_warps=4)
    for kind, backward, value, blocks in (
        ("", False, False, quantize_both.PLAIN),
        ("silu", False, False, quantize_both.FORWARD),
        ("silu", True, False, quantize_both.BACKWARD),
        ("silu", True, True, quantize_both.BACKWARD),
    ):
        how = dict(KIND=kind, GATED=bool(kind), BACKWARD=backward, EVEN=True, WIDE=False, OUTPUTS=1 + backward, VALUE=value)
        bm, bn, span, stages, warps = blocks.absmax
        cm, cn, code_warps = blocks.codes
        for stochastic in (False, True):
            absmax = dict(**how, STOCHASTIC=stochastic, BLOCK_M=bm, BLOCK_N=bn, SPAN=span, STAGES=stages)
            core(f"absmax {kind} {backward} {value} {stochastic}", arch, quantize_both_kernels._absmax_kernel, absmax, num_warps=warps)
            both = dict(**how, STOCHASTIC=stochastic, BLOCK_M=cm, BLOCK_N=cn)
            core(f"both {kind} {backward} {value} {stochastic}", arch, quantize_both_kernels._both_kernel, both, num_warps=code_warps)
    for each, given in ((False, False), (True, False), (True, True)):
        width = 64 if each else 10
        p, c = channel_norm.shape_of_tile(width, 4096 if each and not given else 8192)
        of = dict(EACH=each, GIVEN=given, WEIGHT=True, BIAS=True, DTYPE=tl.bfloat16, BLOCK_P=p, BLOCK_C=c)
        core(f"channel_norm {each} {given}", arch, channel_norm._statistics_kernel, of, num_warps=8)
    p, c = channel_norm.shape_of_tile(128, 8192)
    of = dict(WEIGHT=True, BIAS=True, CODES=True, VALUES=True, DTYPE=tl.bfloat16, BLOCK_P=p, BLOCK_C=c, BLOCK_PARTS=32)
    core("channel_norm write", arch, channel_norm._write_kernel, of, num_warps=8)
    for backward, codes, hat in ((False, True, False), (True, True, False), (True, False, False), (True, False, True)):
        block, warps = activation_rows.FOR_VALUES if not codes else activation_rows.FOR_TWO if backward else activation_rows.FOR_CODES
        how = dict(KIND="silu", GATED=True, BACKWARD=backward, OUTPUTS=1 + backward, CODES=codes, VALUES=backward, STOCHASTIC=False)
        act = dict(**how, HAT=hat, BLOCK=block, ONE_BLOCK=codes)
        core(f"activation_rows {backward} {codes} {hat}", arch, activation_rows._activation_rows_kernel, act, num_warps=warps)
    gemvs = ((1, gemv.GATED, False), (4, gemv.GATED, False), (1, gemv.ONE, True), (1, gemv.ONE, False), (4, gemv.ONE, False))
    for m, config, floats in gemvs:
        gated = config is gemv.GATED
        constants = dict(
            ROWS=m, DTYPE=triton.language.bfloat16, BIAS=False, UP_BIAS=False, GATED=gated, KIND="silu" if gated else "", EVEN=True,
            QUANTIZE=floats, BLOCK_N=config[0], BLOCK_K=config[1], STAGES=config[3],
        )  # fmt: skip
        x = "*bf16" if floats else "*i8"
        core(f"gemv {m} {config} {floats}", arch, gemv._gemv_kernel, constants, {"x_ptr": x}, num_warps=config[2])
    for block, warps, stages in ((16384, 16, 1), (4096, 4, 3), (8192, 8, 3)):
        norms = dict(
            LAYER=True, RESIDUAL=True, WEIGHT=True, BIAS=True, VALUES=False, CODES=True, DTYPE=triton.language.bfloat16, BLOCK=block,
            EVEN=False, STAGES=stages,
        )  # fmt: skip
        core(f"norm {block}", arch, norm._norm_kernel, norms, {"eps": "fp32"}, num_warps=warps)
    pointers = {"q_ptr": "*i8", "k_ptr": "*i8", "v_ptr": "*i8", "sums_ptr": "*i32", "mask_ptr": "*fp32"}
    pointers |= dict.fromkeys(("a_ptr", "ks_ptr", "vs_ptr"), "*fp32")
    for d, masked in ((64, False), (64, True), (128, False), (128, True), (256, False), (256, True)):
        t = attention.config_of(d, masked, arch // 10)
        how = dict(CAUSAL=True, MASK=masked, EVEN=False, EVEN_D=True, BLOCK_M=t.block_m, BLOCK_N=t.block_n, BLOCK_D=d, BLOCK_E=d)
        core(f"attention {d} {masked}", arch, attention._attention_kernel, how, pointers, num_warps=t.warps, num_stages=t.stages)
    for k in (128, 4096, 16384):
        block_m, block_k, warps = rotate.tile_of(4096, k, "cuda")
        for inverted in (False, True):
            how = dict(SMOOTHED=True, INVERTED=inverted, LEVELS=min(k, 1024).bit_length() - 1, CODES=True, STATIC=False,
                       BLOCK_M=block_m, BLOCK_K=block_k)  # fmt: skip
            pointers = {"smoothing_ptr": "*fp32", "scale_ptr": "*fp32"}
            core(f"rotate {k} {inverted}", arch, rotate._rotate_kernel, how, pointers, num_warps=warps)
    core("dequantize", arch, dequantize._dequantize_kernel, dict(BLOCK_M=16, BLOCK_K=512), num_warps=4)
    for m, n in ((64, 4096), (64, 14336), (32, 14336)):
        b = weight_only.blocks_of(m, n, arch // 10)
        rows = dict(BIAS=True, EVEN_K=True, BLOCK_M=m, BLOCK_N=b.block_n, BLOCK_K=b.block_k)
        core(f"weight_only {m} {n}", arch, weight_only._weight_only_kernel, rows, num_warps=4, num_stages=b.stages)
    for m, block in ((16, 128), (128, 64), (4096, 32), (4096, 128)):
        t = block_mm.config_of(m)
        how = dict(HAS_BIAS=True, EVEN_K=True, BLOCK_M=t.block_m, BLOCK_N=t.block_n, BLOCK_K=block, GROUP=8)
        core(f"block_mm {m} {block}", arch, block_mm._block_mm_kernel, how, {"x_ptr": "*i8"}, num_warps=t.warps, num_stages=t.stages)
    core("tops", arch, quantize_long._tops_kernel, dict(BLOCK=4096, SPAN=4), num_warps=8)
    core("known", arch, quantize_long._known_kernel, dict(BLOCK=4096), num_warps=4)
    core("finish", arch, finish._finish_kernel, dict(PARTS=2, BIAS=True, BLOCK=512), num_warps=2)


if __name__ == "__main__":
    for arch in map(int, sys.argv[1:]):
        kernels(arch)
        if arch == 90:
            for name, tile in hopper.TILES.items():
                gluon(f"hopper {name}", tile, tma=tile.block_n >= 64)
                gluon(f"hopper {name}, even", tile, tma=tile.block_n >= 64, even=True)
                if tile.block_n >= 64:
                    gluon(f"hopper {name}, added to", tile, tma=True, residual="add", even=True)
                if tile is not hopper.HUGE:
                    gluon(f"hopper {name} without TMA stores", tile, tma=False)
            for tile in {tile for tile, _ in (*hopper.RATES, *hopper.FEW) if tile is not hopper.HUGE}:
                gluon(f"hopper {tile} with a bias and a residual", tile, tma=tile.block_n >= 64, bias=True, residual="load")
            for rows in (16, 32):
                for name in ("tiny", "small"):
                    gluon(f"hopper {name} of {rows} rows", hopper.TILES[name], False, rows=rows)
            gluon("hopper split", hopper.SMALL, False, split=2)
            gluon("hopper two", hopper.TINY, False, two=True)
