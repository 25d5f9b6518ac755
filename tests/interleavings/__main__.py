"""``python -m tests.interleavings``: every scenario within its bounds, or one schedule by its number."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time

import pgkv
from pgkv.testing import ServerClock
from tests import servers
from tests.interleavings.declarations import SCENARIOS
from tests.interleavings.schedule import explore, replay
from tests.servers import Server


def main() -> None:
    parser = argparse.ArgumentParser(prog="make interleavings", description=__doc__)
    parser.add_argument("scenario", nargs="?", choices=SCENARIOS, help="only this one")
    parser.add_argument("number", nargs="?", help="of a schedule to run again")
    parser.add_argument("--kind", choices=("sync", "async"), help="of clients; both without it")
    parser.add_argument("--preemptions", type=int, help="instead of the scenario's own bound")
    parser.add_argument("--faults", type=int, help="the same")
    parser.add_argument("--minutes", type=float, default=0.5, help="for each scenario and kind")
    arguments = parser.parse_args()
    bounds = {
        name: value
        for name in ("preemptions", "faults")
        if (value := getattr(arguments, name)) is not None
    }
    found = servers.installed()
    server = Server(found[max(found)])
    failed = False
    try:
        with (
            ServerClock(server.dsn) as clock,
            pgkv.Store.connect(clock.dsn, pool_max_size=2, retry=None) as sync,
        ):
            kinds = [arguments.kind] if arguments.kind else ["sync", "async"]
            if arguments.number:
                scenario = dataclasses.replace(SCENARIOS[arguments.scenario], **bounds)
                world = replay(scenario, sync, clock, arguments.number, kinds[-1])
                print(*world.history, world.failure or "nothing is wrong", sep="\n")
                sys.exit(world.failure is not None)
            chosen = [arguments.scenario] if arguments.scenario else list(SCENARIOS)
            for name, kind in itertools.product(chosen, kinds):
                scenario = dataclasses.replace(SCENARIOS[name], **bounds)
                began = time.monotonic()
                until = began + arguments.minutes * 60
                outcome = explore(scenario, sync, clock, kind=kind, until=until)
                seconds = time.monotonic() - began
                bound = f"{scenario.preemptions} preemptions, {scenario.faults} faults"
                print(f"{name}, {kind}: {outcome} ({bound}, {seconds:.0f} s)", flush=True)
                if outcome.failure is not None:
                    failed = True
                    print(outcome.failure)
    finally:
        server.remove()
        servers.remove_base_directory()
    sys.exit(failed)


if __name__ == "__main__":
    main()
