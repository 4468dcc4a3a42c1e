"""The guard in Automatic1111 and Forge. Importing this is quick: large modules are imported when needed.

The host puts this folder's parent on `sys.path` only while it loads `scripts/`, so the core is imported
here, for later imports by name.
"""

import amg_core  # noqa: F401
