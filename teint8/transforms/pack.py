"""``pack`` and ``unpack``: float parameters to INT8 weights and back, in the same tree."""

import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from teint8 import _torch
from teint8.conditioning import Conditioned
from teint8.numerics import block_of
from teint8.ops.conv_layout import contracted, packed_kernel
from teint8.ops.raw import quantize as quantize_rows
from teint8.ops.raw_blocks import quantize_blocks
from teint8.policy import Policy, Rule
from teint8.qtensor import QTensor
from teint8.transforms.operands import Operand
from teint8.transforms.quantize import BoundRoute, check_params, quantized, run
from teint8.transforms.reasons import by_block
from teint8.transforms.trees import map_leaves, weights_of

Use = tuple[int | tuple[int, ...], str] | None
"""How a call uses a weight: (contracted dimension, granularity) in INT8, or None in float."""


def pack(qfn: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """``params`` with a QTensor in place of each weight that the policy of ``qfn`` quantizes.

    ``qfn(pack(qfn, params), x)`` gives the bits of ``qfn(params, x)``. A weight that is also used in float (an embedding tied to
    an output layer) stays float, since its codes would not.

    Args:
        qfn: a result of ``quantize``.
        params: its parameters: for a module a dict (also one of a part of them, where no inputs are given), or a tuple of dicts; for
            a function any pytree.
        args, kwargs: example inputs, for an abstract run (shapes only, nothing is computed) that finds which leaves are weights.
            Needed for a function; a module is otherwise read by the types of its layers (nn.Linear, nn.Conv2d and the like,
            nn.MultiheadAttention and transformers' Conv1D, so give inputs where layers of your own multiply by weights).

    Returns:
        A tree of the same structure, with QTensor leaves. Leaves that are packed already stay as they are.

    Raises:
        TypeError: ``qfn`` is not quantized, or a function without example inputs.
        ValueError: nothing to pack.

    Examples:
        >>> from teint8 import quantize
        >>> model = nn.Linear(4, 2)
        >>> packed = pack(quantize(model), dict(model.named_parameters()))
        >>> packed["weight"]
        QTensor(2x4, torch.float32 as int8, axis=-1, device=cpu, 16 bytes)

    """
    target = quantized(qfn)
    groups = params if isinstance(target, nn.Module) and isinstance(params, tuple) else (params,)
    if isinstance(target, nn.Module):
        check_params(target, groups, complete=bool(args or kwargs))
        _check_shapes(target, groups)
    uses = uses_of(qfn, params, args, kwargs)
    packed = tuple(_pack_tree(group, uses) for group in groups)
    if not any(is_packed(leaf) for group in packed for leaf in weights_of(group).values()):
        raise ValueError(
            f"pack: no weight of {qfn.__name__} would be in INT8. Weights of layers that are not known are found by an abstract run: "
            "pack(qfn, params, *args). One that is used in float too (tied to an embedding, in einsum) stays float; else check the "
            f"paths of the rules: {', '.join(map(repr, qfn.policy.rules))}"
        )
    return packed if groups is params else packed[0]


def uses_of(qfn: Any, params: Any, args: Any, kwargs: Any) -> dict[str, set[Use]]:
    """How ``qfn`` uses its weights, by path: by an abstract run where there are inputs, else by the types of a module's layers.

    Raises:
        TypeError: a function, and no inputs.

    """
    target = quantized(qfn)
    if args or kwargs:
        return _survey(qfn, params, args, kwargs)
    if isinstance(target, nn.Module):
        return _read_module(target, qfn.policy)
    raise TypeError(
        f"{qfn.__name__} is made of a function: its weights are found by an abstract run; give example inputs: pack(qfn, params, *args)"
    )


def _check_shapes(module: nn.Module, groups: tuple[Any, ...]) -> None:
    """Weights may have more dimensions in front (a stack of models), and no others."""
    for path, leaf in (item for group in groups for item in group.items()):
        owner, _, name = path.rpartition(".")
        if name == "_extra_state":
            continue
        want = tuple(getattr(module.get_submodule(owner), name).shape)
        if isinstance(leaf, Tensor) and tuple(leaf.shape[max(leaf.ndim - len(want), 0) :]) != want:
            raise ValueError(f"pack: {path} has shape {want} but {tuple(leaf.shape)} was given; are these the params of another model?")


def unpack(packed: Any) -> Any:
    """The tree with each QTensor dequantized: float weights on their INT8 grid; conditioned ones stay so, with a float weight.

    Args:
        packed: a pytree, as ``pack`` returned it; float leaves stay as they are.

    Returns:
        A tree of the same structure, which a model's ``load_state_dict`` takes.

    Examples:
        >>> unpack({"w": QTensor.quantize(torch.tensor([[1.0, -2.0]])), "b": 3.0})
        {'w': tensor([[ 1.0079, -2.0000]]), 'b': 3.0}

    """
    return map_leaves(_unpacked, packed)


def _unpacked(_: str, leaf: Any) -> Any:
    if isinstance(leaf, Conditioned):
        return leaf.unpacked()
    return leaf.dequantize() if isinstance(leaf, QTensor) else leaf


def is_packed(leaf: Any) -> bool:
    """Whether a leaf is a packed weight."""
    return isinstance(leaf.weight if isinstance(leaf, Conditioned) else leaf, QTensor)


def _pack_tree(tree: Any, uses: dict[str, set[Use]]) -> Any:
    return map_leaves(lambda path, leaf: _pack_leaf(leaf, uses.get(path, set())), tree)


def _pack_leaf(leaf: Any, uses: set[Use]) -> Any:
    if not isinstance(leaf, (Tensor, Conditioned)) or len(uses) != 1:
        return leaf
    (use,) = uses
    if use is None:
        return leaf
    return leaf.packed(lambda w: pack_weight(w, *use)) if isinstance(leaf, Conditioned) else pack_weight(leaf, *use)


def pack_weight(weight: Tensor, axis: int | tuple[int, ...], granularity: str) -> QTensor:
    """One weight by the device's kernel, contracted along ``axis``; along several that of a convolution."""
    with torch.no_grad():
        if isinstance(axis, tuple):
            pack_one = functools.partial(packed_kernel, granularity=granularity, transposed=axis == contracted(len(axis) + 1, True))
            for _ in range(weight.ndim - len(axis) - 1):  # a stack of models has more dimensions in front
                pack_one = torch.func.vmap(pack_one)  # type: ignore[assignment]
            return pack_one(weight)
        rows = weight.detach() if axis == -1 else weight.detach().mT
        block = block_of(granularity)
        if block:
            codes, scale = quantize_blocks(rows.reshape(-1, rows.shape[-1]), block)
            return QTensor.from_rows(codes.reshape(rows.shape), scale.reshape(*rows.shape[:-1], -1), weight.dtype, axis)
        codes, scale = quantize_rows(rows, group_dims=1 if granularity == "row" else 2)
        return QTensor.from_rows(codes, scale.unsqueeze(-1), weight.dtype, axis)


class _Survey(BoundRoute):
    """Runs a program on fake tensors and notes how each weight is used."""

    surveys = True

    def __init__(self, policy: Policy) -> None:
        # scales of activations are no matter of weights, and need not be there yet
        dynamic = [rule if rule.activation is None else replace(rule, activation=replace(rule.activation, scale="dynamic")) for rule in
                   policy.rules]  # fmt: skip
        super().__init__(Policy(dynamic), strict=False, receipt=None)
        self.packed_leaves = True  # look through the arguments of every call
        self.uses: dict[str, set[Use]] = {}

    def packed(self, weight: Operand, axis: Any, granularity: str) -> Operand:
        self.uses.setdefault(weight.path, set()).add((axis, granularity))
        return weight

    def plain(self, args: Any) -> Any:
        for leaf in torch_pytree.tree_leaves(args):
            operand = self.known.get(leaf) if isinstance(leaf, Tensor) else None
            if operand is not None:
                self.uses.setdefault(operand.path, set()).add(None)
        return args


def _survey(qfn: Any, params: Any, args: Any, kwargs: Any) -> dict[str, set[Use]]:
    fake_params, fake_args, fake_kwargs = _torch.to_fake((unpack(params), args, kwargs))
    survey = _Survey(qfn.policy)
    with _torch.abstract_run("pack", fake_params, fake_args):
        run(qfn, survey, fake_params, fake_args, fake_kwargs)
    return survey.uses


def _read_module(module: nn.Module, policy: Policy) -> dict[str, set[Use]]:
    """How the layers of a module use its parameters, by their types."""
    by_tensor: dict[Tensor, set[Use]] = {}
    paths: dict[str, Tensor] = {}
    for path, owner, name, parameter in _parameters(module):
        paths[path] = parameter
        axis = _contracted_dimension(owner, name)
        rule = None if axis is None else policy.match(path, _op_of(owner, axis))
        use: Use = None
        if axis is not None and rule is not None and rule.weight is not None and _takes(owner, axis, rule):
            use = axis, rule.weight.grouping
        by_tensor.setdefault(parameter, set()).add(use)
    return {path: by_tensor[parameter] for path, parameter in paths.items()}


def _takes(owner: nn.Module, axis: int | tuple[int, ...], rule: Rule) -> bool:
    """Whether calls of the layer are INT8 by such a rule: tables and bilinear layers by row alone, convolutions not by block."""
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag, nn.Bilinear)):
        return rule.weight is not None and rule.weight.granularity == "row"
    return not (isinstance(axis, tuple) and by_block(rule))


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{prefix}.{name}" if prefix else name, owner, name, parameter


