"""The command ``ccp``, outside of the package, whose import takes seconds."""

from __future__ import annotations

import os
import signal


def main() -> int:
    """Entry point; an interruption during the imports ends it without a traceback."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # and not ignored, as in the background
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from ccp_ext.cli import main as run

    signal.signal(signal.SIGINT, handler)
    return run()
