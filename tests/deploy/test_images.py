"""What the image of the API runs, run here: its script in a clean virtual environment, from the files that it copies."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTAINERFILE = ROOT / "deploy" / "api.Containerfile"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_api_s_image_serves_without_torch_or_ray(tmp_path: Path) -> None:
    text = CONTAINERFILE.read_text(encoding="utf-8")
    source = tmp_path / "src"
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for name in line.split()[:-1]:
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, target)
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "environment")], check=True)
    (command,) = re.findall(r"^RUN (\S+ \S+)", text, re.MULTILINE)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NAS_", "PYTHON"))}
    subprocess.run(command.split(), cwd=source, env={**clean, "PYTHON": str(python)}, check=True)
    shutil.rmtree(source)

    listed = subprocess.run([str(python), "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True).stdout.lower()
    assert not {"torch", "ray", "transformers", "optuna", "lm_eval"} & {line.split("==")[0] for line in listed.splitlines()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (module,) = re.findall(r'^ENTRYPOINT \["python", "-m", "(\w+)"\]$', text, re.MULTILINE)
    environment = {**clean, "NAS_DATA": str(tmp_path / "data"), "NAS_HOST": "127.0.0.1", "NAS_PORT": str(port)}
    (tmp_path / "data").mkdir()
    service = subprocess.Popen([str(python), "-m", module], cwd="/", env=environment)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
            deadline = time.monotonic() + 60
            while True:
                try:
                    assert client.get("/healthz").status_code == 200
                    break
                except httpx2.TransportError:
                    assert service.poll() is None, "the API ended"
                    assert time.monotonic() < deadline, "the API does not answer"
                    time.sleep(0.2)
            for path in ("/", "/v1/searches", "/openapi.json"):
                assert client.get(path).status_code == 200, path
    finally:
        service.terminate()
        assert service.wait(timeout=30) in (0, -signal.SIGTERM)
