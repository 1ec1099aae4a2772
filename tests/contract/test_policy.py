"""The policy file: what it may say, and that nothing else passes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from nsa_sel.errors import PolicyError, SwitchError
from nsa_sel.policy import Policy, Rule, default_path, find, load, save, user_path
from nsa_sel.switches import parse

GOOD = Policy({"NVIDIA H200": {"cuda": Rule(True, 256), "triton": Rule(False)}, "NVIDIA L4": {"cuda": Rule(False)}})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "policy.json"
    save(GOOD, path)
    assert load(path) == GOOD
    assert list(path.parent.iterdir()) == [path], "a temporary file was left behind"
    save(Policy(), path)
    assert load(path) == Policy()


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    save(Policy({"NVIDIA H200": {"cuda": Rule(True, 256)}}), tmp_path / "policy.json")
    assert json.loads((tmp_path / "policy.json").read_text()) == {
        "version": 1,
        "devices": {"NVIDIA H200": {"cuda": {"enabled": True, "min_l": 256}}},
    }


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.json"
    save(GOOD, path)

    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(Policy(), path)
    assert load(path) == GOOD
    assert list(tmp_path.iterdir()) == [path]


def test_a_rule_that_could_not_be_read_again_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="min_l"):
        save(Policy({"NVIDIA H200": {"cuda": Rule(True, -1)}}), tmp_path / "policy.json")
    assert not list(tmp_path.iterdir())


def test_rules_are_found_by_device_and_backend() -> None:
    assert GOOD.rule("NVIDIA H200", "cuda") == Rule(True, 256)
    assert GOOD.rule("NVIDIA H100", "cuda") is None
    assert GOOD.rule("NVIDIA L4", "triton") is None


def test_min_l_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text('{"version": 1, "devices": {"NVIDIA L4": {"cuda": {"enabled": true}}}}')
    assert load(path).rule("NVIDIA L4", "cuda") == Rule(True, 0)


def device(rule: str) -> str:
    return '{"version": 1, "devices": {"X": {"cuda": ' + rule + "}}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON"),
        ("[]", "expected an object"),
        ("{}", "version"),
        ('{"version": 2, "devices": {}}', "version: expected 1, got 2"),
        ('{"version": true, "devices": {}}', "version: expected 1, got True"),
        ('{"version": 1}', "devices"),
        ('{"version": 1, "devices": {}, "more": 1}', "more"),
        ('{"version": 1, "devices": []}', "devices: expected an object"),
        ('{"version": 1, "devices": {"X": null}}', r"devices\['X'\]: expected an object"),
        ('{"version": 1, "devices": {"X": {"sdpa": {"enabled": true}}}}', "sdpa"),
        (device("true"), "expected an object"),
        (device("{}"), "enabled"),
        (device('{"enabled": 1}'), "enabled: expected true or false, got 1"),
        (device('{"enabled": true, "min_l": 1.5}'), "min_l: expected a whole number >= 0, got 1.5"),
        (device('{"enabled": true, "min_l": -1}'), "min_l: .*got -1"),
        (device('{"enabled": true, "min_l": NaN}'), "min_l: .*got nan"),
        (device('{"enabled": true, "min_l": true}'), "min_l: .*got True"),
        (device('{"enabled": true, "min_L": 5}'), "min_L"),
        (device('{"enabled": true, "enabled": false}'), "each name once"),
    ],
)
def test_a_file_that_is_no_policy_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(PolicyError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="readable"):
        load(tmp_path / "missing.json")
    with pytest.raises(PolicyError, match="readable"):
        load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match="readable"):
        load(tmp_path / "binary")


def test_where_the_policy_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_SEL_POLICY", "/somewhere/p.json")
    assert default_path() == Path("/somewhere/p.json")
    monkeypatch.setenv("NSA_SEL_POLICY", "")
    assert default_path().parts[-2:] == ("nsa_sel", "policy.json")


def test_the_users_policy_lies_in_xdg_config_home_else_in_dot_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "platformdirs", None)  # not there, and not needed
    monkeypatch.setenv("XDG_CONFIG_HOME", "/etc/conf")
    assert user_path() == Path("/etc/conf/nsa_sel/policy.json")
    monkeypatch.setenv("HOME", "/home/someone")
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_CONFIG_HOME", unset)
        assert user_path() == Path("/home/someone/.config/nsa_sel/policy.json")


def test_a_home_that_may_not_be_searched_holds_no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refused)
    monkeypatch.setattr(Path, "exists", refused)
    assert find(None) is None
    assert find("named.json") == Path("named.json")  # which must be there: reading it says what is wrong


def test_a_written_policy_keeps_the_umasks_mode_or_that_of_the_file_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    before = os.umask(0o022)
    try:
        save(Policy(), path)
        assert path.stat().st_mode & 0o777 == 0o644
        path.chmod(0o640)
        save(Policy(), path)
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_what_json_cannot_take_in_is_a_policy_error(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for text in ("[" * 100_000, '{"version": ' + "1" * 5000 + "}"):
        path.write_text(text)
        with pytest.raises(PolicyError, match="expected JSON"):
            load(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PolicyError, match="not a regular file"):
        load(tmp_path / "pipe")


def test_a_switch_of_thousands_of_digits_is_a_switch_error() -> None:
    with pytest.raises(SwitchError, match="5000 digits"):
        parse({"NSA_SEL_TRITON_MIN_L": "1" * 5000})
