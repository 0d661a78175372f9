"""What flexheads costs, as ratios: beside the bare backbone, plain torch by hand, and two peers.

``python -m benchmarks.speed`` from the root of the repository; see benchmarks/README.md.
"""

import os

# Threads that wait for work would spin and count as CPU time. It is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
