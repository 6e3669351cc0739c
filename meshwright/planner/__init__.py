"""Chooses a layout, proves that it is the best under the cost model, and says why. Imports costmodel and profiling."""
