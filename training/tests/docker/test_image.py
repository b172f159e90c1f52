"""The image, and what is not in it."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from support.composed import MARK, build, docker

pytestmark = [pytest.mark.timeout(1800)]


def in_image(image, *command: str) -> str:
    return docker("run", "--rm", "--network", "none", image.name, *command).stdout


def test_the_image_builds_from_a_context_under_2_mb(image):
    sizes = re.findall(r"transferring context: ([\d.]+)(kB|MB|B) ", image.log)
    factors = {"B": 1, "kB": 1e3, "MB": 1e6}
    assert sizes
    assert max(float(number) * factors[unit] for number, unit in sizes) < 2e6


def test_build_says_size_and_time(image):
    assert re.search(r"Built lora-trainer:tested in \d+ s, \d+\.\d\d GB", image.log)


def test_the_image_is_described_and_runs_as_user_1000(image):
    config = json.loads(docker("image", "inspect", image.name).stdout)[0]["Config"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["/usr/bin/tini", "--", "docker-entrypoint.sh"]
    assert "8080/tcp" in config["ExposedPorts"]
    assert config["Healthcheck"]["Test"] == ["CMD", "docker-entrypoint.sh", "healthcheck"]
    assert config["Labels"]["org.opencontainers.image.title"] == "lora-trainer"
    assert config["Labels"]["lora-trainer.stack"] == "cpu"


def test_the_image_has_no_compiler_no_pip_and_no_package_cache(image):
    script = (
        "for name in cc gcc g++ clang make ld pip pip3; do command -v $name; done; "
        "ls /opt/venv/bin | grep -E '^pip'; "
        "find /var/cache/apt /var/lib/apt/lists /root /tmp -type f -size +0 2>/dev/null"
    )
    assert in_image(image, "bash", "-c", f"{script}; true") == ""


def test_nothing_in_the_image_raises_rights_or_installs_packages(image):
    script = (
        "find / -xdev -type f -perm /6000; "
        "for name in apt apt-get perl su sudo mount; do "
        'path="$(command -v $name)" && [ -u "$path" -o "${name#apt}" != "$name" -o $name = perl ] '
        '&& echo "$path"; done; find / -xdev -name "perl*" -type d -not -path "*/doc/*"'
    )
    assert in_image(image, "bash", "-c", f"{script}; true") == ""


def test_torch_is_in_a_layer_of_its_own(image):
    """A changed lock of other packages does not ship torch and CUDA again."""
    lines = docker("history", "--format", "{{.CreatedBy}}", image.name).stdout.splitlines()
    assert len([line for line in lines if line.startswith("COPY /opt/venv")]) == 3


def test_a_rebuild_without_network_gives_the_same_layers(image, tmp_path):
    """The cache holds every package of unchanged locks, and no time or order shows in a layer.

    But for one: Docker dates the marks of what is removed, apt and perl.
    """
    again = build("lora-trainer:again", tmp_path, "none")
    assert again.returncode == 0, again.stderr[-6000:]
    first, second = (
        json.loads(docker("image", "inspect", name).stdout)[0]["RootFS"]["Layers"]
        for name in (image.name, "lora-trainer:again")
    )
    assert len(first) == len(second)
    assert sum(one != other for one, other in zip(first, second, strict=True)) <= 1


def test_train_lora_py_is_executable_in_the_working_folder(image):
    for command in (("./train_lora.py",), ("python", "train_lora.py")):
        assert "Usage:" in in_image(image, *command, "--help")


def test_build_secrets_are_in_no_layer_and_not_in_the_history(image):
    assert MARK not in docker("history", "--no-trunc", image.name).stdout
    assert MARK not in docker("image", "inspect", image.name).stdout
    saving = subprocess.Popen(["docker", "save", image.name], stdout=subprocess.PIPE)
    assert saving.stdout is not None
    with saving:
        tail, needle = b"", MARK.encode()
        while block := saving.stdout.read(1 << 22):
            assert needle not in tail + block
            tail = block[-len(needle) :]
    assert saving.returncode == 0


def test_other_commands_pass_through(image):
    assert in_image(image, "echo", "two words").strip() == "two words"
    assert json.loads(in_image(image, "schema"))["type"] == "object"


def test_the_embedded_model_and_the_demo_dataset_are_inside(image):
    assert in_image(image, "preflight").strip() == ""
    assert "train.jsonl" in in_image(image, "ls", "/workspace/datasets/demo")
