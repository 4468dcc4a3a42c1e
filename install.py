"""Checks what the guard needs and says what is missing. Installs and changes nothing.

Run by ComfyUI-Manager and by Automatic1111/Forge at every start; run it by hand as often as you like.
"""

import importlib.util
import sys

NEEDED = ("torch", "numpy", "PIL", "safetensors")


def main() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"[AMG] This Python ({sys.executable}) lacks {', '.join(missing)}. ComfyUI and Forge bring "
            "them: run install.py with the Python that starts your host."
        )
    elif sys.version_info < (3, 10):
        print("[AMG] Python 3.10 or newer is needed; this is", sys.version.split()[0])
    else:
        print(
            "[AMG] Everything the guard needs is here. Optional, for a sharper comparison: Meta's SSCD "
            "weights. Extensions > Check the SSCD weights (or python -m index_tools weights) says where "
            "they are published, where to put them, and whether the file is right."
        )


main()
