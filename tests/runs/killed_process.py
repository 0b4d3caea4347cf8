"""`kt` in several processes, of which one ends itself by a signal after a phase; started by test_parallel.py."""

import os
import sys

from kt.cli import main
from kt.runs import parallel
from kt.runs.journal import Journal

rank, number, *arguments = sys.argv[1:]
take = Journal.take_each


def killed(self, *given, **named):
    done = take(self, *given, **named)
    if parallel.started_as() == int(rank):
        os.kill(os.getpid(), int(number))
    return done


Journal.take_each = killed
sys.exit(main(arguments))
