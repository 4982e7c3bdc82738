"""``python -m teint8 demo``, ``python -m teint8 doctor`` and ``python -m teint8 tune``."""

import argparse


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _sizes(text: str) -> tuple[int, int, int]:
    parts = [part for part in text.split(",") if part.isdigit() and int(part) > 0]
    if len(parts) != 3 or len(text.split(",")) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not M,N,K; write 16384,14336,4096 for x (16384, 4096) by a weight (14336, 4096)")
    m, n, k = map(int, parts)
    return m, n, k


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m teint8", description="INT8 training and inference for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train, quantize and fine-tune a transformer on real digits (one to two minutes)")
    demo.add_argument("--epochs", type=_positive, default=36, help="of float training; QAT takes a quarter of them (default 36)")
    commands.add_parser("doctor", help="versions, devices, which implementations are usable, and a self-test of the contract")
    tune = commands.add_parser("tune", help="measure the tiles of matmuls on this GPU and keep the fastest on disk")
    tune.add_argument("sizes", type=_sizes, nargs="+", metavar="M,N,K", help="tokens, output features and input features")
    chosen = parser.parse_args(arguments)
    if chosen.command == "demo":
        from teint8 import demo as command

        return command.run(chosen.epochs)
    if chosen.command == "tune":
        return _tune(chosen.sizes)
    from teint8 import doctor

    return doctor.run()


def _tune(sizes: list[tuple[int, int, int]]) -> int:
    from teint8.ops import tuning

    try:
        print(f"kept in {tuning.tune(sizes)}")
    except (RuntimeError, ValueError) as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
