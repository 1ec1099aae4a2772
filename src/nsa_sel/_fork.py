"""Locks that survive fork: a child starts with every one of them free, whatever other threads were doing."""

from __future__ import annotations

import os
import threading


def lock() -> threading.Lock:
    """Return a lock that no fork can leave locked in the child, where the thread that held it does not exist."""
    made = threading.Lock()
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(before=made.acquire, after_in_parent=made.release, after_in_child=made.release)
    return made
