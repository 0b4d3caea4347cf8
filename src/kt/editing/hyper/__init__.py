"""Editors that learn: networks that turn a model's gradients into updates (MEND, MALMEN), their training and files."""
