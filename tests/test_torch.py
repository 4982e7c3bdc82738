"""Each private torch API that teint8 leans on still does what it is used for."""

import torch
from torch.func import grad, jvp, vmap

from teint8 import _torch


def test_transforms_are_seen() -> None:
    seen = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append((_torch.in_transform(), _torch.needs_math_attention("cuda"), _torch.is_plain(x)))
        return x.sum()

    x = torch.ones(3)
    f(x), grad(f)(x), vmap(f)(torch.ones(2, 3)), jvp(f, (x,), (x,)), grad(lambda x: grad(f)(x).sum() + x.sum())(x)
    assert seen == [(False, False, True), (True, False, False), (True, False, False), (True, True, False), (True, True, False)]


def test_what_transforms_wrap_is_found() -> None:
    x, found = torch.ones(2, 3), []
    grad(lambda x: vmap(lambda row: (found.append(_torch.unwrapped(row).data_ptr()), row.sum())[1])(x).sum())(x)
    assert found == [x.data_ptr()] and _torch.unwrapped(x) is x


def test_forward_ad_modes_and_subclasses_are_seen() -> None:
    assert _torch.forward_ad_level() == -1 and _torch.no_dispatch_modes()
    with torch.autograd.forward_ad.dual_level():
        assert _torch.forward_ad_level() == 0
    fake = _torch.to_fake({"x": torch.ones(2)})
    with _torch.fake_mode_of(fake):
        assert not _torch.no_dispatch_modes()
    assert not _torch.is_plain(fake["x"]) and _torch.is_plain(torch.nn.Parameter(torch.ones(2)))


def test_storages() -> None:
    x = torch.ones(4)
    ref, storage = _torch.storage_ref(x), x.untyped_storage()
    uses = _torch.storage_uses(storage)
    view = x[1:]
    assert _torch.storage_uses(storage) == uses + 1 and not ref.expired()
    del x, view
    assert _torch.storage_uses(storage) == 1
    del storage
    assert ref.expired()


def test_differentiation_of_a_tree_is_seen() -> None:
    class Leafless:
        """Stands for a packed weight: notes what asks for its leaves."""

    seen: list[bool] = []
    torch.utils._pytree.register_pytree_node(
        Leafless, lambda t: (seen.append(_torch.marks_differentiable()) or [], None), lambda leaves, _: Leafless()
    )
    grad(lambda x, t: x.sum())(torch.ones(2), Leafless())
    assert seen and not any(seen)
    grad(lambda t: t["x"].sum())({"x": torch.ones(2), "t": Leafless()})
    assert any(seen)


def test_members_are_those_of_torch() -> None:
    inner = torch.nn.Linear(2, 2)
    module = torch.nn.Sequential(inner, torch.nn.BatchNorm1d(2), torch.nn.Sequential(inner))
    module[1].register_buffer("unset", None)
    members = list(_torch.members(module))
    for is_buffer, named in ((False, module.named_parameters), (True, module.named_buffers)):
        want = list(named(remove_duplicate=False))
        got = [(path, t) for path, t, b in members if b is is_buffer]
        assert [path for path, _ in got] == [path for path, _ in want] and all(a is b for (_, a), (_, b) in zip(got, want, strict=True))
    assert "2.0.weight" in [path for path, _, _ in members]
