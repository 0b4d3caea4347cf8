"""The residual check: how much of the old fact an edit leaves."""
