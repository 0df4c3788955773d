"""Everything around the model in `SmolLm3.py`; each folder is a chapter.

Imports go one way: tools → proof → training → analysis → data → reference → config →
files → errors → SmolLm3.
Import this before torch, whose OpenMP library reads the variables below when it is loaded.
"""

import os

# A waiting OpenMP thread spins. If another program is busy, it takes the core from the thread that
# it waits for: a step can take 20 times as long. So threads sleep after a short spin.
SHORT_SPIN = {
    "GOMP_SPINCOUNT": "1000",  # iterations; libgomp, on Linux
    "KMP_BLOCKTIME": "1",  # milliseconds; LLVM's and Intel's libraries, on macOS and Windows
}
OPENMP_VARIABLES = {"OMP_WAIT_POLICY", *SHORT_SPIN}
if not os.environ.keys() & OPENMP_VARIABLES:
    os.environ |= SHORT_SPIN
