"""`python -m fused_opt` is `fused-opt`."""

from __future__ import annotations

import sys

from fused_opt.cli import main

if __name__ == "__main__":
    sys.exit(main())
