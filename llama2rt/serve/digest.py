"""How secrets are compared and kept."""

import hashlib


def digest(text: str) -> bytes:
    """SHA-256, of one length whatever the secret's."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
