"""Seeded trouble: what happens to a fleet in a few hundred steps, by chance. Used by the long-run test, and by hand to repeat a seed."""

from __future__ import annotations

import random

from tests.unit.recovery.decodes import Decode
from tests.unit.recovery.fabric import Weather
from tests.unit.recovery.gateways import Gateway
from tests.unit.recovery.prefills import Colocated, Prefill
from tests.unit.recovery.worker import Worker
from tests.unit.recovery.world import World, ask


def weather(rng: random.Random) -> Weather:
    """Each kind of fault is absent, rare or frequent, independently."""

    def chance(*values: float) -> float:
        return rng.choice((0.0, 0.0, *values))

    return Weather(
        token_loss=chance(0.02, 0.3),
        control_cut=chance(0.002, 0.02),
        put_trouble=chance(0.1, 0.4),
        claim_loss=chance(0.05),
        duplicate_put=chance(0.2),
        corrupt=chance(0.02, 0.2),
        push_fail=chance(0.02, 0.1),
        push_stall=chance(0.02, 0.1),
        launch_fail=chance(0.005),
        not_posted=chance(0.2, 0.5),
    )


def troubled(seed: int, steps: int = 60, *, log: bool = False) -> World:
    """A fleet after `steps` random events with random pauses between them; not settled yet."""
    world = World(seed, reuse=seed % 3 > 0, short_tokens=seed % 5)
    rng = world.rng
    gateways = [world.gateway() for _ in range(rng.choice((1, 2)))]
    pages = rng.choice((12, 16, 40))
    depth = rng.choice((1, 2))
    prefills, decodes, both = rng.choice(((1, 1, 0), (1, 2, 0), (2, 1, 0), (2, 2, 0), (1, 3, 0), (2, 3, 0), (1, 1, 1), (0, 0, 2)))
    for kind, count in ((Prefill, prefills), (Decode, decodes), (Colocated, both)):
        for _ in range(count):
            world.start(kind, pages, depth)
    world.run(1.5)
    world.weather.__dict__.update(weather(rng).__dict__)
    for _ in range(steps):
        step(world, gateways, pages, depth, log=log)
        world.run(rng.choice((0.0, 0.005, 0.02, 0.1, 0.1, 0.5, 1.0)))
    return world


def step(world: World, gateways: list[Gateway], pages: int, depth: int, *, log: bool = False) -> None:
    rng = world.rng
    what = rng.choices(
        ("ask", "cancel", "kill", "freeze", "drain", "empty", "away", "replay", "gateway", "calm", "hang"),
        (40, 6, 6, 6, 3, 2, 2, 2, 1, 6, 2),
    )[0]
    workers = world.living(Worker)
    alive = [gateway for gateway in gateways if gateway.alive]
    victim = rng.choice(workers) if workers else None
    if log:
        print(f"{world.now:9.3f} {what} {victim.name if victim else ''}")
    if what == "ask" and alive:
        rng.choice(alive).submit(ask(rng))
    elif what == "cancel" and alive:
        gateway = rng.choice(alive)
        if gateway.clients:
            gateway.cancel(rng.choice(sorted(gateway.clients)))
    elif what == "kill" and victim is not None:
        world.kill(victim)
        world.clock.after(rng.choice((0.0, 0.5, 4.0)), lambda: world.start(type(victim), pages, depth) and None)
    elif what == "freeze":
        process = rng.choice([*workers, *alive])
        world.freeze(process, rng.choice((0.3, 1.5, 3.0, 10.0)))
    elif what == "drain" and victim is not None and not victim.draining and not victim.frozen:
        victim.drain()
        world.clock.after(1.0, lambda: world.start(type(victim), pages, depth) and None)
    elif what == "empty":
        world.queue.restart_empty()
    elif what == "away":
        world.queue.away = True
        world.clock.after(rng.choice((0.2, 3.0)), lambda: setattr(world.queue, "away", False))
    elif what == "replay":
        for _, job in world.jobs[-3:]:
            world.queue.put(job, "interactive")
    elif what == "gateway" and alive and len(gateways) < 4:
        world.kill(rng.choice(alive))
        gateways.append(world.gateway())
    elif what == "hang" and victim is not None:
        world.hang(victim, rng.choice((0.5, 1.5, 8.0)))
    elif what == "calm":
        world.run(2.0)
