"""The `bra-yolo` command: Ultralytics' own command line, with this package's blocks registered.

bra-yolo train model=yolo26n-bra.yaml data=coco8.yaml epochs=10
"""

from ultralytics.cfg import entrypoint


def main() -> None:
    """Runs the arguments of the command line as `yolo` would."""
    entrypoint()


if __name__ == "__main__":
    main()
