"""What is done to an activation before it is quantized, and to its weight for that: smoothing, rotation, channels kept in float.

A linear may be written in another basis without a change of its values: ``x w^T = (x / s) (s w)^T = (H x) (H w / n)^T``. Where a few
channels of x are far larger than the rest, a basis in which they are not costs far fewer bits.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from teint8 import _torch
from teint8.ops.rotation import conditioned_codes, divided, hadamard
from teint8.qtensor import QTensor


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Conditioned:
    """A weight (N, K) whose activation is conditioned before it is quantized; it takes the weight's place in params.

    In order: channels in ``outliers`` are set aside and multiplied in float (LLM.int8, Dettmers et al., 2022); the others are divided
    by ``smoothing`` (SmoothQuant, Xiao et al., 2023); blocks of ``rotation`` channels are rotated by a Hadamard matrix (QuaRot,
    Ashkboos et al., 2024), in float32, additions in a fixed order. Frozen; a pytree node for torch and for optree.

    Attributes:
        weight: the float weight as the model has it, which trains as any other; or, once packed, a QTensor of the conditioned one.
        smoothing: None, or float32 (K,): powers of two, so that dividing by them rounds nothing. Its gradient is zero: give an
            optimizer the weights alone, for weight decay would shrink it.
        rotation: channels of a block that is rotated, a power of two that divides K; 0 for none.
        outliers: channels that stay in float.
        outlier_weight: (N, len(outliers)), the float weight of these; only beside a packed weight.
        activation_scale: None, or the static scale of the conditioned activation, float32, one number; a packed weight has its
            own. With nothing else the weight may have any layout.

    Raises:
        TypeError: smoothing of another dtype.
        ValueError: shapes that do not fit, no powers of two.

    Examples:
        >>> w = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> conditioned = Conditioned(w, smoothing=torch.tensor([1.0, 1.0, 8.0, 1.0]), rotation=4)
        >>> x = torch.tensor([[1.0, 1.0, 80.0, 1.0]])
        >>> float(conditioned.apply(x) @ conditioned.conditioned().t()), float(x @ w.t())
        (247.0, 247.0)

    """

    weight: Tensor | QTensor
    smoothing: Tensor | None = None
    rotation: int = 0
    outliers: tuple[int, ...] = ()
    outlier_weight: Tensor | None = None
    activation_scale: Tensor | None = None
    checked: dataclasses.InitVar[bool] = True

    def __post_init__(self, checked: bool) -> None:
        if not checked:  # a pytree is rebuilt, perhaps with placeholders
            return
        if not self.changes_basis:
            return
        if isinstance(self.weight, QTensor) and self.weight.axis != -1:
            raise ValueError(f"Conditioned: {self.weight!r}; a weight (N, K) as nn.Linear has it is needed, with axis -1")
        if self.weight.ndim != 2:
            raise ValueError(f"Conditioned: the weight has shape {tuple(self.weight.shape)}; (N, K) is needed")
        n, k = self.weight.shape
        if self.rotation and (self.rotation & (self.rotation - 1) or k % self.rotation):
            raise ValueError(f"Conditioned: rotation is {self.rotation} and K is {k}; a power of two that divides K is needed, or 0")
        if self.smoothing is not None:
            _check_smoothing(self.smoothing, k)
        self._check_outliers(n, k)

    def _check_outliers(self, n: int, k: int) -> None:
        ordered = all(isinstance(c, int) and 0 <= c < k for c in self.outliers) and list(self.outliers) == sorted(set(self.outliers))
        if not ordered:
            raise ValueError(f"Conditioned: outliers are {self.outliers!r}; channels from 0 to {k - 1} are needed, in order, each once")
        wanted = (n, len(self.outliers)) if isinstance(self.weight, QTensor) and self.outliers else None
        found = None if self.outlier_weight is None else tuple(self.outlier_weight.shape)
        if wanted != found:
            raise ValueError(f"Conditioned: outlier_weight has shape {found}; {wanted} is needed for {self.weight!r}")

    @property
    def changes_basis(self) -> bool:
        """Whether there is more than a static scale: that serves a weight of any layout."""
        return self.smoothing is not None or bool(self.rotation) or bool(self.outliers)

    def apply(self, x: Tensor) -> Tensor:
        """x (..., K) as it is quantized; in float32 where it is rotated, and where a half is smoothed, for it would round."""
        x = self._without_outliers(x)
        if self.smoothing is not None:
            x = divided(x, self.smoothing)
        return hadamard(_wide(x), self.rotation) if self.rotation else x

    def codes(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes (..., K) and scales (...) of ``apply(x)``, in one kernel where there is one; for real tensors, not empty ones.

        With a static ``scale``, one number, by that.
        """
        return conditioned_codes(self._without_outliers(x), self.smoothing, self.rotation, scale)

    def conditioned(self) -> Tensor:
        """The weight (N, K) that meets ``apply(x)``, in the dtype of that."""
        if isinstance(self.weight, QTensor):
            return self.weight.dequantize()
        w = self._without_outliers(self.weight)
        if self.smoothing is not None:
            w = w.float() if w.dtype == torch.float16 else w
            w = w * self.smoothing.detach().to(w.dtype)
        return hadamard(_wide(w), self.rotation) * (1 / self.rotation) if self.rotation else w

    def aside(self, x: Tensor, rows: slice | None = None) -> Tensor | None:
        """What the channels in ``outliers`` add to the result, in the dtype of x; None where there are none."""
        if not self.outliers:
            return None
        index = self._index(x)
        w = self.weight.index_select(-1, index) if isinstance(self.weight, Tensor) else self.outlier_weight
        assert w is not None
        return torch.matmul(x.index_select(-1, index), (w if rows is None else w[rows]).to(x.dtype).mT)

    def packed(self, pack: Any) -> "Conditioned":
        """The same with the conditioned weight packed by ``pack``."""
        if isinstance(self.weight, QTensor):
            return self
        w = self.weight.detach()
        aside = w.index_select(-1, self._index(w)) if self.outliers else None
        q = dataclasses.replace(pack(self.conditioned().detach()), dtype=w.dtype)
        q = q if self.activation_scale is None else dataclasses.replace(q, activation_scale=self.activation_scale.detach())
        return dataclasses.replace(self, weight=q, outlier_weight=aside, activation_scale=None)

    def dequantize(self) -> Tensor:
        """The weight (N, K) as the model has it: of a packed one its values, taken back out of the basis."""
        if not isinstance(self.weight, QTensor):
            return self.weight
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        w = dataclasses.replace(self.weight, dtype=wide).dequantize()
        w = hadamard(w, self.rotation) if self.rotation else w
        w = w if self.smoothing is None else w / self.smoothing
        if self.outlier_weight is not None:
            w = w.index_copy(-1, self._index(w), self.outlier_weight.to(w.dtype))
        return w.to(self.dtype)

    def unpacked(self) -> "Conditioned":
        """The same with a float weight."""
        static = self.weight.activation_scale if isinstance(self.weight, QTensor) else self.activation_scale
        return dataclasses.replace(self, weight=self.dequantize(), outlier_weight=None, activation_scale=static)

    def _without_outliers(self, t: Tensor) -> Tensor:
        """t (..., K) with 0 in the channels that are set aside."""
        return t.index_fill(-1, self._index(t), 0) if self.outliers else t

    def _index(self, like: Tensor) -> Tensor:
        """The channels in ``outliers`` on the device of ``like``; kept, for to bring them there makes the host wait."""
        if _torch.is_compiling() or not _torch.are_plain(like):
            return torch.tensor(self.outliers, device=like.device)
        return _kept_index(self.outliers, like.device)

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        """2."""
        return self.weight.ndim

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Float dtype of the weight."""
        return self.weight.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(t.nbytes for t in (self.weight, self.smoothing, self.outlier_weight, self.activation_scale) if t is not None)

    def __repr__(self) -> str:
        parts = ["smoothed"] * (self.smoothing is not None) + [f"rotated by {self.rotation}"] * bool(self.rotation)
        parts += [f"{len(self.outliers)} channels in float"] * bool(self.outliers)
        parts += ["static activation scale"] * (self.activation_scale is not None)
        inner = self.weight if isinstance(self.weight, QTensor) else f"{'x'.join(map(str, self.shape))} {self.dtype}"
        return f"Conditioned({inner!s}, {', '.join(parts) or 'as it is'})"


@functools.lru_cache(maxsize=4096)
def _kept_index(outliers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(outliers, device=device)


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def _check_smoothing(smoothing: Tensor, k: int) -> None:
    if smoothing.dtype != torch.float32:
        raise TypeError(f"Conditioned: smoothing is {smoothing.dtype}; float32 is needed")
    if smoothing.shape != (k,):
        raise ValueError(f"Conditioned: smoothing has shape {tuple(smoothing.shape)} and K is {k}; ({k},) is needed")
    if not bool((smoothing.detach().frexp().mantissa == 0.5).all()):
        raise ValueError("Conditioned: smoothing holds numbers that are no powers of two; dividing by them would round")


def largest_block(k: int, most: int = 1024) -> int:
    """The largest power of two up to ``most`` that divides k.

    Examples:
        >>> largest_block(384), largest_block(4096), largest_block(7)
        (128, 1024, 1)

    """
    return min(k & -k, most)


def power_of_two(x: Tensor) -> Tensor:
    """The nearest power of two, in ratio, from 2^-14 to 2^14: such as a half holds.

    Examples:
        >>> power_of_two(torch.tensor([3.0, 0.3, 0.0]))
        tensor([4.0000e+00, 2.5000e-01, 6.1035e-05])

    """
    return torch.exp2(torch.log2(x.float().clamp(2.0**-14, 2.0**14)).round())


_OPTIONAL = ("smoothing", "outlier_weight", "activation_scale")
_Aux = tuple[int, tuple[int, ...], tuple[str, ...]]


def _names(c: Conditioned) -> tuple[str, ...]:
    return ("weight", *(name for name in _OPTIONAL if getattr(c, name) is not None))


def _flatten(c: Conditioned) -> tuple[list[Any], _Aux]:
    names = _names(c)
    return [getattr(c, name) for name in names], (c.rotation, c.outliers, names)


def _unflatten(leaves: Iterable[Any], aux: _Aux) -> Conditioned:
    rotation, outliers, names = aux
    return Conditioned(**dict(zip(names, leaves, strict=True)), rotation=rotation, outliers=outliers, checked=False)


torch_pytree.register_pytree_node(
    Conditioned,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=lambda c: ([(torch_pytree.GetAttrKey(n), getattr(c, n)) for n in _names(c)], _flatten(c)[1]),
    serialized_type_name="teint8.Conditioned",
    to_dumpable_context=lambda aux: [aux[0], list(aux[1]), list(aux[2])],
    from_dumpable_context=lambda aux: (aux[0], tuple(aux[1]), tuple(aux[2])),
)
optree.register_pytree_node(
    Conditioned,  # type: ignore[arg-type]
    lambda c: (*_flatten(c), _names(c)),  # type: ignore[arg-type]
    lambda aux, leaves: _unflatten(leaves, aux),  # type: ignore[arg-type,return-value]
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)
torch.serialization.add_safe_globals([Conditioned])
