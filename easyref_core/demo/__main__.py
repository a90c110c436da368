"""python -m easyref_core.demo"""

from __future__ import annotations

import os
import sys

# Before torch is imported: spinning threads make a busy computer ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .run import main

if __name__ == "__main__":
    sys.exit(main())
