"""``python -m teint8 demo`` and ``python -m teint8 doctor``."""

import argparse


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m teint8", description="INT8 training and inference for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train, quantize and fine-tune a transformer on real digits (about a minute)")
    demo.add_argument("--epochs", type=_positive, default=36, help="of float training; QAT takes a quarter of them (default 36)")
    commands.add_parser("doctor", help="versions, devices, which implementations are usable, and a self-test of the contract")
    chosen = parser.parse_args(arguments)
    if chosen.command == "demo":
        from teint8 import demo as command

        return command.run(chosen.epochs)
    from teint8 import doctor

    return doctor.run()


if __name__ == "__main__":
    raise SystemExit(main())
