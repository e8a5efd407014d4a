from __future__ import annotations

from pathlib import Path

import pytest

from services.runtime.config import ConfigError, describe, load
from services.runtime.settings import MeshSettings, Profile, Reflection


def mesh(**environ: str) -> MeshSettings:
    named = {f"SLUICE_MESH__{key.upper()}": value for key, value in environ.items()}
    settings: MeshSettings = load({"mesh": MeshSettings}, None, named)["mesh"]
    return settings


def test_peers_from_the_environment() -> None:
    settings = mesh(peers__routing="10.0.0.1:9000,10.0.0.2:9000", peers__metering="metering:9000")
    assert settings.peers == {"routing": ("10.0.0.1:9000", "10.0.0.2:9000"), "metering": ("metering:9000",)}


def test_ports_by_service() -> None:
    assert mesh(grpc_ports__routing="9001").grpc_ports == {"routing": 9001}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("peers__routing", "nowhere", "host:port"),
        ("admin_key_sha256", "abc", "64 lower-case hexadecimal digits"),
        ("grpc_ports__routing", "70000", "between 0 and 65535"),
        ("profile", "prod", "must be one of dev, production"),
    ],
)
def test_what_is_refused(name: str, value: str, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        mesh(**{name: value})
    assert expected in str(raised.value)


def test_production_needs_a_service_token() -> None:
    with pytest.raises(ConfigError, match="service_token"):
        mesh(profile="production")
    assert mesh(profile="production", service_token="0123456789abcdef").profile is Profile.PRODUCTION


def test_the_example_file_is_the_default(tmp_path: Path) -> None:
    file = tmp_path / "sluice.yaml"
    file.write_text(describe({"mesh": MeshSettings}))
    assert load({"mesh": MeshSettings}, file, {})["mesh"] == MeshSettings()
    assert MeshSettings().reflection is Reflection.AUTO
