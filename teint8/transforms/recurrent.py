"""Cells of recurrent networks, taken apart so that their projections are linears; the gates are torch's formulas (nn.LSTMCell, ...)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Project = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""The linear of x by a weight and a bias."""


def lstm(project: Project, x: Tensor, state: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
    """New hidden and cell state of ``torch.lstm_cell``."""
    h, c = state
    i, f, g, o = (project(x, w_ih, b_ih) + project(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru(project: Project, x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Tensor:
    """New hidden state of ``torch.gru_cell``."""
    xr, xz, xn = project(x, w_ih, b_ih).chunk(3, -1)
    hr, hz, hn = project(h, w_hh, b_hh).chunk(3, -1)
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return n + (xz + hz).sigmoid() * (h - n)


def simple(act: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """New hidden state of ``torch.rnn_tanh_cell`` or ``rnn_relu_cell``."""

    def run(project: Project, x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Tensor:
        return act(project(x, w_ih, b_ih) + project(h, w_hh, b_hh))

    return run


CELLS: dict[Any, Callable[..., Any]] = {
    torch.lstm_cell: lstm,
    torch.gru_cell: gru,
    torch.rnn_tanh_cell: simple(torch.tanh),
    torch.rnn_relu_cell: simple(torch.relu),
}
