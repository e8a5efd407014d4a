"""The unmodified `openai` npm package against the edge."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from services.cli.demonstration import LOCAL_MODEL
from tests.running import Running
from tools.externals import node

HERE = Path(__file__).parent / "node"


def test_chat_stream_tools_schema_models_and_errors(mesh: Running) -> None:
    ready = mesh.ready
    assert (HERE / "node_modules" / "openai").is_dir(), "`make tools` installs the npm package"
    done = subprocess.run(
        [node(), "chat.mjs", ready.http, ready.key, LOCAL_MODEL, "echo/echo"],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    assert "Paris" in seen["chat"]
    assert seen["requestId"]
    assert seen["stream"]["pieces"] >= 1
    assert seen["stream"]["usage"]["completion_tokens"] == 16
    assert len(seen["stream"]["text"]) > 10
    assert seen["tool"]["name"] == "weather"
    assert json.loads(seen["tool"]["arguments"]) == {"city": "Oslo"}
    assert isinstance(seen["schema"]["name"], str)
    assert {LOCAL_MODEL, "echo/echo", "policy/default"} <= set(seen["models"])
    assert seen["embedding"] == 32
    assert seen["errors"] == {
        "model": {"kind": "NotFoundError", "status": 404, "code": "model_not_found"},
        "request": {"kind": "BadRequestError", "status": 400, "code": "request_invalid"},
        "field": {"kind": "BadRequestError", "status": 400, "code": "field_unsupported"},
        "key": {"kind": "AuthenticationError", "status": 401, "code": "key_invalid"},
    }
