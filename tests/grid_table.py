"""The transform grid as a table: ``python tests/grid_table.py [cpu|cuda] > docs/concepts/transforms.md``; each cell against eager mode.

A cell is the relative error, or the error that is raised. Each column runs in a process of its own: what Dynamo raises for may leave a
transform entered.
"""

import subprocess
import sys
import warnings

import torch

WAYS = ("inductor", "teint8", "aot_eager")
PROGRAMS = ("mlp", "encoder", "function", "packed mlp", "packed encoder", "packed function")


def cell(program: str, transform: str, way: str, device: str) -> str:
    import grid

    import teint8
    import teint8.compile

    qfn, params, x = grid.programs(program.removeprefix("packed "), device=device)
    packed = program.startswith("packed")
    run = (grid.OF_INPUTS if packed else grid.TRANSFORMS | grid.FORWARD)[transform]
    params = teint8.pack(qfn, params, x) if packed else params
    plain, backend = qfn, teint8.compile.backend if way == "teint8" else way
    options = {"params": "p"} if way == "teint8" and not packed else None
    if way == "teint8" and not packed:
        plain = qfn.__wrapped__
        if isinstance(plain, torch.nn.Module):
            plain = lambda p, x, module=qfn.__wrapped__: torch.func.functional_call(module, p, (x,))
    given = params
    if transform == "vmap_params":  # weights are inputs of the graph
        given, run = grid.stacked(params), lambda q, p, x: torch.func.vmap(lambda p: q(p, x))(p)
    want = run(qfn, given, x)
    torch._dynamo.reset()
    try:
        whole = transform not in ("backward", "checkpoint")  # torch.autograd.grad is a graph break
        got = torch.compile(lambda p, x: run(plain, p, x), fullgraph=whole, backend=backend, options=options)(given, x)
    except Exception as error:  # the cell says which
        text = " ".join(str(error).split())
        return f"raises: {type(error).__name__}: {text[:90]}"
    error = grid.relative_error(got, want)
    zeros = any(float(t.norm()) == 0 for t in torch.utils._pytree.tree_leaves(got))
    return "**zeros**" if zeros else f"{error:.0e}" if error < 1e-5 else f"**{error:.0e}**"


def transforms(program: str) -> list[str]:
    import grid

    return list(grid.OF_INPUTS if program.startswith("packed") else grid.TRANSFORMS | grid.FORWARD)


def main(device: str) -> None:
    print(f"| program | transform | {' | '.join(WAYS)} |\n|---|---|---|---|---|")
    for program in PROGRAMS:
        for transform in transforms(program):
            row = []
            for way in WAYS:
                ran = subprocess.run(
                    [sys.executable, __file__, device, program, transform, way], capture_output=True, text=True, check=False
                )
                row.append(ran.stdout.strip().splitlines()[-1] if ran.returncode == 0 else f"**crashed: {ran.stderr[-80:]}**")
            print(f"| {program} | {transform} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if len(sys.argv) > 2:
        print(cell(*sys.argv[2:], sys.argv[1]))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
