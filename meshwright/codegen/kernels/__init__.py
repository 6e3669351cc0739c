"""Kernels that take the place of eager ops: vocab-parallel cross-entropy, and one generated file for each fused region of a plan."""
