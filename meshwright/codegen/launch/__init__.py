"""From a Plan to what starts it: torchrun and Slurm for emitted scripts, and the configuration of other engines."""
