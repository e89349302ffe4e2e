"""Settings: one definition gives variable, flag, default, range and help; every mistake is named."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import SettingError
from common.settings import CommonSettings, GatewaySettings, WorkerSettings, cores, help_text, load


def test_defaults_need_nothing() -> None:
    worker = load(WorkerSettings, [], {"PATH": "/bin"})
    assert (worker.redis_url, worker.page_tokens, worker.pages, worker.checksums) == ("redis://127.0.0.1:6379/0", 16, None, True)
    gateway = load(GatewaySettings, [], {})
    assert (gateway.http_host, gateway.http_port, gateway.max_body_bytes, gateway.deadline_s) == ("127.0.0.1", 8000, 4 << 20, 600.0)


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        load(GatewaySettings, [], {}).http_port = 1  # type: ignore[misc]


def test_a_variable_and_a_flag_say_the_same_and_the_flag_wins() -> None:
    assert load(WorkerSettings, [], {"BATON_MAX_BATCH": "8"}).max_batch == 8
    assert load(WorkerSettings, ["--max-batch", "8"], {}).max_batch == 8
    assert load(WorkerSettings, ["--max-batch=8"], {"BATON_MAX_BATCH": "9"}).max_batch == 8
    assert load(WorkerSettings, ["--max_batch", "7", "--max-batch", "8"], {}).max_batch == 8


def test_an_empty_variable_says_nothing() -> None:
    assert load(WorkerSettings, [], {"BATON_MAX_BATCH": "", "BATON_PAGES": ""}) == load(WorkerSettings, [], {})


def test_an_empty_flag_is_none_where_none_may_be() -> None:
    assert load(WorkerSettings, ["--pages", ""], {"BATON_PAGES": "8"}).pages is None


def test_variables_of_other_processes_and_of_the_tests_are_left_alone() -> None:
    environment = {"BATON_HTTP_PORT": "1", "BATON_TEST_MODEL": "x"}
    assert load(WorkerSettings, [], environment) == load(WorkerSettings, [], {})


@pytest.mark.parametrize("word", ["1", "true", "Yes", "ON"])
def test_true(word: str) -> None:
    assert load(WorkerSettings, ["--checksums", word], {}).checksums is True


@pytest.mark.parametrize("word", ["0", "false", "No", "OFF"])
def test_false(word: str) -> None:
    assert load(WorkerSettings, ["--checksums", word], {}).checksums is False


@pytest.mark.parametrize(
    ("argv", "environment", "words"),
    [
        (["--max-batch", "many"], {}, ["max_batch", "'many'", "whole number"]),
        (["--max-batch", "1.5"], {}, ["max_batch", "whole number"]),
        (["--max-batch", "0"], {}, ["max_batch", "at least 1", "at most 4096"]),
        ([], {"BATON_MAX_BATCH": "9999"}, ["max_batch", "at most 4096"]),
        (["--chunk-s", "nan"], {}, ["chunk_s"]),
        (["--chunk-s", "inf"], {}, ["chunk_s", "at most 60"]),
        (["--pages", "-1"], {}, ["pages", "at least 1"]),
        (["--pages", "9" * 5000], {}, ["pages"]),
        (["--checksums", "maybe"], {}, ["checksums", "true or false"]),
        (["--device", "tpu"], {}, ["device", "cpu, cuda"]),
        (["--policy", "chunkd"], {}, ["policy", "prefill_first, chunked"]),
        (["--max-bach", "8"], {}, ["--max-bach", "did you mean --max-batch?"]),
        ([], {"BATON_MAX_BACH": "8"}, ["BATON_MAX_BACH", "did you mean BATON_MAX_BATCH?"]),
        ([], {"BATON_ZZZ": "8"}, ["BATON_ZZZ", "no such setting"]),
        (["--http-port", "1"], {}, ["--http-port", "no such setting"]),
        (["model"], {}, ["model", "no such setting"]),
        (["--pages"], {}, ["--pages", "a value is missing"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(argv: list[str], environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(SettingError) as caught:
        load(WorkerSettings, argv, environment)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", [WorkerSettings, GatewaySettings])
def test_help_lists_both_spellings_of_every_setting(kind: type[CommonSettings], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(kind, ["--help"], {})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in fields(kind):
        line = next(line for line in text.splitlines() if f"--{field.name.replace('_', '-')} " in line)
        assert f"BATON_{field.name.upper()} " in line
        assert field.metadata["help"] in line


def test_help_shows_defaults() -> None:
    assert "[256]" in help_text(WorkerSettings) and "[8000]" in help_text(GatewaySettings)


def test_a_password_is_not_printed_with_the_settings() -> None:
    settings = load(GatewaySettings, ["--redis-url", "redis://:geheim@h:1/0"], {})
    assert "geheim" not in repr(settings) and settings.redis_url.endswith("@h:1/0")


@pytest.mark.parametrize(("text", "expected"), [("0", [0]), ("0-3", [0, 1, 2, 3]), ("0,2", [0, 2]), ("4,0-1", [4, 0, 1])])
def test_cores(text: str, expected: list[int]) -> None:
    assert cores(text) == expected


@pytest.mark.parametrize("text", ["", "a", "-1", "1-", "3-1", "0,,1", "0-9999999999", "²", "0x1", "1.0"])
def test_bad_cores(text: str) -> None:
    with pytest.raises(SettingError, match="cores"):
        cores(text)


@given(st.lists(st.text(max_size=12) | st.sampled_from(["--pages", "--device=cuda", "--", "--chunk-s"]), max_size=6))
def test_any_command_line_is_settings_or_a_setting_error(argv: list[str]) -> None:
    if "-h" in argv or "--help" in argv:
        return
    try:
        load(WorkerSettings, argv, {})
    except SettingError as error:
        assert str(error)
