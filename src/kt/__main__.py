"""`python -m kt` is `kt`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
