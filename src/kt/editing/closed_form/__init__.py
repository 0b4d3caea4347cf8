"""Edits solved in closed form: targets, keys, second moments, and the solvers that make ΔW of them."""
