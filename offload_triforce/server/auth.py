"""Who may ask: whoever shows the API key, and no page of another site."""

from __future__ import annotations

import hashlib
import hmac

from fastapi import Request

from offload_triforce.server.errors import ApiError
from offload_triforce.server.options import ServerOptions, is_loopback


class Doorkeeper:
    """A dependency of all paths that ask something of the engine."""

    def __init__(self, options: ServerOptions) -> None:
        self._digest = None if options.api_key is None else _digest(options.api_key)
        self._origins, self._host = options.cors, options.host

    async def __call__(self, request: Request) -> None:
        """Let a request in.

        Raises:
            ApiError: 401 without the key; 403 for a page of another site.
        """
        self._check_site(request)
        if self._digest is None:
            return
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        shown = bearer if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        # Digests have one length, so that the time says nothing, not even of that.
        if not hmac.compare_digest(_digest(shown.strip()), self._digest):
            what = "the API key is wrong" if shown else "an API key is needed: send it as Authorization: Bearer KEY"
            raise ApiError(401, what, "authentication_error", code="invalid_api_key")

    def _check_site(self, request: Request) -> None:
        """A browser says which site a page comes from. Without a key, that is all that keeps strange pages out."""
        origin, host = request.headers.get("origin"), request.headers.get("host", "")
        if self._digest is None and not _is_local(host, self._host):
            message = f"this server answers to its own name alone, not to {host[:80]!r}; with an API key, to any"
            raise ApiError(403, message, "permission_error", code="wrong_host")
        if origin is None or "*" in self._origins or origin in self._origins:
            return
        if origin.partition("://")[2] != host:
            message = f"pages of {origin[:80]!r} may not ask here; start the server with --cors {origin[:80]}"
            raise ApiError(403, message, "permission_error", code="wrong_origin")


def _is_local(host: str, own: str) -> bool:
    """Whether a Host header names this machine itself, so that no other site's name has been made to lead here."""
    name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
    return is_loopback(name.lower()) or name == own or not host


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
