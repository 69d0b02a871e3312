"""How a kernel declines."""

class Unsupported(Exception):
    """A kernel does not serve this shape, dtype or device; the message says which and why."""
