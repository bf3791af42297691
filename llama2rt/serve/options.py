"""How much one server takes from its clients."""

from dataclasses import dataclass, fields

from llama2rt.generate.sampling import check_whole


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What clients may ask for, in one request and all together."""

    max_tokens: int | None = None
    """Most tokens of an answer; by default what the context leaves."""
    max_choices: int = 64
    """Most answers of one request: prompts times n."""
    queue: int = 256
    """Most sequences that wait for their turn; beyond them requests get 429."""
    body_bytes: int = 4 * 2**20
    """Most bytes of a request's body."""
    body_seconds: int = 30
    """Longest wait for the next part of a body."""
    request_seconds: int = 600
    """Longest answer, waiting included."""
    shutdown_seconds: int = 30
    """How long SIGTERM and Ctrl-C wait for answers that are under way."""

    def check(self) -> None:
        """InputError naming a limit that means nothing."""
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("queue", "shutdown_seconds") else 1
            if value is not None:
                check_whole(field.name.replace("_", "-"), value, least)
