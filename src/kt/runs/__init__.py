"""Runs: their folders, their journals, where results come from, and the processes that share the work."""
