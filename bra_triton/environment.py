"""The environment variables that this package reads, and a warning of misspelt ones."""

import logging
import os

VARIABLES = ("BRA_TRITON_CACHE", "BRA_TRITON_CHECK", "BRA_TRITON_COMMIT")


def warn_of_unknown() -> None:
    """Logs a warning for each variable that begins with BRA_TRITON_ and is not in `VARIABLES`."""
    for name in sorted(os.environ):
        if name.startswith("BRA_TRITON_") and name not in VARIABLES:
            logging.getLogger("bra_triton").warning(
                "the environment variable %s has no effect; this package reads %s", name, ", ".join(VARIABLES)
            )
