"""What `deploy/` says, held against what the services read, make and run. No Docker: everything is parsed, and run where it is cheap."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import nats
import pytest
import yaml
from nats.aio.client import Client
from nats.aio.msg import Msg

from services.batching import app as batching
from services.batching.adapters.jetstream import JetStream, JetStreamQueues, JetStreamTable
from services.batching.config import Config as BatchingConfig
from services.batching.job import Job
from services.batching.ports import Delivery, QueueName, Ticket
from services.caching import app as caching
from services.caching.adapters.nats_kv import NatsSharedTier, Settings
from services.caching.config import Config as CachingConfig
from services.caching.config import Semantic
from services.caching.keys import partition
from services.cli.compact import UNITS
from services.cli.nats import server_binary
from services.gateway import app as gateway
from services.gateway.adapters.invalidations import SUBJECT
from services.gateway.adapters.replays import NatsReplays
from services.gateway.adapters.replays import Settings as ReplaySettings
from services.gateway.config import Config as GatewayConfig
from services.gateway.edge.config import EdgeConfig
from services.metering.adapters import genai
from services.metering.app import KEYS_REVOKED
from services.metering.pricebook import build, models_of
from services.routing.app import read_catalogue
from services.runtime.bootstrap import OpenService
from services.runtime.config import load
from services.runtime.errors import Failure, Reason
from services.runtime.jetstream import ensure_stream
from services.runtime.process import Process
from services.runtime.settings import SERVICES, MeshSettings, Profile
from sluice.inference.v1.inference_service_pb2 import GenerateRequest
from tests.unit.caching.examples import answered
from tests.unit.runtime.fakes import Lines, eventually
from tests.unit.runtime.test_link import free_port

ROOT: Final = Path(__file__).resolve().parents[2]
DEPLOY: Final = ROOT / "deploy"
DOCKERFILE: Final = DEPLOY / "Dockerfile"
NATS_USERS: Final = ("metering", "gateway", "caching", "batching")
_VARIABLE: Final = re.compile(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}")


def variables() -> dict[str, str]:
    """The variables of `.env.example`, each with a value of the kind that is asked for."""
    lines = (DEPLOY / ".env.example").read_text().splitlines()
    names = [line.partition("=")[0] for line in lines if line and not line.startswith("#")]
    return {name: "0123456789abcdef" * 4 if name.endswith("SHA256") else f"n{name.lower()}0123456789" for name in names}


def interpolated(text: str, values: Mapping[str, str]) -> str:
    """`text` with `${NAME}`, `${NAME:-default}` and `${NAME:?message}` replaced, as Compose does it. Raises KeyError."""

    def value(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        found = values.get(name, "")
        if not found and operator == ":?":
            raise KeyError(name)
        return found or (rest if operator == ":-" else "")

    return _VARIABLE.sub(value, text)


@pytest.fixture(scope="module")
def compose() -> Any:
    """compose.yaml with the variables of `.env.example` in it."""

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: filled(value) for key, value in node.items()}
        if isinstance(node, list):
            return [filled(value) for value in node]
        return interpolated(node, variables()) if isinstance(node, str) else node

    return filled(yaml.safe_load((DEPLOY / "compose.yaml").read_text()))


# --- the Dockerfile


def instructions() -> Iterator[tuple[str, str]]:
    """The instructions of the Dockerfile, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.partition(" ")
            yield word, " ".join(rest.split()) if word != "ENTRYPOINT" else rest


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, FROM first."""
    found: list[list[tuple[str, str]]] = []
    for instruction in instructions():
        if instruction[0] == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


def of(word: str, stage: list[tuple[str, str]]) -> list[str]:
    return [rest for name, rest in stage if name == word]


def image_environment() -> dict[str, str]:
    """What ENV gives each container."""
    pairs = [part.partition("=") for rest in of("ENV", stages()[-1]) for part in shlex.split(rest)]
    return {name: value for name, _, value in pairs}


def test_the_image_has_stages_and_no_name_of_a_registry(compose: Any) -> None:
    built = stages()
    assert [stage[0][1].partition(" AS ")[2] for stage in built] == ["packages", "code", ""]
    images = [rest.partition("=")[2] for word, rest in instructions() if word == "ARG" and "IMAGE" in rest]
    images += [service["image"] for service in compose["services"].values()]
    for image in images:
        first, slash, _ = image.partition("/")
        assert not slash or not re.search(r"[.:]|^localhost$", first), f"{image} names a registry"
        assert ":" in image, f"{image} must say its version"
    assert {rest.partition(" AS ")[0] for word, rest in instructions() if word == "FROM"} == {"${PYTHON_IMAGE}"}


def test_the_image_runs_as_nobody_special_and_can_write_its_state_alone() -> None:
    final = stages()[-1]
    assert final[-3] == ("USER", "10001:10001"), "only ENTRYPOINT and CMD come after it"
    writable = [step for step in of("RUN", final) if "install -d" in step]
    assert len(writable) == 1
    assert "-o 10001 -g 10001 -m 0700 /var/lib/sluice" in writable[0]
    assert not [rest for rest in of("COPY", final) if "--chown" in rest]
    # `python -m` puts it on the module path.
    assert of("WORKDIR", final)[-1] == "/app"


def test_the_image_installs_the_lock_as_the_checkout_does() -> None:
    install = [step for stage in stages() for step in of("RUN", stage) if " pip install " in step]
    assert len(install) == 1
    ours = set(shlex.split(install[0]))
    script = (ROOT / "tools" / "install.py").read_text()
    theirs = {word for word in ("--no-deps", "--require-hashes", "-r") if f'"{word}"' in script}
    assert len(theirs) == 3
    assert theirs | {"requirements.lock", "--only-binary"} <= ours
    assert "http" not in install[0]


def test_pip_may_complain_of_what_is_accepted_and_nothing_else(tmp_path: Path) -> None:
    (step,) = [step for step in of("RUN", stages()[0]) if "pip check" in step]
    command = step.replace("/opt/sluice/bin/python", shlex.quote(sys.executable))
    accepted = tmp_path / "accepted-complaints.txt"

    def run() -> int:
        return subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, capture_output=True, timeout=60).returncode

    shutil.copy(ROOT / "tools" / "accepted-complaints.txt", accepted)
    assert run() == 0
    accepted.write_text(accepted.read_text().splitlines()[0] + "\n")
    assert run() == 1


def test_what_the_image_copies_is_there_and_let_through() -> None:
    passed = set((DEPLOY / "Dockerfile.dockerignore").read_text().splitlines())
    assert "*" in passed
    copied = set()
    for stage in stages():
        for rest in of("COPY", stage):
            if not rest.startswith("--from="):
                copied.update(rest.split()[:-1])
    for source in copied:
        assert (ROOT / source).exists(), source
    assert {f"!{source}" for source in copied} == {line for line in passed if line.startswith("!")}


@pytest.mark.parametrize(("command", "program"), [(["routing", "--help"], "routing"), (None, "gateway")])
def test_the_entry_point_runs_the_service_that_the_command_names(command: list[str] | None, program: str) -> None:
    final = stages()[-1]
    entry: list[str] = json.loads(of("ENTRYPOINT", final)[0])
    arguments = command or [*json.loads(of("CMD", final)[0]), "--help"]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": image_environment()["PYTHONPATH"].replace("/app", str(ROOT)),
    }
    ended = subprocess.run([*entry, *arguments], capture_output=True, text=True, timeout=60, cwd="/", env=environment)
    assert ended.returncode == 0, ended.stderr
    assert f"usage: python -m services.{program} " in ended.stdout


# --- compose.yaml


def ours(compose: Any) -> dict[str, Any]:
    """The containers that run our image."""
    return {name: service for name, service in compose["services"].items() if service["image"].startswith("sluice:")}


def settings_of(compose: Any, name: str) -> dict[str, Any]:
    """The configuration of a container, every section of it. Raises ConfigError."""
    environ = {**image_environment(), **ours(compose)[name]["environment"]}
    assert all(isinstance(value, str) for value in environ.values()), "Compose takes text only"
    sluice = [variable for variable in environ if variable.startswith("SLUICE_")]
    assert all("__" in variable for variable in sluice), "the loader doesn't see the others"
    return load({"mesh": MeshSettings, **{unit.name: unit.config for unit in UNITS}}, None, environ)


def port_of(settings: MeshSettings, name: str) -> int:
    return settings.grpc_ports[name]


def test_each_service_is_one_container(compose: Any) -> None:
    found = ours(compose)
    assert set(found) == set(SERVICES)
    for name, service in found.items():
        assert service["command"] == [name]
        assert importlib.util.find_spec(f"services.{name}.__main__") is not None
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DOCKERFILE


@pytest.mark.parametrize("name", SERVICES)
def test_each_container_has_a_configuration_that_the_mesh_agrees_on(compose: Any, name: str) -> None:
    loaded = settings_of(compose, name)
    mesh: MeshSettings = loaded["mesh"]
    assert mesh.profile is Profile.PRODUCTION
    assert mesh.listen_host == loaded["gateway"].edge.host == "0.0.0.0"
    assert mesh.metrics_ports[name] > 0
    assert mesh.service_token == variables()["SLUICE_SERVICE_TOKEN"]
    assert mesh.admin_key_sha256 == variables()["SLUICE_ADMIN_KEY_SHA256"]
    assert mesh.otlp_endpoint is None
    expected = {service: (f"{service}:{port_of(settings_of(compose, service)['mesh'], service)}",) for service in SERVICES}
    assert dict(mesh.peers) == expected


def test_secrets_are_given_to_those_who_need_them(compose: Any) -> None:
    keys = {"OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"}
    for name, service in ours(compose).items():
        given = service["environment"]
        assert (keys <= set(given)) == (name == "execution"), "provider keys"
        assert ("SLUICE_METERING__BOOTSTRAP_KEY" in given) == (name == "metering")
        assert ("SLUICE_MESH__NATS_URL" in given) == (name in NATS_USERS)
        if name in NATS_USERS:
            password = variables()[f"NATS_{name.upper()}_PASSWORD"]
            assert settings_of(compose, name)["mesh"].nats_url == f"nats://{name}:{password}@nats:4222"
        others = [
            value for variable, value in variables().items() if variable.startswith("NATS_") and name.upper() not in variable
        ]
        assert not [value for value in others if any(value in text for text in given.values())], "another one's password"
    # Whoever asks the process for NATS must have been given one.
    asking = {
        name
        for name in SERVICES
        if any(re.search(r"process\.nats\b", path.read_text()) for path in (ROOT / "services" / name).rglob("*.py"))
    }
    assert asking == set(NATS_USERS)
    credentials = yaml.safe_load((DEPLOY / "catalogue.yaml").read_text())["providers"].values()
    assert {entry["credential"] for entry in credentials if "credential" in entry} == {f"env:{key}" for key in keys}


def test_every_variable_is_explained_and_every_explained_one_is_used() -> None:
    text = re.sub(r"^\s*#.*$", "", (DEPLOY / "compose.yaml").read_text(), flags=re.MULTILINE)
    used = {match[1]: match[2] for match in _VARIABLE.finditer(text)}
    assert set(used) - set(variables()) == {"SLUICE_VERSION", "SLUICE_OTLP_ENDPOINT"}, "these have defaults that do"
    assert set(variables()) <= set(used)
    with pytest.raises(KeyError):
        interpolated("${NATS_CACHING_PASSWORD:?}", {})
    ignored = (DEPLOY / ".gitignore").read_text().splitlines()
    assert {".env", "secrets/"} <= set(ignored)


def test_state_is_on_a_volume_of_its_own(compose: Any) -> None:
    for name, service in ours(compose).items():
        mesh: MeshSettings = settings_of(compose, name)["mesh"]
        mounts = {place: source for source, place, *_ in (volume.split(":") for volume in service["volumes"])}
        keeps = "process.state_dir(" in (ROOT / "services" / name / "app.py").read_text()
        assert mounts.get(str(mesh.state_dir)) == (name if keeps else None)
        assert mounts[str(mesh.catalogue)] == "./catalogue.yaml"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]


def test_everything_that_is_named_is_declared_and_the_other_way_round(compose: Any) -> None:
    used: dict[str, set[str]] = {"volumes": set(), "networks": set(), "secrets": set()}
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).is_file(), f"{name} mounts {source}"
            else:
                assert source not in used["volumes"], f"{source} belongs to one container"
                used["volumes"].add(source)
        used["networks"].update(service["networks"])
        used["secrets"].update(service.get("secrets", []))
    for kind, names in used.items():
        assert names == set(compose[kind]), kind
    for secret in used["secrets"]:
        readers = [service for service in compose["services"].values() if secret in service.get("secrets", [])]
        assert any(f"/run/secrets/{secret}" in service["environment"].values() for service in readers)


def test_every_container_has_a_health_check_limits_and_an_end(compose: Any) -> None:
    assert {"nats", "weaviate", "postgres", "prometheus"} == set(compose["services"]) - set(ours(compose))
    for name, service in compose["services"].items():
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
        assert service["restart"] == "unless-stopped"
        assert service["security_opt"] == ["no-new-privileges:true"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is open to everybody"
    for name, service in ours(compose).items():
        loaded = settings_of(compose, name)
        mesh: MeshSettings = loaded["mesh"]
        address = f"127.0.0.1:{port_of(mesh, name)}"
        assert service["healthcheck"]["test"] == ["CMD", "python", "-m", "services.runtime.probe", address]
        drain = mesh.drain_notice + mesh.drain_grace + mesh.drain_flush + loaded["gateway"].edge.drain_timeout
        assert drain <= float(service["stop_grace_period"].removesuffix("s"))


def test_ports_lead_to_where_the_services_listen(compose: Any) -> None:
    edge = settings_of(compose, "gateway")["gateway"].edge
    published = {
        f"{name}:{port.rpartition(':')[2]}" for name, service in ours(compose).items() for port in service.get("ports", [])
    }
    listening = {f"{name}:{port_of(settings_of(compose, name)['mesh'], name)}" for name in ("gateway", "batching")}
    assert published == listening | {f"gateway:{edge.port}"}
    for name, service in compose["services"].items():
        assert "mesh" in service["networks"]
        assert (len(service["networks"]) > 1) == (bool(service.get("ports")) or name == "execution"), name
    assert compose["networks"]["mesh"] == {"internal": True}


def test_containers_start_after_the_health_of_those_they_need(compose: Any) -> None:
    after: dict[str, set[str]] = {}
    for name, service in compose["services"].items():
        needs = service.get("depends_on", {})
        assert all(condition == {"condition": "service_healthy"} for condition in needs.values())
        after[name] = set(needs)
    assert set().union(*after.values()) <= set(SERVICES) | {"nats"}, "nobody has to wait for Weaviate or PostgreSQL"
    channels = re.compile(r"process\.channel\(\"(\w+)\"\)")
    for name in SERVICES:
        for callee in channels.findall((ROOT / "services" / name / "app.py").read_text()):
            assert callee in after[name], f"{name} calls {callee}"
        assert ("nats" in after[name]) == (name in NATS_USERS)
    while after:
        ready = {name for name, needs in after.items() if not needs}
        assert ready, f"{sorted(after)} wait for each other"
        after = {name: needs - ready for name, needs in after.items() if name not in ready}


# --- prometheus.yml


def test_prometheus_scrapes_each_service_where_it_shows_its_metrics(compose: Any) -> None:
    path = DEPLOY / "prometheus.yml"
    if promtool := shutil.which("promtool"):
        checked = subprocess.run([promtool, "check", "config", str(path)], capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    config = yaml.safe_load(path.read_text())
    assert set(config) == {"global", "scrape_configs"}
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert set(jobs) == {"sluice", "prometheus", "weaviate"}
    (discovery,) = jobs["sluice"]["dns_sd_configs"]
    targets = {f"{name}:{discovery['port']}" for name in discovery["names"]}
    assert targets == {f"{name}:{settings_of(compose, name)['mesh'].metrics_ports[name]}" for name in SERVICES}
    assert jobs["sluice"]["metrics_path"] == "/metrics"
    assert discovery["type"] == "A"
    weaviate = compose["services"]["weaviate"]["environment"]["PROMETHEUS_MONITORING_PORT"]
    assert jobs["weaviate"]["static_configs"] == [{"targets": [f"weaviate:{weaviate}"]}]
    mounted = [volume.split(":")[0] for volume in compose["services"]["prometheus"]["volumes"]]
    assert "./prometheus.yml" in mounted


# --- NATS


def passwords() -> dict[str, str]:
    return {name: value for name, value in variables().items() if name.startswith("NATS_")}


def test_the_server_takes_the_configuration(tmp_path: Path) -> None:
    command = [str(server_binary()), "-t", "-c", str(DEPLOY / "nats" / "nats.conf")]
    checked = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **passwords()}, timeout=30)
    assert checked.returncode == 0, checked.stderr
    lacking = {name: value for name, value in {**os.environ, **passwords()}.items() if name != "NATS_CACHING_PASSWORD"}
    assert subprocess.run(command, capture_output=True, env=lacking, timeout=30).returncode == 1, "no password, no server"


@contextlib.asynccontextmanager
async def server(directory: Path, *, open_to_all: bool = False, monitor: int = 0) -> AsyncIterator[int]:
    """A nats-server with our configuration, moved to loopback and to `directory`; `open_to_all`: without its users.

    `monitor` is the port of its monitoring, 0: a free one. Yields the port for clients.
    """
    text = (DEPLOY / "nats" / "nats.conf").read_text()
    assert text.count('store_dir: "/data"') == 1
    text = text.replace('store_dir: "/data"', f'store_dir: "{directory / "jetstream"}"')
    if open_to_all:
        text = text[: text.index("\nauthorization {")]
    directory.mkdir()
    (directory / "nats.conf").write_text(text)
    port = free_port()
    monitor = monitor or free_port()
    process = await asyncio.create_subprocess_exec(
        *(str(server_binary()), "-c", str(directory / "nats.conf"), "-a", "127.0.0.1", "-p", str(port), "-m", str(monitor)),
        env={**os.environ, **passwords()},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.02)
        yield port
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def process_of(name: str, port: int, directory: Path, log: Lines) -> AsyncIterator[Process]:
    """The process of a service, connected as the service's user. `log` hears of what the server refuses."""
    url = f"nats://{name}:{passwords()[f'NATS_{name.upper()}_PASSWORD']}@127.0.0.1:{port}"
    async with Process(name, MeshSettings(nats_url=url, state_dir=directory), log=log) as process:
        yield process


