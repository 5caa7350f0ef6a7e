"""`python -m lance_quant.official`: find ByteDance's own source, or compare our runtime with it."""

from lance_quant.cli import script
from lance_quant.official.bridge import main, parse_args

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    script.run(main)
