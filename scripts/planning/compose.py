"""A placement as a compose override: `docker compose -f docker-compose.yml -f plan.yml up -d` starts it."""

from __future__ import annotations

from collections.abc import Mapping

from services.planner.placement import Colocated, Disaggregated, Group, Placement


def override(where: Placement, made: str) -> tuple[str, list[str]]:
    """(the file, what it cannot do: a sentence each). `made`: the command, for its first line."""
    cannot = shortcomings(where)
    head = [f"# {where}", f"# Made by {made}", *(f"# NOT STARTED LIKE THAT: {one}" for one in cannot), "services:"]
    if isinstance(where, Disaggregated):
        body = []
        for role, group in (("prefill", where.prefill), ("decode", where.decode)):
            body += [f"  {role}:", _scale(group.replicas * where.units), *_environment(_degrees(group))]
    else:
        body = _colocated(where)
    return "\n".join([*head, *body, ""]), cannot


def shortcomings(where: Placement) -> list[str]:
    if isinstance(where, Disaggregated) and (where.units > 1 or where.across_nodes):
        return ["compose starts one host; on several, start each host's part there, in a fleet of its own if handoffs must stay inside"]
    return []


def _colocated(where: Colocated) -> list[str]:
    """In the place of the prefills, so that the overlays for CPU and others hold for them."""
    budget = {} if where.budget_tokens is None else {"BATON_BUDGET_TOKENS": f'"{where.budget_tokens}"'}
    return [
        "  prefill: # colocated workers",
        "    command: [python, -m, services.colocated]",
        _scale(where.group.replicas),
        *_environment({"BATON_POLICY": where.policy, **budget, **_degrees(where.group)}),
        "    healthcheck:",
        "      test: [CMD, python, -m, services.colocated, --check]",
        "  decode:",
        _scale(0),
    ]


def _degrees(group: Group) -> dict[str, str]:
    """Of a worker of several ranks; it leases a GPU for each."""
    degrees = {"BATON_TP": group.parallel.tp, "BATON_PP": group.parallel.pp}
    return {name: f'"{degree}"' for name, degree in degrees.items() if degree > 1}


def _environment(variables: Mapping[str, str]) -> list[str]:
    return ["    environment:", *(f"      {name}: {value}" for name, value in variables.items())] if variables else []


def _scale(replicas: int) -> str:
    """As text, like the file it is merged with (there it comes from a variable): not every compose merges a number into that."""
    return f'    scale: "{replicas}"'
