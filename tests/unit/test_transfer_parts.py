"""Tags, keys, checksums, faults, UCX's report and its environment: the parts of the transfer that decide without moving anything."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import SettingError
from common.messages import Shard
from services.transfer import environment
from services.transfer.checksum import checksum, keyed_sum
from services.transfer.faults import Fault, parse
from services.transfer.places import Places
from services.transfer.protocol import PAGE_BITS, RANK_BITS, keyed, tag
from services.transfer.report import carriers, way

SHARD = Shard(0, (0, 30), (0, 3))

grants = st.integers(0, (1 << 36) - 1)
indices = st.integers(0, (1 << PAGE_BITS) - 1)
ranks = st.integers(0, (1 << RANK_BITS) - 1)


@given(grants, indices, ranks)
def test_a_tag_says_its_grant_page_and_rank(grant: int, page: int, rank: int) -> None:
    number = tag(grant, page, rank)
    assert 0 <= number < 1 << 64
    assert (number >> (PAGE_BITS + RANK_BITS), (number >> RANK_BITS) & ((1 << PAGE_BITS) - 1), number & ((1 << RANK_BITS) - 1)) == (
        grant,
        page,
        rank,
    )


@pytest.mark.parametrize("parts", [(1 << 36, 0, 0), (0, 1 << PAGE_BITS, 0), (0, 0, 1 << RANK_BITS), (-1, 0, 0)])
def test_what_does_not_fit_a_tag_is_refused(parts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no tag"):
        tag(*parts)


def test_keys_differ_by_page_layers_and_heads() -> None:
    shards = [
        Shard(0, (first, first + 10), (head, head + 1)) for first in (0, 10, 20) for head in range(4)
    ]  # fmt: skip
    keys = {keyed(shard, page) for shard in shards for page in range(500)}
    assert len(keys) == len(shards) * 500
    assert all(0 <= key < 1 << 64 for key in keys)


def test_a_key_does_not_depend_on_the_receiving_rank() -> None:
    assert keyed(Shard(0, (0, 5), (0, 3)), 7) == keyed(Shard(1, (0, 5), (0, 3)), 7)


@pytest.mark.parametrize("kind", ["xxh3", "keyed sum"])
def test_checksums_see_swapped_pages_swapped_words_and_single_bits(kind: str) -> None:
    pages = torch.randint(0, 256, (2, 4096), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def of(page: torch.Tensor, key: int) -> int:
        return checksum(page.numpy(), key) if kind == "xxh3" else keyed_sum(page, key)

    honest = of(pages[0], keyed(SHARD, 0)), of(pages[1], keyed(SHARD, 1))
    assert (of(pages[1], keyed(SHARD, 0)), of(pages[0], keyed(SHARD, 1))) != honest
    assert of(pages[0], keyed(SHARD, 1)) != honest[0]
    turned = torch.cat([pages[0, 8:16], pages[0, :8], pages[0, 16:]])
    assert of(turned, keyed(SHARD, 0)) != honest[0]
    for position in (0, 1, 4095):
        spoiled = pages[0].clone()
        spoiled[position] ^= 1
        assert of(spoiled, keyed(SHARD, 0)) != honest[0]
    assert of(pages[0].clone(), keyed(SHARD, 0)) == honest[0]
    assert of(torch.zeros(4096, dtype=torch.uint8), 1) != of(torch.zeros(4096, dtype=torch.uint8), 2)


def test_a_keyed_sum_takes_pages_of_any_size() -> None:
    page = torch.arange(13, dtype=torch.uint8)
    assert keyed_sum(page, 5) != keyed_sum(page.flip(0), 5)


def test_a_tensor_is_summed_where_it_lies() -> None:
    page = torch.arange(64, dtype=torch.uint8)
    assert checksum(page, 3) == keyed_sum(page, 3)


@pytest.mark.parametrize(
    ("text", "struck"),
    [
        ("", {}),
        ("corrupt:2", {2: "corrupt", 4: "corrupt", 6: "corrupt"}),
        ("fail:3x1", {3: "fail"}),
        ("stall:1x2", {1: "stall", 2: "stall"}),
    ],
)
def test_a_fault_strikes_when_it_says(text: str, struck: dict[int, str]) -> None:
    fault = parse(text)
    assert {number: kind for number in range(1, 7) if (kind := fault.strikes(number))} == struck


@pytest.mark.parametrize("text", ["corrupt", "corrupt:0", "burn:1", "fail:-1", "fail:1x0", "fail:1 "])
def test_a_fault_that_makes_no_sense_is_one_line(text: str) -> None:
    with pytest.raises(SettingError, match="fault is"):
        parse(text)


def test_no_fault_never_strikes() -> None:
    assert not any(Fault().strikes(number) for number in range(1000))


def test_the_operators_own_ucx_settings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_RNDV_SCHEME", "put_zcopy")
    monkeypatch.delenv("UCX_KEEPALIVE_INTERVAL", raising=False)
    environment.prepare()
    assert os.environ["UCX_RNDV_SCHEME"] == "put_zcopy"
    assert os.environ["UCX_KEEPALIVE_INTERVAL"] == "1s"


@pytest.mark.parametrize(
    ("host", "given", "expected"),
    [
        ("10.0.0.1", {}, {environment.BRIDGES: "y", environment.DEVICES: "^docker0,empty"}),
        ("10.0.0.1", {environment.DEVICES: "all"}, {environment.BRIDGES: "y", environment.DEVICES: "^docker0,empty"}),
        ("10.0.0.1", {environment.DEVICES: "br0"}, {environment.BRIDGES: "y", environment.DEVICES: "br0"}),
        ("10.0.0.1", {environment.BRIDGES: "n"}, {environment.BRIDGES: "n"}),
        ("10.9.9.9", {}, {}),
    ],
)
def test_only_the_bridge_whose_address_is_announced_carries_pages(
    monkeypatch: pytest.MonkeyPatch, host: str, given: dict[str, str], expected: dict[str, str]
) -> None:
    monkeypatch.setattr(environment, "_bridges", lambda: {"br0": "10.0.0.1", "docker0": "172.17.0.1", "empty": ""})
    for name in (environment.BRIDGES, environment.DEVICES):
        monkeypatch.setenv(name, "")  # so that what is set here is undone
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    environment.follow(host)
    assert {name: os.environ[name] for name in (environment.BRIDGES, environment.DEVICES) if name in os.environ} == expected


def test_places_refuse_what_is_not_a_pool() -> None:
    for pages in (torch.zeros(4, 8), torch.zeros(32, dtype=torch.uint8), torch.zeros(4, 16, dtype=torch.uint8)[:, ::2]):
        with pytest.raises(ValueError, match="contiguous uint8"):
            Places(pages, SHARD)


def test_a_spoiled_page_is_a_copy() -> None:
    pages = torch.zeros(2, 8, dtype=torch.uint8)
    spoiled = Places(pages, SHARD).spoiled(pages.numpy().reshape(-1), [9, 15])
    assert spoiled.sum() == 2 and spoiled[9] == spoiled[15] == 1
    assert pages.sum() == 0


REPORT = """
#                 lane[0]:  3:sysv/memory.0 md[2]           -> md[2]/sysv/sysdev[255] seg 4294967295 am keepalive
#                 lane[1]:  5:cma/memory.0 md[4]            -> md[4]/cma/sysdev[255] seg 4294967295 rma_bw#0
# | ucp_context_0 intra-node cfg#0 | tagged message by ucp_tag_send* from host memory        |
# |                          0..92 | eager short                               | sysv/memory |
# |                       93..8191 | eager copy-in copy-out                    | sysv/memory |
# |                        8K..inf | (?) rendezvous zero-copy read from remote | cma/memory  |
"""


def test_the_transport_is_read_from_ucxs_own_report() -> None:
    assert carriers(REPORT) == "sysv+cma"
    assert way(REPORT, 368_640) == ("rendezvous zero-copy read from remote", "cma")
    assert way(REPORT, 64) == ("eager short", "sysv")
    assert (carriers(""), way("", 64)) == ("", ("", ""))
