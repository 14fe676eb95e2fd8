"""The `bra-yolo` command: Ultralytics' own command line, with this package's blocks registered, and a demo.

bra-yolo train model=yolo26n-bra.yaml data=photos.yaml epochs=10
bra-yolo demo
"""

import sys

import ultralytics
from ultralytics.cfg import entrypoint

import bra_triton


def main() -> int:
    """Runs the demo, prints both versions (`--version`), or runs the command line as `yolo` would."""
    if sys.argv[1:2] == ["demo"]:
        from . import demo

        return demo.main(sys.argv[2:])
    if sys.argv[1:] == ["--version"]:
        print(f"bra-triton {bra_triton.__version__}, ultralytics {ultralytics.__version__}")
        return 0
    entrypoint()
    return 0


if __name__ == "__main__":
    sys.exit(main())
