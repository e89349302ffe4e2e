"""API keys: how they are read, whom they admit, and that they are never repeated; who may listen where without any."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import SettingError
from common.settings import GatewaySettings, load
from gateway.access import access_of, origins_of
from gateway.keys import MOST_KEYS, Keys, Unauthorized, read_keys
from gateway.limits import Allowance
from gateway.server import check_open

ALICE = "alice-0123456789abcdef"
BOB = "bob-0123456789abcdef"
ROOT = Path(__file__).parents[2]
DIGEST = hashlib.sha256(ALICE.encode()).hexdigest()


def keys(listed: str) -> Keys:
    found = read_keys(listed, None)
    assert found is not None
    return found


def test_a_key_names_its_client() -> None:
    found = keys(f"alice:{ALICE}, bob : {BOB},")
    assert found.name(f"Bearer {ALICE}") == "alice" and found.name(f"bearer  {BOB} ") == "bob"
    assert found.names == ["alice", "bob"]


def test_without_a_name_its_place_is_its_name(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n{BOB}  # Bob's\n")
    found = read_keys(f"alice:{ALICE}", str(file))
    assert found is not None and found.names == ["alice", "line-3"]
    assert keys(ALICE).names == ["entry-1"]


def test_two_keys_of_one_name_are_one_client() -> None:
    """The old one and the new one, while clients change over."""
    found = keys(f"alice:{ALICE},alice:{BOB}")
    assert len(found) == 2 and found.names == ["alice"]
    assert found.name(f"Bearer {ALICE}") == found.name(f"Bearer {BOB}") == "alice"


def test_no_keys_is_said_by_giving_none() -> None:
    assert read_keys("", None) is None


@pytest.mark.parametrize("shown", [None, "", "Bearer", "Bearer ", ALICE, f"Basic {ALICE}", f"Bearer{ALICE}"])
def test_no_key_shown(shown: str | None) -> None:
    with pytest.raises(Unauthorized) as refused:
        keys(ALICE).name(shown)
    assert (refused.value.status, refused.value.challenge) == (401, 'Bearer realm="baton"')


@given(st.text() | st.sampled_from([ALICE[:-1], ALICE + "x", ALICE.upper(), hashlib.sha256(ALICE.encode()).hexdigest(), "\udcff" * 20]))
def test_any_other_key_is_refused_without_being_repeated(wrong: str) -> None:
    with pytest.raises(Unauthorized) as refused:
        keys(f"alice:{ALICE}").name(f"Bearer x{wrong}")
    assert refused.value.challenge.endswith('error="invalid_token"')
    assert refused.value.message == "this API key is not known here"


def test_the_key_itself_is_not_kept() -> None:
    found = keys(f"alice:{ALICE}")
    kept = repr(vars(found))
    assert ALICE not in kept and "alice" in kept


def test_a_digest_stands_for_its_key_and_admits_nobody_by_itself() -> None:
    found = keys(f"alice:sha256:{DIGEST},sha256:{hashlib.sha256(BOB.encode()).hexdigest()}")
    assert found.names == ["alice", "entry-2"]
    assert found.name(f"Bearer {ALICE}") == "alice" and found.name(f"Bearer {BOB}") == "entry-2"
    for shown in (DIGEST, f"sha256:{DIGEST}"):
        with pytest.raises(Unauthorized):
            found.name(f"Bearer {shown}")


def test_limits_stand_beside_the_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice:sha256:{DIGEST} running=2 tokens=500 priority  # ours\nbob:{BOB}\n")
    access = access_of(load(GatewaySettings, ["--api-keys-file", str(file), "--key-running", "7"], {}))
    assert access is not None
    assert access.keys.allowances == {"alice": Allowance(running=2, tokens=500, priority=True), "bob": Allowance()}
    alice, bob = access.meters["alice"], access.meters["bob"]
    assert (alice._most_running, alice.most_tokens, alice.priority) == (2, 500, True)
    assert (bob._most_running, bob.most_tokens, bob.priority) == (7, None, False)


def test_a_made_key_is_admitted_by_its_line(tmp_path: Path) -> None:
    made = subprocess.run([sys.executable, "-m", "scripts.launcher.key", "alice", "requests=9"], capture_output=True, text=True, cwd=ROOT)
    key = made.stderr.split()[-1]
    assert made.returncode == 0 and len(key) == 48 and key not in made.stdout
    file = tmp_path / "keys"
    file.write_text(made.stdout)
    found = read_keys("", str(file))
    assert found is not None and found.name(f"Bearer {key}") == "alice" and found.allowances["alice"].requests == 9
    for words in (["al ice"], [], ["alice", "requests=none"]):
        again = subprocess.run([sys.executable, "-m", "scripts.launcher.key", *words], capture_output=True, text=True, cwd=ROOT)
        assert again.returncode == 2 and len(again.stderr.strip().splitlines()) == 1 and not again.stdout


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["alice", "--help"]], ids=str)
def test_who_asks_for_help_gets_no_key(words: list[str]) -> None:
    made = subprocess.run([ROOT / "scripts/key", *words], capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, "") and made.stdout.startswith("usage: ./scripts/key NAME")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--version"], "begins with no dash"),
        (["x", "requests=0"], "N from 1 to"),
        (["x", "tokens=-3"], "N from 1 to"),
        (["alice", "requests=5", "requests=6"], "requests is said twice"),
    ],
    ids=str,
)
def test_no_key_is_made_for_a_slip(words: list[str], told: str) -> None:
    made = subprocess.run([ROOT / "scripts/key", *words], capture_output=True, text=True)
    assert (made.returncode, made.stdout) == (2, "") and told in made.stderr and len(made.stderr.splitlines()) == 1


MISTAKES = [
    (",", "api_keys holds no key"),
    ("short", "entry 1 has less than 16 characters"),
    (f"alice:{ALICE},bob:tiny", "entry 2 has less than"),
    (f"{ALICE} {BOB}", "what follows the key in entry 1"),
    ("gehéim-0123456789abcdef", "entry 1 must consist of"),
    (f"al ice:{ALICE}", "the name in entry 1"),
    (f":{ALICE}", "the name in entry 1"),
    (f"a:b:{ALICE}", "the name in entry 1"),
    (f"alice:{ALICE},bob:sha256:{DIGEST}", "alice and bob have the same key"),
    ("alice:sha256:12", "followed by 64 hex digits"),
    (f"al ice:sha256:{DIGEST}", "the name in entry 1"),
    (f"alice:{ALICE} tokens=0", "what follows the key in entry 1"),
    (f"alice:{ALICE} tokens=1 1", "what follows the key in entry 1"),
    (f"alice:{ALICE} tokens={10**10}", "what follows the key in entry 1"),
    (f"alice:{ALICE},alice:{BOB} priority", "need the same options"),
    (f"alice:{ALICE},bob:{ALICE}", "alice and bob have the same key"),
    (",".join(f"key-of-many-{n:08}" for n in range(MOST_KEYS + 1)), f"at most {MOST_KEYS}"),
]


@pytest.mark.parametrize(("listed", "words"), MISTAKES)
def test_a_mistake_is_one_line_without_the_key(listed: str, words: str) -> None:
    with pytest.raises(SettingError) as caught:
        read_keys(listed, None)
    said = str(caught.value)
    assert words in said and "\n" not in said
    assert not any(secret in said for secret in (ALICE, BOB, "tiny", "gehéim", "key-of-many"))


def test_a_file_that_gives_no_keys_is_a_mistake(tmp_path: Path) -> None:
    empty, binary, large = tmp_path / "empty", tmp_path / "binary", tmp_path / "large"
    empty.write_text("# none yet\n")
    binary.write_bytes(b"\xff" * 40)
    large.write_bytes(b"#" * (2 << 20))
    for file, words in [(empty, "holds no key"), (binary, "not a text"), (large, "larger than"), (tmp_path / "none", "No such file")]:
        with pytest.raises(SettingError, match=words):
            read_keys("", str(file))


def test_settings_never_print_keys_and_limits_need_them() -> None:
    settings = load(GatewaySettings, ["--key-running", "2"], {"BATON_API_KEYS": f"alice:{ALICE}"})
    assert ALICE not in repr(settings)
    access = access_of(settings)
    assert access is not None and access.meters["alice"].running == 0
    assert access_of(load(GatewaySettings, [], {"BATON_API_KEYS": ""})) is None
    for flag in ("--key-running", "--key-requests-per-minute", "--key-tokens-per-minute"):
        with pytest.raises(SettingError, match="there are no keys"):
            access_of(load(GatewaySettings, [flag, "5"], {}))


# ------------------------------------------------------------------------------------------------------- who may listen


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_host_needs_no_keys(host: str) -> None:
    check_open(host, keys=False, anyone=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "::ffff:192.0.2.1", "no.such.host.invalid"])
def test_others_do_unless_told_otherwise(host: str) -> None:
    with pytest.raises(SettingError, match=r"no API keys.*allow_anonymous to anyone") as caught:
        check_open(host, keys=False, anyone=False)
    assert "\n" not in str(caught.value)
    check_open(host, keys=True, anyone=False)
    check_open(host, keys=False, anyone=True)


@pytest.mark.parametrize("listed", ["", " , ", "*", "https://chat.example.org", "http://localhost:3000,http://[::1]:80"])
def test_origins(listed: str) -> None:
    assert origins_of(listed) == [part.strip() for part in listed.split(",") if part.strip()]


@pytest.mark.parametrize(
    "listed", ["example.org", "https://", "https://a/", "https://a/b", "https://A.org", "ftp://a", "http://a:b", "http://u@a", "null", "**"]
)
def test_what_is_no_origin(listed: str) -> None:
    with pytest.raises(SettingError, match="cors_origins holds"):
        origins_of(f"https://good.example,{listed}")
