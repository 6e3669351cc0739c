"""Profiles from what others measured."""
