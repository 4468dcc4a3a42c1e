"""Entry of ``python -m index_tools``."""

import sys

from .cli import main

sys.exit(main())
