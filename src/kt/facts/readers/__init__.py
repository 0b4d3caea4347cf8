"""One reader per data set: a `Record` in, its facts out.

A reader of a published data set raises `Junk` (through `Record.filled`, `Record.template`) for what the data set is
known to hold and nobody can edit; everything else that does not fit is `BadFact`.
"""
