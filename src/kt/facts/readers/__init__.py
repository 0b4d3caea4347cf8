"""One reader per data set: a `Record` in, its facts out.

A reader of a published data set raises `Junk` (through `Record.filled` or `Record.template`) for known bad records,
which cannot be edited; all other errors are `BadFact`.
"""
