"""What the CPU's implementations keep: scratch and memory for results."""

import threading

import pytest
import torch
from contract import different
from torch import nn

from teint8 import ops, te_int8_autocast
from teint8.kernels import cpu_rows
from teint8.ops import cpu, registry


def test_results_are_never_shared_while_they_are_held() -> None:
    """Large results reuse memory; a tensor, a view, a numpy array or a gradient graph that holds one keeps it."""
    layer, x = nn.Linear(256, 512), torch.randn(512, 256)
    with torch.inference_mode(), te_int8_autocast(training=False):
        first = layer(x)
        value = first.clone()
        view, array = layer(x + 1)[3:5], layer(x + 2).numpy()
        held, kept = view.clone(), array.copy()
        for i in range(20):
            layer(x * i)
        again = [layer(x) for _ in range(5)]
        assert torch.equal(first, value) and torch.equal(view, held) and (array == kept).all()
        assert len({y.data_ptr() for y in [first, view, *again]}) == 7 and all(torch.equal(y, value) for y in again)
        place = layer(x).data_ptr()
        assert layer(x).data_ptr() == place  # nobody held it
        y = layer(x)
        storage = y.untyped_storage()
        del y
        assert layer(x + 3).data_ptr() != storage.data_ptr()


def test_shared_memory_is_not_used_again() -> None:
    layer, x = nn.Linear(256, 512), torch.randn(512, 256)
    with torch.inference_mode(), te_int8_autocast(training=False):
        y = layer(x).share_memory_()
        place = y.data_ptr()
        del y
        assert all(layer(x).data_ptr() != place for _ in range(5))


def test_results_outlive_inference_mode() -> None:
    layer, x = nn.Linear(256, 512), torch.randn(512, 256)
    for context in (torch.inference_mode, torch.no_grad) * 2:
        with context(), te_int8_autocast(training=False):
            y = layer(x)
    assert not y.is_inference() and y.add_(1).shape == (512, 512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_linear_over_many_chunks(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_CODES", 1 << 14)
    x, w, bias = torch.randn(700, 130).to(dtype), torch.randn(70, 130).to(dtype), torch.randn(70).to(dtype)
    want = ops.linear(x, w, bias, impl="reference")
    x, w, bias = x.to(device), w.to(device), bias.to(device)
    (wq, ws), problem = ops.quantize(w), registry.Problem(device, dtype, 1, 700, 70, 130)
    ran = [i for i in registry.implementations("linear") if registry.why_not(i, problem) is None]
    for implementation in ran:
        assert different(implementation.run(x, wq, ws, bias, dtype), want) == 0, implementation.name
    assert ran or (device == "cpu" and cpu_rows.why_not() is not None)
    assert device != "cpu" or not cpu_rows.has_vnni() or "cpu-vnni" in [i.name for i in ran]
    assert device != "cpu" or not cpu_rows.has_avx2() or "cpu-avx2" in [i.name for i in ran]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_matmul_for_avx2_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built without AVX-512 where the CPU has it, so that it is tested on such machines, too."""
    monkeypatch.setattr(cpu_rows, "_FLAGS", (*cpu_rows._FLAGS, "-mno-avx512f"))
    for cached in (cpu_rows._load, cpu_rows._function, cpu_rows._has_amx):
        cached.cache_clear()
    try:
        if not cpu_rows.has_avx2():
            reason = cpu_rows.why_not()
            assert reason is None or "load" not in reason, reason  # what was built must load
            pytest.skip(reason or "the CPU has no AVX2")
        for m, n, k in ((1, 1, 2), (1, 33, 64), (3, 32, 65), (2, 100, 1000), (257, 70, 130), (700, 40, 33)):
            x, w, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
            x[0] = 0 if m > 1 else x[0]
            (xq, xs), (wq, ws) = ops.quantize(x, impl="reference"), ops.quantize(w, impl="reference")
            want = ops.int8_mm(xq, xs, wq, ws, bias, dtype, impl="reference")
            assert different(cpu._linear_on("avx2")(x, wq, ws, bias, dtype), want) == 0
            assert different(cpu._mm_on("avx2")(xq, xs, wq, ws, bias, dtype), want) == 0
        codes, one = torch.full((1, 131072), 127, dtype=torch.int8), torch.ones(1)  # the longest sum that int32 holds
        assert float(cpu._mm_on("avx2")(codes, one, codes, one, None, dtype)[0, 0]) == float(torch.tensor(131072 * 127.0**2).to(dtype))
    finally:
        for cached in (cpu_rows._load, cpu_rows._function, cpu_rows._has_amx):
            cached.cache_clear()


def test_threads_have_scratch_of_their_own() -> None:
    layer, xs = nn.Linear(256, 512), [torch.randn(512, 256) for _ in range(4)]
    want = [ops.linear(x, layer.weight.detach(), layer.bias.detach(), impl="reference") for x in xs]
    right: list[bool] = []

    def work(n: int) -> None:
        with torch.inference_mode(), te_int8_autocast(training=False):
            right.extend(torch.equal(layer(xs[n]), want[n]) for _ in range(25))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 100


@pytest.mark.parametrize("m,n,k", [(300, 2048, 512), (70, 2000, 1000), (17, 4096, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_panels_on_many_threads(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """More groups than one, and more threads than cores: each job packs its own, and reads the codes that all have written."""
    x, w, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    x[3], x[5, 7] = 0, float("nan")
    (xq, xs), (wq, ws) = ops.quantize(x, impl="reference"), ops.quantize(w, impl="reference")
    want = ops.int8_mm(xq, xs, wq, ws, bias, dtype, "reference")
    threads, ran = torch.get_num_threads(), []
    torch.set_num_threads(8)
    try:
        for op in ("linear", "int8_mm"):
            for isa in ops.implementations(op):
                problem = ops.Problem("cpu", dtype, 1, m, n, k)
                if isa.name not in ("cpu-amx", "cpu-vnni", "cpu-avx2") or isa.why_not(problem):
                    continue
                y = isa.run(x, wq, ws, bias, dtype) if op == "linear" else isa.run(xq, xs, wq, ws, bias, dtype)
                assert different(y, want) == 0, (op, isa.name)
                ran.append(isa.name)
    finally:
        torch.set_num_threads(threads)
    if not ran:
        pytest.skip("no kernel in C for this CPU")


def test_without_a_compiler_the_torch_paths_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rows, "why_not", lambda: "no C compiler was found (install gcc, or set CC)")
    registry._selected.clear()
    try:
        problem = registry.Problem("cpu", torch.float32, 1, 40, 20, 60)
        assert registry.select("int8_mm", problem).name == "cpu-onednn"
        assert registry.select("quantize", problem._replace(n=0)).name == "reference"
        assert registry.best("linear", problem) is None
        x, w = torch.randn(40, 60), torch.randn(20, 60)
        assert different(ops.linear(x, w), ops.linear(x, w, impl="reference")) == 0
    finally:
        registry._selected.clear()


def test_autocast_to_another_dtype_is_not_fused() -> None:
    layer, x = nn.Linear(64, 32), torch.randn(40, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), te_int8_autocast(training=False):
        y = layer(x)
    want = ops.linear(x, layer.weight.detach(), layer.bias.detach(), impl="reference", dtype=torch.bfloat16)
    assert different(y, want) == 0
