"""The `bra-yolo` command: Ultralytics' own command line, with this package's blocks registered, and a demo.

bra-yolo train model=yolo26n-bra.yaml data=photos.yaml epochs=10
bra-yolo demo
"""

import sys

from ultralytics.cfg import entrypoint


def main() -> int:
    """Runs the demo, or the arguments of the command line as `yolo` would."""
    if sys.argv[1:2] == ["demo"]:
        from . import demo

        return demo.main(sys.argv[2:])
    entrypoint()
    return 0


if __name__ == "__main__":
    sys.exit(main())
