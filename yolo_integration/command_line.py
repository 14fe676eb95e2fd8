"""The `bra-yolo` command: Ultralytics' own command line. Importing this package has registered the blocks.

bra-yolo train model=yolo26n-bra.yaml data=coco8.yaml epochs=10
"""

from ultralytics.cfg import entrypoint


def main() -> None:
    """Runs the process's arguments as `yolo` would, in all of its modes."""
    entrypoint()


if __name__ == "__main__":
    main()
