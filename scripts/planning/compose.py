"""A placement as a compose override: `docker compose -f docker-compose.yml -f plan.yml up -d` starts it."""

from __future__ import annotations

from services.planner.placement import Colocated, Disaggregated, Placement


def override(where: Placement, made: str) -> tuple[str, list[str]]:
    """(the file, what it cannot do: a sentence each). `made`: the command, for its first line."""
    cannot = shortcomings(where)
    head = [f"# {where}", f"# Made by {made}", *(f"# NOT STARTED LIKE THAT: {one}" for one in cannot), "services:"]
    if isinstance(where, Disaggregated):
        body = ["  prefill:", _scale(where.prefill.replicas * where.units)]
        body += ["  decode:", _scale(where.decode.replicas * where.units)]
    else:
        body = _colocated(where)
    return "\n".join([*head, *body, ""]), cannot


def shortcomings(where: Placement) -> list[str]:
    groups = [where.group] if isinstance(where, Colocated) else [where.prefill, where.decode]
    cannot = []
    wide = [group.parallel for group in groups if group.parallel.devices > 1]
    if wide:
        cannot.append(
            f"a worker cannot span several GPUs yet ({', '.join(map(str, dict.fromkeys(wide)))}); each gets one (--one-gpu-workers)"
        )
    if isinstance(where, Disaggregated) and (where.units > 1 or where.across_nodes):
        cannot.append(
            "compose starts one host; on several, start each host's part there, in a fleet of its own if handoffs must stay inside"
        )
    return cannot


def _colocated(where: Colocated) -> list[str]:
    """In the place of the prefills, so that the overlays for CPU and others hold for them."""
    body = [
        "  prefill: # colocated workers",
        "    command: [python, -m, services.colocated]",
        _scale(where.group.replicas),
        "    environment:",
        f"      BATON_POLICY: {where.policy}",
    ]
    if where.budget_tokens is not None:
        body.append(f'      BATON_BUDGET_TOKENS: "{where.budget_tokens}"')
    return [*body, "    healthcheck:", "      test: [CMD, python, -m, services.colocated, --check]", "  decode:", _scale(0)]


def _scale(replicas: int) -> str:
    """As text, like the file it is merged with (there it comes from a variable): not every compose merges a number into that."""
    return f'    scale: "{replicas}"'