@contextlib.asynccontextmanager
async def working(workers: tuple[Callable[[], Coroutine[Any, Any, None]], ...]) -> AsyncIterator[None]:
    """Runs the workers of a service."""
    tasks = [asyncio.create_task(worker()) for worker in workers]
    try:
        yield
    finally:
        left = set(tasks)
        while left:
            # Again and again, as the process does: nats-py may swallow a cancellation.
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=0.1)


async def api(client: Client, operation: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An answer of the JetStream API."""
    reply = await client.request(f"$JS.API.{operation}", json.dumps(request).encode() if request else b"", timeout=5)
    answer: dict[str, Any] = json.loads(reply.data)
    assert "error" not in answer, answer["error"]
    return answer


async def streams_of(client: Client) -> dict[str, Any]:
    """The configuration of each stream, without what the server says of itself."""
    listed = (await api(client, "STREAM.LIST"))["streams"] or []
    return {
        info["config"]["name"]: {key: value for key, value in info["config"].items() if key != "metadata"} for info in listed
    }


async def test_the_server_syncs_each_message_and_takes_the_largest_job(tmp_path: Path) -> None:
    monitor = free_port()
    async with server(tmp_path / "nats", monitor=monitor):

        def ask(path: str) -> Any:
            with urllib.request.urlopen(f"http://127.0.0.1:{monitor}/{path}", timeout=20) as answer:
                return json.load(answer)

        jetstream = (await asyncio.to_thread(ask, "jsz?config=true"))["config"]
        assert jetstream["sync_always"] is True
        assert jetstream["max_memory"] > CachingConfig().shared.max_bytes
        (largest,) = [entry for entry in dataclasses.fields(BatchingConfig) if entry.name == "max_request_bytes"]
        (about,) = largest.metadata.values()
        assert (await asyncio.to_thread(ask, "varz"))["max_payload"] > about.maximum


async def test_the_streams_of_the_file_are_those_that_the_services_make(tmp_path: Path) -> None:
    entries = yaml.safe_load((DEPLOY / "nats" / "streams.yaml").read_text())["streams"]
    async with server(tmp_path / "nats", open_to_all=True) as port, contextlib.AsyncExitStack() as stack:
        made_by = {}
        units: tuple[tuple[str, OpenService, Any], ...] = (
            ("batching", batching.open_service, BatchingConfig()),
            ("caching", caching.open_service, CachingConfig(semantic=Semantic(enabled=False))),
            ("gateway", gateway.open_service, GatewayConfig(edge=EdgeConfig(port=0))),
        )
        for name, open_service, config in units:
            process = await stack.enter_async_context(process_of(name, port, tmp_path / "state", Lines()))
            client = await process.nats()
            before = set(await streams_of(client))
            async with open_service(config, process) as service:
                wanted = {entry["name"] for entry in entries if entry["made_by"] == name}
                async with working(service.workers), asyncio.timeout(20):
                    while not wanted <= set(await streams_of(client)):
                        await asyncio.sleep(0.02)
                for needed, ping in service.pings.items():
                    # The gateway's routing isn't there.
                    if needed != "routing":
                        await ping()
            made_by[name] = set(await streams_of(client)) - before
        made = await streams_of(client)
        assert {entry["name"]: entry["made_by"] for entry in entries} == {
            stream: name for name, streams in made_by.items() for stream in streams
        }
        for stream in made:
            await api(client, f"STREAM.DELETE.{stream}")
        for entry in entries:
            await ensure_stream(client, {"name": entry["name"], **entry["config"]})
        assert await streams_of(client) == made
        # What an operator made is what the services go on with.
        async with batching.open_service(BatchingConfig(), process) as service:
            await service.pings["nats"]()
        assert await streams_of(client) == made


async def test_the_users_of_nats_can_do_what_their_services_do(tmp_path: Path) -> None:
    log = Lines()
    async with contextlib.AsyncExitStack() as stack:
        port = await stack.enter_async_context(server(tmp_path / "nats"))
        processes = {
            name: await stack.enter_async_context(process_of(name, port, tmp_path / "state", log)) for name in NATS_USERS
        }
        replica = await stack.enter_async_context(process_of("caching", port, tmp_path / "replica", log))
        await use_the_queues(processes["batching"])
        await use_the_shared_cache(processes["caching"], replica)
        await use_the_replays(processes["gateway"])
        await use_the_revocations(processes)
        for process in (*processes.values(), replica):
            # A refusal comes before the answer to this.
            await (await process.nats()).flush(timeout=5)
        assert log.events("warning") == []


async def use_the_queues(process: Process) -> None:
    config = BatchingConfig()
    streams = JetStream(process.nats, capacity=config.queue_capacity, retention=config.retention, replicas=config.replicas)
    table = JetStreamTable(streams)
    queues = JetStreamQueues(streams, process.nats, capacity=10, ack_wait=config.ack_wait, idle=config.idle_queue)
    job = Job(
        id="job-1", tenant_id="acme", project_id="p", key_id="k", job_class="default", request=GenerateRequest(),
        submit_sha256=b"s" * 32, create_time=1.0, not_before_time=0.0, deadline_time=9e9,
    )  # fmt: skip
    revision = await table.create(job)
    assert await table.replace(job, revision) > revision
    assert await table.get("acme", "job-1") is not None
    assert [found.id async for found in table.list("acme")] == ["job-1"]
    watcher = table.watch("acme", "job-1")
    assert (await anext(watcher)).id == "job-1"
    await watcher.aclose()
    queue = QueueName("acme", "default")
    await queues.put(Ticket(job, 1))
    assert await queues.waiting() == {queue: 1}
    (delivery,) = await taken(queues, queue)
    await delivery.extend()
    await delivery.done()
    async with working((queues.move_due,)):
        await queues.put_later(Ticket(job, 2), 0.0)
        (delivery,) = await taken(queues, queue)
        assert delivery.ticket.attempt == 2
        await delivery.done()
    await queues.bury(Ticket(job, 2), Failure(Reason.INTERNAL, "no use"), 2.0)
    await queues.announce_cancel("acme", "job-1")
    async with batching.open_service(config, process) as service, working(service.workers):
        await service.pings["nats"]()
        await (await process.nats()).flush(timeout=5)


async def taken(queues: JetStreamQueues, queue: QueueName) -> list[Delivery]:
    async with asyncio.timeout(20):
        while True:
            if found := await queues.take(queue, 1):
                return found


async def use_the_shared_cache(one: Process, two: Process) -> None:
    purged: list[tuple[str, str]] = []
    tiers = [shared_tier(process, purged) for process in (one, two)]
    async with working(tuple(tier.run for tier in tiers)):
        await eventually(lambda: all(tier.is_ready for tier in tiers), 20)
        acme, key = partition("acme"), b"k" * 32
        assert tiers[0].put(acme, "default", key, answered().SerializeToString(), time.time() + 100)
        await eventually(lambda: tiers[1].knows(key), 20)
        assert await tiers[1].get(acme, "default", key) is not None
        await tiers[0].purge("acme", acme, "default")
        await eventually(lambda: bool(purged), 20)
        assert await tiers[1].get(acme, "default", key) is None


def shared_tier(process: Process, purged: list[tuple[str, str]]) -> NatsSharedTier:
    shared = CachingConfig().shared
    return NatsSharedTier(
        Settings(
            bucket=shared.bucket,
            max_bytes=shared.max_bytes,
            max_entry_bytes=shared.max_entry_bytes,
            max_age=3600,
            read_timeout=5.0,
            queue_entries=100,
            queue_bytes=1_000_000,
            known_keys=100,
        ),
        process.nats,
        process.replica_id,
        now=time.time,
        clock=time.monotonic,
        purged=lambda tenant, namespace: purged.append((tenant, namespace)),
        warn=lambda text: process.log.warning("shared tier", text=text),
    )


async def use_the_replays(process: Process) -> None:
    replays = NatsReplays(
        ReplaySettings(
            max_bytes=1_000_000,
            max_entry_bytes=1000,
            max_age=3600,
            replicas=1,
            read_timeout=5.0,
            write_timeout=5.0,
            max_waiting=10,
        ),
        process.nats,
        clock=time.monotonic,
        warn=lambda text: process.log.warning("replays", text=text),
    )
    async with working((replays.run,)), asyncio.timeout(20):
        while not await replays.keep("a" * 64, b"answer"):
            await asyncio.sleep(0.02)
        assert await replays.find("a" * 64) == b"answer"


async def use_the_revocations(processes: Mapping[str, Process]) -> None:
    heard: list[str] = []
    for name, subject in (("gateway", SUBJECT), ("batching", KEYS_REVOKED)):

        async def hear(_: Msg, name: str = name) -> None:
            heard.append(name)

        client = await processes[name].nats()
        await client.subscribe(subject, cb=hear)
        await client.flush(timeout=5)
    await (await processes["metering"].nats()).publish(KEYS_REVOKED, b"")
    await eventually(lambda: sorted(heard) == ["batching", "gateway"], 20)


FORBIDDEN: Final = {
    "gateway": [
        "sluice.jobs.acme.default",
        "sluice.keys.revoked",
        "$JS.API.STREAM.NAMES",
        "$JS.API.STREAM.PURGE.KV_sluice_replays",
    ],
    "metering": ["sluice.jobs.acme.default", "$JS.API.INFO"],
    "caching": ["sluice.jobs.acme.default", "$JS.API.STREAM.MSG.GET.KV_sluice-jobs", "$JS.API.STREAM.DELETE.KV_sluice_cache"],
    "batching": ["$JS.API.STREAM.DELETE.SLUICE_JOBS", "$JS.API.STREAM.PURGE.SLUICE_JOBS", "$KV.sluice_cache.a"],
}


async def test_the_users_of_nats_can_do_nothing_else(tmp_path: Path) -> None:
    assert set(FORBIDDEN) == set(NATS_USERS)
    async with server(tmp_path / "nats") as port:
        for name, subjects in FORBIDDEN.items():
            refused: list[str] = []

            async def refuse(error: Exception, refused: list[str] = refused) -> None:
                refused.append(str(error).lower())

            client = await nats.connect(
                f"nats://127.0.0.1:{port}", user=name, password=passwords()[f"NATS_{name.upper()}_PASSWORD"], error_cb=refuse
            )
            for subject in subjects:
                await client.publish(subject, b"")
            await eventually(lambda refused=refused, subjects=subjects: len(refused) == len(subjects))
            await client.close()
            for subject in subjects:
                assert any("permissions violation for publish" in words and subject.lower() in words for words in refused), (
                    subject
                )
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await reader.readline()).startswith(b"INFO ")
        writer.write(b'CONNECT {"user": "batching", "pass": "wrong", "verbose": false}\r\nPING\r\n')
        assert b"Authorization Violation" in await reader.readline()
        writer.close()


# --- the catalogue


def test_every_model_of_the_catalogue_has_a_price() -> None:
    path = DEPLOY / "catalogue.yaml"
    content = yaml.safe_load(path.read_text())
    book = build(content, genai.seed)
    now = time.time()
    for model in models_of(content):
        price = book.at(model.id, now)
        assert price is not None, f"{model.id} has no price in genai-prices and none in `prices`"
        free = content["models"][model.id].get("price") == "free"
        assert (price.input == price.output == 0) == free, model.id
    assert len(read_catalogue(path).models) == len(content["models"])
