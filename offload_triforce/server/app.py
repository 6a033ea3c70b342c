"""The application: paths, who may use them, and the page."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.staticfiles import StaticFiles
from starlette.responses import Response
from starlette.types import Scope

from offload_triforce.engine import TriForce
from offload_triforce.server import errors
from offload_triforce.server.about import about_routes, health_route
from offload_triforce.server.auth import Doorkeeper
from offload_triforce.server.chat import chat_routes
from offload_triforce.server.completions import completion_routes
from offload_triforce.server.live import live_router
from offload_triforce.server.messages import message_routes
from offload_triforce.server.options import ServerOptions
from offload_triforce.server.pdf import pdf_router
from offload_triforce.server.service import Service

PAGE = Path(__file__).parent / "page"
# Nothing from elsewhere, no script in the page's own text, nobody's frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
GUARD = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Page(StaticFiles):
    """The page's files, as the package brings them."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """A file, with what keeps the page to itself."""
        response = await super().get_response(path, scope)
        response.headers.update(GUARD)
        return response


def make_app(engine: TriForce, options: ServerOptions) -> FastAPI:
    """The application of one engine, which its maker closes. ``app.state.service`` is what its paths share."""
    service = Service(engine, options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(title="offload-triforce", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.service = service
    errors.install(app)
    app.include_router(health_route(service))
    doorkeeper = [Depends(Doorkeeper(options))]
    for routes in (about_routes, chat_routes, completion_routes, message_routes):
        app.include_router(routes(service), dependencies=doorkeeper)
    for router in (live_router(service), pdf_router(options.read_seconds)):
        app.include_router(router, dependencies=doorkeeper)
    if options.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    if PAGE.is_dir():
        app.mount("/", Page(directory=PAGE, html=True), name="page")
    return app
