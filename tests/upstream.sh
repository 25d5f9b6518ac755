#!/bin/sh
# Checks out into .servers/upstream the projects whose own tests the adapters pass, each at a commit that passes.
# What cannot be had is left out: its suite is skipped, and says so. In CI that is an error.
set -u
export GIT_TERMINAL_PROMPT=0 # a repository that moved asks for no password
missing=0
cd "$(dirname "$0")/.." || exit 1

while read -r project commit; do
    into=.servers/upstream/${project#*/}
    [ "$(git --git-dir="$into/.git" rev-parse HEAD 2>/dev/null)" = "$commit" ] && continue
    rm -rf "$into"
    git init --quiet "$into" 2>/dev/null &&
        git -C "$into" fetch --quiet --depth 1 "https://github.com/$project" "$commit" 2>/dev/null &&
        git -C "$into" checkout --quiet FETCH_HEAD 2>/dev/null || {
        echo "upstream: https://github.com/$project cannot be had: its suite is skipped"
        rm -rf "$into"
        missing=1
    }
done <<LIST
pallets-eco/cachelib bbd72b6a08c9fbc1bcf369032f730fdff0a65d96
pallets/flask 22d924701a6ae2e4cd01e9a15bbaf3946094af65
alisaifee/limits f7d1eef524a55301956a21a07853423632605b80
strawgate/py-key-value 279e1ee26234577c4104c7e40cc83d8e1b27c554
encode/starlette cb8f84f5284dc301ca7a31eb732b9e140769dd48
LIST
[ -z "${CI:-}" ] || exit $missing
