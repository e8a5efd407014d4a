from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.runtime.config import REQUIRED, ConfigError, describe, load, setting


class Mode(enum.StrEnum):
    FAST = "fast"
    SAFE = "safe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    requests: int = setting(120, "Requests a minute", unit="requests", minimum=1, maximum=1000)
    burst: float = setting(1.5, "Burst factor", minimum=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    name: str = setting("x", "Name", minimum=1, maximum=10)
    mode: Mode = setting(Mode.FAST, "Mode")
    enabled: bool = setting(True, "Whether it runs")
    timeout: float = setting(1.0, "Timeout", unit="s", minimum=0)
    path: Path | None = setting(None, "Where")
    tags: tuple[str, ...] = setting((), "Tags", maximum=3)
    pair: tuple[int, str] = setting((1, "a"), "A pair")
    limits: Limits = setting(Limits(), "Limits")
    per_tenant: Mapping[str, Limits] = setting({}, "Limits by tenant")
    weights: dict[str, float] = setting({"cost": 0.4}, "Weights")
    api_key: str = setting("", "A key", maximum=20)

    def __post_init__(self) -> None:
        if self.timeout > 100 and self.mode is Mode.FAST:
            raise ValueError("timeout above 100 s needs mode safe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Needy:
    url: str = setting(REQUIRED, "Where it is")


def read(tmp_path: Path, text: str, environ: Mapping[str, str] | None = None) -> Config:
    file = tmp_path / "sluice.yaml"
    file.write_text(text)
    config: Config = load({"svc": Config}, file, environ or {})["svc"]
    return config


def problems(tmp_path: Path, text: str, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, text, environ)
    return raised.value.problems


def test_defaults_without_a_file() -> None:
    assert load({"svc": Config}, None, {})["svc"] == Config()


def test_every_kind_of_value_from_the_file(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        """
svc:
  name: gate
  mode: safe
  enabled: false
  timeout: 2
  path: /tmp/x
  tags: [a, b]
  pair: [3, z]
  limits: {requests: 5}
  per_tenant: {acme: {requests: 7, burst: 2}}
  weights: {cost: 1e-3, latency: 2}
""",
    )
    assert config == Config(
        name="gate",
        mode=Mode.SAFE,
        enabled=False,
        timeout=2.0,
        path=Path("/tmp/x"),
        tags=("a", "b"),
        pair=(3, "z"),
        limits=Limits(requests=5),
        per_tenant={"acme": Limits(requests=7, burst=2.0)},
        weights={"cost": 0.001, "latency": 2.0},
    )
    assert isinstance(config.timeout, float)


def test_the_environment_wins_and_reaches_nested_settings(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "svc: {name: file, limits: {requests: 5, burst: 3}, weights: {cost: 1}}",
        {
            "SLUICE_SVC__NAME": "12",
            "SLUICE_SVC__LIMITS__REQUESTS": "6",
            "SLUICE_SVC__TAGS": "a, b",
            "SLUICE_SVC__WEIGHTS__LATENCY": "0.5",
            "SLUICE_SVC__PER_TENANT__ACME__BURST": "4",
            "SLUICE_SVC__ENABLED": "false",
            "SLUICE_SVC__PATH": "",
            "UNRELATED": "x",
            "SLUICE_REPORT_FD": "3",
        },
    )
    assert config.name == "12"
    assert config.limits == Limits(requests=6, burst=3.0)
    assert config.tags == ("a", "b")
    assert config.weights == {"cost": 1.0, "latency": 0.5}
    assert config.per_tenant["acme"] == Limits(burst=4.0)
    assert config.enabled is False
    assert config.path is None


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """
svcc: {}
svc:
  nam: x
  mode: fastt
  enabled: 1
  timeout: -1
  tags: [a, b, c, d]
  pair: [1]
  limits: {requests: 0, burst: "no"}
  per_tenant: {acme: {request: 1}}
  weights: [1]
""",
        {"SLUICE_SVC__LIMITS__BURSTT": "2", "SLUICE_SVD__X": "1", "SLUICE_SVC__NAME__FIRST": "q"},
    )
    text = "\n".join(found)
    for expected in (
        "svcc: unknown section",
        "did you mean 'svc'?",
        "svc.nam: unknown setting",
        "did you mean 'name'?",
        "svc.mode: must be one of fast, safe, got 'fastt'",
        "svc.enabled: must be true or false, got 1",
        "svc.timeout: -1 is below the minimum of 0 s",
        "svc.tags: 4 elements is above the maximum of 3",
        "svc.pair: must have 2 elements, got 1",
        "svc.limits.requests: 0 is below the minimum of 1 requests",
        "svc.limits.burst: must be a number, got 'no'",
        "svc.per_tenant.acme.request: unknown setting",
        "svc.weights: must be a mapping",
        "SLUICE_SVC__LIMITS__BURSTT: unknown setting 'burstt' of svc.limits; did you mean 'burst'?",
        "SLUICE_SVD__X: unknown section 'svd'",
        "SLUICE_SVC__NAME__FIRST: svc.name has no settings below it",
    ):
        assert expected in text, expected
    assert len(found) == 14


def test_a_rule_over_several_settings_is_a_problem_with_its_section(tmp_path: Path) -> None:
    assert problems(tmp_path, "svc: {timeout: 101}") == ("svc: timeout above 100 s needs mode safe",)


def test_a_required_setting_says_how_to_set_it() -> None:
    with pytest.raises(ConfigError) as raised:
        load({"needy": Needy}, None, {})
    assert "needy.url: must be set" in str(raised.value)
    assert "SLUICE_NEEDY__URL" in str(raised.value)
    assert load({"needy": Needy}, None, {"SLUICE_NEEDY__URL": "u"})["needy"] == Needy(url="u")


def test_secrets_stay_out_of_the_error(tmp_path: Path) -> None:
    text = str(problems(tmp_path, "svc: {api_key: [sk-canary-1]}", {"SLUICE_SVC__NAME": "nats://u:canary-2@host-and-more"}))
    assert "canary" not in text
    assert "svc.api_key" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("svc: [", "not valid YAML at line"),
        ("- svc", "must be a mapping of section names"),
        ("svc: {name: a, name: b}", "given twice"),
        ("svc: 3", "svc: must be a mapping of settings"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problems(tmp_path, text)[0]


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        load({"svc": Config}, tmp_path / "absent.yaml", {})


def test_sections_of_other_processes_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "sluice.yaml"
    file.write_text("svc: {}\nrouting: {anything: 1}\n")
    load({"svc": Config}, file, {"SLUICE_ROUTING__X": "1"}, others=["routing"])


def test_the_description_has_every_setting_and_reads_back(tmp_path: Path) -> None:
    text = describe({"svc": Config})
    for name in ("name", "mode", "enabled", "timeout", "path", "tags", "pair", "limits", "requests", "weights"):
        assert f"{name}:" in text
    assert "# Timeout. Unit: s. At least 0." in text
    assert "# Mode. One of fast, safe." in text
    assert read(tmp_path, text) == Config()
    assert "(required)" in describe({"needy": Needy})


def test_defaults_are_not_shared() -> None:
    first, second = Config(), Config()
    first.weights["cost"] = 9.0
    assert second.weights == {"cost": 0.4}
