"""Plumbing that every room uses and no user imports: whole files, JSON and safetensors, locks, text, progress."""
