"""Seconds and bytes of anything that the planner may choose. Imports profiling."""
