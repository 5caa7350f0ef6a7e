"""`python -m lance_quant`: the command line `lance-quant`."""

from lance_quant.cli.command import command, main, parse_args

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    command()
