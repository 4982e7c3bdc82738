"""Recurrent networks, taken apart so that their projections are linears; the gates are torch's formulas (nn.LSTMCell, ...)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Project = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""The linear of x by a weight and a bias."""

State = tuple[Tensor, ...]
"""Hidden state, and of an LSTM the cell's."""

Gates = Callable[[Tensor, Tensor, State], State]
"""A new state from the projections of the input and of the hidden state, and the state."""


def _lstm(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    i, f, g, o = (of_input + of_hidden).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    xr, xz, xn = of_input.chunk(3, -1)
    hr, hz, hn = of_hidden.chunk(3, -1)
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return (n + (xz + hz).sigmoid() * (state[0] - n),)


def _tanh(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    return ((of_input + of_hidden).tanh(),)


def _relu(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    return ((of_input + of_hidden).relu(),)


def _cell(gates: Gates) -> Callable[..., Any]:
    """New state of one of torch's cells."""

    def run(project: Project, x: Tensor, state: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
        states = tuple(state) if isinstance(state, (tuple, list)) else (state,)
        new = gates(project(x, w_ih, b_ih), project(states[0], w_hh, b_hh), states)
        return new if len(new) > 1 else new[0]

    return run


CELLS: dict[Any, Callable[..., Any]] = {
    torch.lstm_cell: _cell(_lstm),
    torch.gru_cell: _cell(_gru),
    torch.rnn_tanh_cell: _cell(_tanh),
    torch.rnn_relu_cell: _cell(_relu),
}

LAYERS: dict[Any, Gates] = {torch.lstm: _lstm, torch.gru: _gru, torch.rnn_tanh: _tanh, torch.rnn_relu: _relu}


def weights_of(args: Sequence[Any]) -> list[Tensor]:
    """The weights and biases in the arguments of a call of ``torch.lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``."""
    return list(args[3] if isinstance(args[3], (list, tuple)) else args[2])


def layers(func: Any, project: Project, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """What ``torch.lstm`` and its kin return, step by step.

    Args:
        func: one of ``LAYERS``.
        project: makes the linears. The inputs of all steps are projected at once.
        args: the arguments of the call: input, state, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first; or
            data, batch_sizes, state, weights, ... of sequences that are packed.

    """
    packed = isinstance(args[3], (list, tuple))
    data, state, weights = args[0], args[2 if packed else 1], weights_of(args)
    has_biases, count, dropout, train, bidirectional = args[4 if packed else 3 :][:5]
    first = not packed and bool(args[8])
    x = data.transpose(0, 1) if first else data
    sizes = args[1].tolist() if packed else [x.shape[1]] * x.shape[0]
    if not sizes:
        raise ValueError(f"{func.__name__}: the input {tuple(data.shape)} has no steps; one at least is needed")
    x = x if packed else x.flatten(0, 1)
    begin = tuple(state) if isinstance(state, (tuple, list)) else (state,)
    ways, each = 1 + bool(bidirectional), len(weights) // (count * (1 + bool(bidirectional)))
    ends: list[State] = []
    for layer in range(count):
        outs = []
        for way in range(ways):
            i = layer * ways + way
            own = weights[i * each : (i + 1) * each]
            out, end = _run(LAYERS[func], project, x, sizes, tuple(s[i] for s in begin), own, has_biases, way == 1)
            outs.append(out)
            ends.append(end)
        x = torch.cat(outs, -1) if ways > 1 else outs[0]
        x = F.dropout(x, dropout, train) if layer + 1 < count else x
    y = x if packed else x.unflatten(0, (len(sizes), -1))
    return y.transpose(0, 1) if first else y, *(torch.stack([end[k] for end in ends]) for k in range(len(begin)))


def _run(
    gates: Gates, project: Project, x: Tensor, sizes: list[int], state: State, weights: list[Tensor], has_biases: bool, backwards: bool
) -> tuple[Tensor, State]:
    """One layer in one direction: outputs of all steps, one behind the other, and the last state of each sequence."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if has_biases else (None, None)
    smaller = rest[2:] if has_biases else rest  # of an LSTM whose hidden state is projected
    of_input = project(x, w_ih, b_ih).split(sizes)
    state = tuple(s.to(of_input[0].dtype) for s in state)  # what torch.autocast wants
    outs: list[Tensor] = []
    for t in reversed(range(len(sizes))) if backwards else range(len(sizes)):
        running = tuple(s[: sizes[t]] for s in state)
        new = gates(of_input[t], project(running[0], w_hh, b_hh), running)
        new = (project(new[0], smaller[0], None), *new[1:]) if smaller else new
        outs.append(new[0])
        state = tuple(torch.cat([a, b[sizes[t] :]]) if sizes[t] < b.shape[0] else a for a, b in zip(new, state, strict=True))
    return torch.cat(outs[::-1] if backwards else outs), state
