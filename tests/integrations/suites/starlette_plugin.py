"""Makes pgkv the session middleware of Starlette's own tests: `pytest -p starlette_plugin` in its checkout."""

import os

from starlette.middleware import sessions as of_starlette

from pgkv import AsyncSessionStore, AsyncStore, SessionMiddleware

NAMES = {"session_cookie": "cookie", "https_only": "secure"}


class Middleware:
    """Has Starlette's options; a store for each request, for its client makes a new loop each time."""

    def __init__(self, app, secret_key, **options):
        given = {NAMES.get(name, name): value for name, value in options.items()}
        self.app = app
        self.options = {"cookie": "session", "secure": False, "max_age": 14 * 24 * 3600, **given}

    async def __call__(self, scope, receive, send):
        async with AsyncStore.connect(os.environ["PGKV_SUITE_DSN"]) as store:
            sessions = AsyncSessionStore(store)
            await SessionMiddleware(self.app, sessions=sessions, **self.options)(
                scope, receive, send
            )


of_starlette.SessionMiddleware = Middleware
