"""How a server behaves, apart from the model and its settings."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from offload_triforce.errors import InputError

LEAST_KEY = 8  # characters


@dataclass(frozen=True)
class ServerOptions:
    """How a server behaves.

    Attributes:
        names: what the model is called; the first is the one that is listed first.
        host, port: where it listens; port 0 takes a free one.
        api_key: what clients have to show; None lets everybody in, which is only possible on this machine itself.
        cors: origins whose pages may ask; "*" is all.
        queue: most requests that wait while another is answered.
        new_tokens: most tokens of an answer where a request does not say.
        prompt_tokens: most tokens of a prompt; None is what the model and the context setting allow.
        body_bytes: most bytes of a request.
        read_seconds: for a request's head, and for its body, to arrive.
        ping_seconds: between two signs of life on a stream that has nothing else to say.
        grace_seconds: that answers have to end in when the server is stopped.
    """

    names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)  # so that no log of options holds it
    cors: tuple[str, ...] = ()
    queue: int = 64
    new_tokens: int = 4096
    prompt_tokens: int | None = None
    body_bytes: int = 64 << 20
    read_seconds: float = 30.0
    ping_seconds: float = 10.0
    grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and self.api_key is None:
            raise InputError(
                f"--host {self.host} lets other machines in, so an API key is needed: give --api-key (or the variable "
                "OFFLOAD_TRIFORCE_API_KEY), or listen on 127.0.0.1"
            )
        if self.api_key is not None and (len(self.api_key) < LEAST_KEY or not self.api_key.isascii()):
            raise InputError(
                f"the API key must have at least {LEAST_KEY} ASCII characters, not {len(self.api_key)}; "
                "`openssl rand -hex 24` makes a good one"
            )
        least = {"queue": 0, "new_tokens": 1, "body_bytes": 1024, "port": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise InputError(f"{name} must be at least {number:,}, not {getattr(self, name):,}")
        if self.port > 65_535:
            raise InputError(f"port must be at most 65,535, not {self.port:,}")


def is_loopback(host: str) -> bool:
    """Whether only this machine itself can reach a host name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
