"""The pages of the site."""

import time

from django.contrib.auth import authenticate, login
from django.core.cache import cache
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import path
from django.views.decorators.http import require_POST

import pgkv
from pgkv.integrations.django import sessions
from pgkv.integrations.django.ratelimit import ratelimit
from pgkv.integrations.django.stores import STORES, config_for

# The store of the default database; its pool is the one of the cache.
store = STORES.get(config_for("", {"table_name": "django_cache"}))
guesses = pgkv.RateLimiter(store, "5/minute", name="guesses", timeout=20)


def index(request: HttpRequest) -> HttpResponse:
    """Show who is logged in, and a fragment that takes a second to make."""
    cache.add("visits", 0, timeout=None)
    return render(request, "index.html", {"visits": cache.incr("visits"), "slow": slow})


def slow() -> str:
    """Return what takes long to find; the template keeps it for ten seconds."""
    time.sleep(1)
    return time.strftime("%H:%M:%S")


# Closed: while the limit cannot be checked, nobody guesses at all.
@require_POST
@ratelimit(guesses, key=lambda request: request.POST.get("name", ""), on_error="closed")
def enter(request: HttpRequest) -> HttpResponse:
    """Log in; a sixth guess within a minute is refused."""
    user = authenticate(
        request, username=request.POST.get("name"), password=request.POST.get("password")
    )
    if user is None:
        return HttpResponse("wrong name or password", status=403)
    login(request, user)
    return redirect("/")


@require_POST
def leave_everywhere(request: HttpRequest) -> HttpResponse:
    """End every session of this user, on all devices."""
    ended = sessions.logout(request.user)
    return HttpResponse(f"logged out of {ended} sessions")


urlpatterns = [
    path("", index),
    path("login", enter),
    path("logout-everywhere", leave_everywhere),
]
