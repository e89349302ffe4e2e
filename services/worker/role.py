"""`python -m services.worker.role`: another role for a running worker, which drains, keeps its weights, and serves on as a new member.

    python -m services.worker.role                  the fleet's workers
    python -m services.worker.role 3f9a decode      the worker whose name begins so serves decode from now on

Ends with 0 when a worker has joined in that role and the old one has left, with 1 and a line if not, with 2 for bad words. The settings of
Redis and `fleet` hold as for every process.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter
from itertools import takewhile

from common.errors import BatonError, SettingError
from common.fleet import Fleet
from common.messages import WORKER_ROLES, Incarnation, Introduction, Role
from common.queue import connect
from common.resolve import resolved
from common.settings import CommonSettings, load

CHANGE_S = 60.0
"""Drain and start must have ended by then."""
LOOK_S = 0.2


class RoleError(BatonError):
    """The change cannot be asked for, or has not come about: one line that says why."""


def main(argv: list[str], environ: dict[str, str]) -> int:
    named = list(takewhile(lambda word: not word.startswith("-"), argv))
    try:
        settings = resolved(load(CommonSettings, argv[len(named) :], environ))
        if named and (len(named) != 2 or named[1] not in WORKER_ROLES):
            raise SettingError(f"give a worker's name and its new role: {', '.join(WORKER_ROLES)}")
        asyncio.run(_main(settings, named))
    except BatonError as error:
        print(f"role: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, SettingError) else 1
    return 0


async def _main(settings: CommonSettings, named: list[str]) -> None:
    async with connect(settings.redis_url, settings.redis_ca_file) as redis:
        fleet = Fleet(redis, settings.fleet)
        workers = _workers(await fleet.peers())
        if not named:
            print("\n".join(f"{name}  {one.role}" for name, one in workers.items()) or f"fleet {settings.fleet!r} has no workers")
            return
        role: Role = named[1]  # type: ignore[assignment]
        name = chosen(workers, named[0], role)
        await fleet.wish(name, role)
        before = set(workers)
        give_up = time.monotonic() + CHANGE_S
        while time.monotonic() < give_up:
            await asyncio.sleep(LOOK_S)
            now = _workers(await fleet.peers())
            joined = [other for other, one in now.items() if other not in before and one.role == role]
            if name not in now and joined:
                print(f"{name} serves {role} as {joined[0]}")
                return
    raise RoleError(f"{name} has not become a {role} within {CHANGE_S:g} s; its log says why")


def chosen(workers: dict[Incarnation, Introduction], begins: str, role: Role) -> Incarnation:
    """The worker that is meant. Raises RoleError if there is not exactly one, if it has the role, or if nobody would do its work."""
    meant = [name for name in workers if name.startswith(begins)]
    if len(meant) != 1:
        raise RoleError(f"{len(meant)} workers have names that begin with {begins!r}: {', '.join(workers) or 'the fleet has none'}")
    worker = workers[meant[0]]
    if worker.role == role:
        raise RoleError(f"{meant[0]} is a {role} already")
    count = Counter(one.role for one in workers.values())
    count[worker.role] -= 1
    count[role] += 1
    if not count["colocated"] and not (count["prefill"] and count["decode"]):
        raise RoleError(f"without {meant[0]} nobody would be left as {worker.role}: start another first")
    return meant[0]


def _workers(members: dict[Incarnation, Introduction]) -> dict[Incarnation, Introduction]:
    return {name: one for name, one in members.items() if one.role in WORKER_ROLES}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
