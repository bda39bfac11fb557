"""Training on one device: `python -m ling_kernels.train`. Data, optimizer, schedule, loop, checkpoints, reports."""

import os

# OpenMP's threads wait for the next loop by spinning. Where other programs want the cores too, that made a step up
# to 30 times slower (7 s against 0.4 s, two threads on two busy cores); going to sleep at once made it twice as slow on
# idle ones. So they spin briefly, then sleep. OpenMP (GNU's) reads this when torch is loaded, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
