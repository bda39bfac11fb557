"""Training on one device: `python -m ling_kernels.train`. Data, optimizer, schedule, loop, checkpoints, reports."""

import os

# OpenMP's threads wait by spinning. Where other programs want the cores too, that makes a step up to 30 times slower:
# two threads on two busy cores took 7 s spinning, 0.4 s asleep. OpenMP reads this when torch is loaded, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
