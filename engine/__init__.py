"""The pruned network, run and trained fast on a CPU."""
