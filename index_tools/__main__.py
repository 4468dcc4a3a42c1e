"""Entry of ``python -m index_tools``."""

import sys

try:
    from .cli import main

    sys.exit(main())
except KeyboardInterrupt:  # while it was still starting
    sys.exit(130)
