"""The activation functions of ``teint8.activations`` in Triton, with the same bits: polynomials of IEEE operations."""

import os

import triton
import triton.language as tl

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:

    @triton.jit
    def fma(a, b, c):
        """a * b + c rounded once: the interpreter's own fma rounds twice, so float64 rounds to odd first."""
        c = c.to(tl.float64)
        product = a.to(tl.float64) * b.to(tl.float64)
        total = product + c
        back = total - product
        error = (product - (total - back)) + (c - back)
        bits = total.to(tl.int64, bitcast=True)
        up = (error > 0) == (total > 0)
        odd = tl.where((error != 0) & (bits % 2 == 0), tl.where(up, bits + 1, bits - 1), bits)
        finite = tl.abs(total) < float("inf")
        return tl.where(finite, odd.to(tl.float64, bitcast=True), total).to(tl.float32)

    @triton.jit
    def pack4(a, b, c, d):
        """The low bytes of four int32."""
        return (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | (d << 24)

    @triton.jit
    def rounded(x, DTYPE: tl.constexpr):
        """x in DTYPE and back: the interpreter's own cast to bfloat16 does not round."""
        if tl.bfloat16 == DTYPE:
            bits = x.to(tl.int32, bitcast=True)
            near = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
            return tl.where(x == x, near.to(tl.float32, bitcast=True), x)
        return x.to(DTYPE).to(tl.float32)

    rounded_pairs = rounded

    @triton.jit
    def reciprocal(d):
        """1 / d."""
        return 1.0 / d

else:

    @triton.jit
    def reciprocal(d):
        """1 / d for d in [1, 2^125], rounded correctly: the hardware's guess and one step (tests/test_kernels.py tries every d)."""
        return tl.inline_asm_elementwise(
            "{ .reg .f32 r, h, n; rcp.approx.ftz.f32 r, $1; neg.f32 n, $1; fma.rn.f32 h, n, r, 0f3F800000; fma.rn.f32 $0, r, h, r; }",
            "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip

    @triton.jit
    def fma(a, b, c):
        """a * b + c rounded once."""
        return tl.fma(a, b, c)

    @triton.jit
    def pack4(a, b, c, d):
        """The low bytes of four int32, in three instructions."""
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, s; prmt.b32 t, $1, $2, 0x0040; prmt.b32 s, $3, $4, 0x0040; prmt.b32 $0, t, s, 0x5410; }",
            "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip

    @triton.jit
    def rounded(x, DTYPE: tl.constexpr):
        """x in DTYPE and back."""
        return x.to(DTYPE).to(tl.float32)

    @triton.jit
    def rounded_pairs(x, DTYPE: tl.constexpr):
        """``rounded`` of two values or more a thread: one conversion for two, which alone takes four times as long as another op."""
        if tl.bfloat16 == DTYPE:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t, s; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 s, t, 16; mov.b32 $0, s; "
                "and.b32 s, t, 0xffff0000; mov.b32 $1, s; }",
                "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2,
            )  # fmt: skip
        return x.to(DTYPE).to(tl.float32)


@triton.jit
def _const(x, VALUE: tl.constexpr):
    return tl.full(x.shape, VALUE, tl.float32)


@triton.jit
def exp_negative(x):
    """exp(-x), x clamped to [-86, 86]."""
    x = tl.minimum(tl.maximum(x, -86.0), 86.0)
    log2e = _const(x, -1.4426950408889634)
    shifted = fma(x, log2e, _const(x, 12582912.0))
    fraction = fma(x, log2e, -(shifted - 12582912.0))
    p = fma(_const(x, 0.009582852944731712), fraction, _const(x, 0.055906426161527634))
    p = fma(p, fraction, _const(x, 0.24024099111557007))
    p = fma(p, fraction, _const(x, 0.6931241750717163))
    p = fma(p, fraction, _const(x, 1.0))
    return (p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return reciprocal(1.0 + exp_negative(x))


@triton.jit
def value_and_slope(x, KIND: tl.constexpr):
    """act(x) and its derivative; what is not used costs nothing."""
    if KIND == "silu":
        s = sigmoid(x)
        z = x * s
        slope = fma(z, 1.0 - s, s)
    elif KIND == "gelu":
        e = exp_negative((x * x) * 0.5)
        t = reciprocal(fma(tl.abs(x), _const(x, 0.23164188826636045), _const(x, 1.0)))
        p = fma(_const(x, 1.061405429), t, _const(x, -1.453152027))
        p = fma(p, t, _const(x, 1.421413741))
        p = fma(p, t, _const(x, -0.284496736))
        p = fma(p, t, _const(x, 0.254829592))
        tail = ((p * t) * e) * 0.5
        cdf = tl.where(x < 0, tail, 1.0 - tail)
        z = x * cdf
        slope = fma(x, e * 0.3989422804014327, cdf)
    else:
        square = tl.minimum(tl.maximum(x, -64.0), 64.0)
        square = square * square
        cube = _const(x, 0.044715)
        s = sigmoid((x * fma(square, cube, _const(x, 1.0))) * 1.5957691216057308)
        z = x * s
        rise = fma(square, _const(x, 0.134145), _const(x, 1.0)) * 1.5957691216057308
        slope = fma(z * (1.0 - s), rise, s)
    return z, slope
