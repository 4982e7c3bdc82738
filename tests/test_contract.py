"""Every implementation against the reference, bit for bit."""

import os

import pytest
import torch
from contract import DTYPES, Case, cases, check, different
from hypothesis import HealthCheck, example, given, settings

from teint8 import numerics, ops
from teint8.ops import registry

CPU = ("cpu-c", "cpu-amx", "cpu-vnni", "cpu-avx2", "cpu-onednn-c", "cpu-onednn", "cpu-exact-float")
SETTINGS = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.usefixtures("poisoned")
@SETTINGS
@given(case=cases)
@example(Case(1, 129, 300, 1, torch.float32, "normal", "transposed", True, 1))
@example(Case(1, 4, 100, 1, torch.float32, "flush", "contiguous", False, 0))
@example(Case(1, 1, 1, 300, torch.float32, "normal", "contiguous", False, 3))
def test_cpu(case: Case) -> None:
    check(case, "cpu", CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU here")
@pytest.mark.usefixtures("poisoned")
@SETTINGS
@given(case=cases)
def test_triton_interpreter(case: Case) -> None:
    check(case, "cpu", ("triton-interpreter",))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.usefixtures("poisoned")
@SETTINGS
@given(case=cases)
def test_gpu(case: Case) -> None:
    check(case, "cuda", ("triton", "triton-hopper", "triton-gemv", "cublas"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,n,k", [(1, 4096, 4096), (257, 1000, 4096), (2048, 2050, 1023), (4096, 4096, 14336), (33, 65, 20000)])
def test_gpu_at_real_sizes(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w, bias = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda"), torch.randn(n, device="cuda")
    x, w, bias = x.to(dtype), w.to(dtype), bias.to(dtype)
    for seed in (None, torch.tensor(12345678901234, device="cuda")):
        got, want = ops.quantize(x, seed=seed), ops.quantize(x, seed=seed, impl="reference")
        assert [different(a, b) for a, b in zip(got, want, strict=True)] == [0, 0]
    assert different(ops.linear(x, w, bias), ops.linear(x, w, bias, impl="reference")) == 0


@pytest.mark.parametrize("k", [numerics.MAX_INT32_K, numerics.MAX_INT32_K + 1, 3 * numerics.MAX_INT32_K + 77])
def test_sums_that_overflow_int32(k: int, device: str) -> None:
    xq = torch.full((2, k), 127, dtype=torch.int8, device=device)
    wq = torch.full((3, k), 127, dtype=torch.int8, device=device)
    wq[1] = -127
    xs, ws = torch.ones(2, device=device), torch.ones(3, device=device)
    exact = torch.tensor([1, -1, 1], device=device).double() * (127 * 127 * k)
    names = [i.name for i in registry.implementations("int8_mm")]
    problem = registry.Problem(device, torch.float32, 1, 2, 3, k)
    ran = []
    for name in names:
        implementation = next(i for i in registry.implementations("int8_mm") if i.name == name)
        if registry.why_not(implementation, problem) is None:
            got = ops.int8_mm(xq, xs, wq, ws, None, torch.float32, name)
            assert torch.equal(got, exact.float().expand(2, 3)), name
            ran.append(name)
    alone = device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"  # where only the interpreter joins it, for these sizes
    assert "reference" in ran and (len(ran) > 1 or alone), ran


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    x, w, bias = torch.randn(300, 512), torch.randn(200, 512), torch.randn(200)
    images, kernels = torch.randn(2, 8, 30, 30), torch.randn(16, 8, 3, 3)
    want = ops.linear(x, w, bias, impl="reference"), ops.conv(images, kernels, impl="reference")
    (xq, xs), (wq, ws) = ops.quantize(x), ops.quantize(w)
    problem = registry.Problem("cpu", x.dtype, 1, 300, 200, 512)
    names = [i.name for i in registry.implementations("int8_mm") if registry.why_not(i, problem) is None]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert different(ops.linear(x, w, bias), want[0]) == 0 and different(ops.conv(images, kernels), want[1]) == 0
        for name in names:
            assert different(ops.int8_mm(xq, xs, wq, ws, bias, x.dtype, name), want[0]) == 0, name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_row_spoils_itself_alone(dtype: torch.dtype, device: str) -> None:
    x, w = torch.randn(40, 64).to(device, dtype), torch.randn(24, 64).to(device, dtype)
    clean = ops.linear(x, w)
    x[3, 5], x[7, 0], w[11, 9] = float("nan"), float("-inf"), float("inf")
    y = ops.linear(x, w)
    assert y[[3, 7]].isnan().all() and y[:, 11].isnan().all()
    keep_m = [i for i in range(40) if i not in (3, 7)]
    keep_n = [i for i in range(24) if i != 11]
    assert torch.equal(y[keep_m][:, keep_n], clean[keep_m][:, keep_n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_the_batch(dtype: torch.dtype, device: str) -> None:
    x, w = torch.randn(257, 100).to(device, dtype), torch.randn(70, 100).to(device, dtype)
    whole = ops.linear(x, w)
    alone = torch.cat([ops.linear(x[i : i + 1], w) for i in range(257)])
    assert different(whole, alone) == 0


def test_stochastic_rounding_is_unbiased_and_uniform() -> None:
    u = numerics.noise(512, 512, torch.tensor(3)) - 1
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.003 and abs(u.var() - 1 / 12) < 0.002
    # neither neighbours nor seeds are correlated
    other = numerics.noise(512, 512, torch.tensor(4)) - 1
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u, other)):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01
    # nor any two rows or columns by much, and all pairs together no more than by chance
    wide = numerics.noise(1024, 4096, torch.tensor(5)) - 1.5
    for z in (wide, wide[:, :1024].mT):
        z = z * 12**0.5
        squares = (z @ z.mT / z.shape[1]).fill_diagonal_(0).square()
        assert squares.max() < 0.4**2 and squares.mean() * z.shape[1] < 1.02
    x = torch.tensor([[127.0, 0.25, 10.5, -3.75]]).expand(4000, 4)
    mean = ops.quantize(x, seed=torch.tensor(1))[0].float().mean(0)
    assert torch.allclose(mean, x[0], atol=0.03)
    assert (ops.quantize(x, seed=torch.tensor(1))[0] == ops.quantize(x, seed=torch.tensor(1))[0]).all()


def test_partners_of_a_seed_are_transposes_and_empty_rows_have_scales() -> None:
    a, b = numerics.noise(40, 30, torch.tensor([6])), numerics.noise(30, 40, torch.tensor([7]))
    assert torch.equal(a, b.mT)
    codes, scale = numerics.quantize(torch.empty(3, 0), torch.tensor([1]))
    assert codes.shape == (3, 0) and scale.tolist() == [0, 0, 0]


def test_stochastic_rounding_keeps_absmax_at_127() -> None:
    # x * (127 / x) may be rounded above 127, where the noise must not reach the next code
    x = torch.rand(200_000, 1) + 0.5
    assert (x * numerics.multiplier_of(numerics.absmax(x)).unsqueeze(-1) > 127).any()
    for impl in ("reference", ""):
        codes = ops.quantize(torch.cat([x, -x], 1), seed=torch.tensor(9), impl=impl)[0].float()
        assert codes[:, 0].min() >= 126 and codes[:, 0].max() == 127 and codes[:, 1].max() <= -126 and codes[:, 1].min() == -127


def test_error_bound_of_one_product() -> None:
    x, w = torch.randn(64, 4096), torch.randn(64, 4096)
    exact = x.double() @ w.double().t()
    assert ((ops.linear(x, w) - exact).norm() / exact.norm()) < 0.013


def test_scale_contract_at_its_edges() -> None:
    tiny = torch.tensor([[2.0**-100, 0], [2.0**-101, 0], [0, 0], [float("nan"), 0], [1, float("inf")]])
    codes, scale = ops.quantize(tiny)
    assert codes[:, 0].tolist() == [127, 0, 0, 0, 0]
    assert scale[0] > 0 and scale[1] == scale[2] == 0 and scale[3:].isnan().all()
    assert ops.quantize(torch.zeros(3, 0))[1].tolist() == [0, 0, 0]


def test_registering_an_implementation_is_enough() -> None:
    calls = []

    def mine(*operands):
        calls.append(operands[0].shape)
        return numerics.int8_mm(*operands)

    registry.register("int8_mm", "mine", mine, device="cpu", priority=99)
    try:
        x, w = torch.randn(4, 8), torch.randn(3, 8)
        ops.int8_mm(*ops.quantize(x), *ops.quantize(w), None, torch.float32)
        assert calls == [(1, 4, 8)]
        problem = registry.Problem("cpu", torch.float32, 1, 4, 3, 8)
        assert registry.select("int8_mm", problem).name == "mine"
    finally:
        registry._implementations["int8_mm"] = [i for i in registry.implementations("int8_mm") if i.name != "mine"]
        registry._selected.clear()
