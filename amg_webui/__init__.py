"""The guard in Automatic1111 and Forge. Importing this costs nothing: everything heavy is imported in use.

The host puts this folder's parent on `sys.path` only while it loads `scripts/`, so the core is made known
here, by name, for the imports that come later.
"""

import amg_core  # noqa: F401
