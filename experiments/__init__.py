"""Running experiments: configuration, training, evaluation, benchmarks. The YAML files are the experiments."""

import os

# Read once, when torch loads. Threads that wait by spinning make a busy machine several times slower: two training
# threads beside other work on two cores took 4.8 s a step, and 0.6 s when waiting passively (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
