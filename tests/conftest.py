"""pytest puts the folder of this file on the path: every test can say `from cases import ...`."""

import os

# Before torch is imported: the tests run in two processes, and start others that inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
