"""The embedded model with its facts, corpus and word sets, and the loop of `kt demo`."""