def _op_of(owner: nn.Module, axis: int | tuple[int, ...]) -> str:
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(owner, nn.RNNBase):
        return "recurrent"
    if isinstance(owner, nn.Bilinear):
        return "matmul"
    return "conv" if isinstance(axis, tuple) else "linear" if axis == -1 else "matmul"


_TABLES = {nn.Embedding.forward, nn.EmbeddingBag.forward}
_CONVOLUTIONS = {m.forward for m in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_CONV_FORWARDS = {m._conv_forward for m in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_TRANSPOSED = {m.forward for m in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)}


def _contracted_dimension(owner: nn.Module, name: str) -> int | tuple[int, ...] | None:
    """-1, -2 or those of a convolution, for a weight of a layer that is known to multiply by it, else None."""
    forward = type(owner).forward
    if name == "weight" and forward in _CONVOLUTIONS:
        whole = type(owner)._conv_forward in _CONV_FORWARDS  # type: ignore[attr-defined]
        return contracted(owner.weight.ndim, False) if whole else None  # type: ignore[arg-type]
    if name == "weight" and forward in _TRANSPOSED:
        return contracted(owner.weight.ndim, True) if owner.groups == 1 else None  # type: ignore[arg-type]
    if name == "weight" and forward in _TABLES:
        return -1 if owner.max_norm is None else None
    rows = forward is nn.MultiheadAttention.forward and name.endswith("proj_weight")
    rows = rows or (forward in (nn.Linear.forward, nn.Bilinear.forward) and name == "weight")
    if rows or (isinstance(owner, nn.RNNBase) and name.startswith("weight_")):
        return -1
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None and forward is transformers.Conv1D.forward and name == "weight":
        return -2
    return None
