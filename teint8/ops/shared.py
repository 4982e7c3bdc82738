"""Codes of the activations that linears met last, so that what q, k and v share is quantized once."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teint8 import _torch

Codes = tuple[Tensor, ...]
_LIMIT = 4


class _Entry(NamedTuple):
    tensor: weakref.ref[Tensor]
    place: tuple[Any, ...]
    how: tuple[Any, ...]
    codes: Codes


class Shared:
    """The codes of the last few activations, for as long as each is the same tensor, unedited.

    It belongs to one call of a quantized function, or to one context: edits that leave no version (a replayed CUDA graph that writes
    to its static buffers) must not happen in between. What is made while a CUDA graph is captured is for that graph, and what is made
    on one stream for that stream.
    """

    def __init__(self) -> None:
        self._entries: tuple[_Entry, ...] = ()
        self._capturing = False
        self._aliased: tuple[weakref.ref[Tensor], ...] = ()

    def codes(self, x: Tensor, how: tuple[Any, ...], quantize: Callable[[], Codes]) -> Codes:
        """The codes of x that were made in the same way, else those that ``quantize`` makes."""
        if torch.compiler.is_dynamo_compiling() or x.is_inference() or _torch.in_transform():
            return quantize()
        if _torch.is_compiling():  # a graph is traced: tensors have versions, but no address
            place: tuple[Any, ...] = (x._version,)
        elif _torch.is_plain(x) and _torch.no_dispatch_modes():
            place = (x._version, x.data_ptr(), x.shape, x.stride(), _torch.stream_of(x.device))
            if x.is_cuda and self._capturing != _torch.is_capturing(x):
                self._entries, self._capturing = (), not self._capturing
        else:
            return quantize()
        if any(ref() is x for ref in self._aliased):
            return quantize()
        alive = [entry for entry in self._entries if entry.tensor() is not None]
        for entry in alive:
            if entry.tensor() is x and entry.place == place and entry.how == how:
                return entry.codes
        made = quantize()
        # replaced as a whole: threads may share a context
        self._entries = (_Entry(weakref.ref(x), place, how, made), *alive[: _LIMIT - 1])
        return made

    def holds(self, x: Tensor, how: tuple[Any, ...]) -> bool:
        """Whether ``codes`` would find those of x that were made in this way; what is found is only looked at there."""
        return any(entry.tensor() is x and entry.how == how for entry in self._entries)

    def forget(self, x: Tensor) -> None:
        """Keep no codes of x any more: it has an alias whose edits leave no version (``x.data``)."""
        self._entries = tuple(entry for entry in self._entries if entry.tensor() is not x)
        self._aliased = (*(ref for ref in self._aliased if ref() is not None), weakref.ref(x))

    def clear(self) -> None:
        """Forget them."""
        self._entries, self._aliased = (), ()
