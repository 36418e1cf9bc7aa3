"""Makes the browser image, if the one that is there isn't of this recipe already.

The recipe is `images/browser/`. On what it is built depends on what the engine can get, best first:

1. Ubuntu 22.04, from a registry;
2. Debian 12, from a registry;
3. Debian 12, bootstrapped from Debian packages by mmdebstrap, where no registry can be reached.

A base that can be had but that the recipe fails on is given up for the next one. The finished image is labelled with
a hash of its recipe (so that it is built once), and with what really runs in it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from provisioner.docker_hosts.builds import build_image, image_bytes, import_root, pack_context, read_json
from provisioner.docker_hosts.hosts import LOCAL_ENGINE, DockerHost
from provisioner.docker_hosts.images import ImageInfo, check_offered, find_image, pull_image
from provisioner.errors import DockerError, MachineuseError, SetupError, UnknownImage
from provisioner.toolchain.packages import install_packages
from provisioner.toolchain.progress import Step
from stacks.spec import BROWSER_IMAGE, LABEL_PREFIX

RECIPE = Path(__file__).resolve().parent.parent / "images" / "browser"
CONTENT_LABEL = f"{LABEL_PREFIX}content"
BASE_LABEL = f"{LABEL_PREFIX}base"
CHROMIUM_LABEL = f"{LABEL_PREFIX}chromium"

_BOOTSTRAPPED_BASE = "machineuse/base:debian-12"
_DPKG_SETTINGS = "dpkg.cfg"
_REGISTRY_BASES = ("ubuntu:22.04", "debian:bookworm-slim")
_REGISTRY_TIMEOUT_S = 10.0
_BOOTSTRAP_TIMEOUT_S = 900.0
_SUITE = "bookworm"
_MERGED_USR = "/usr/share/mmdebstrap/hooks/merged-usr"  # else the base brings all of Perl, to merge /usr once
_VERSIONS = "/usr/share/machineuse/versions.json"
_NOT_IN_IMAGE = frozenset({"seccomp.json"})
_PROXIES = ("http_proxy", "https_proxy", "no_proxy")

OnProgress = Callable[[str], None]


def ensure_browser_image(*, on_progress: OnProgress) -> str:
    """Build the browser image on this machine's engine, unless the one there has this very recipe; say what it is.

    Takes a second when it is there and one to three minutes when it isn't. The tag moves only once the new image is
    whole; the old image stays, because instances and snapshots may rest on it. Raises `SetupError` when no base can
    be had or the recipe fails on all of them, `NodeUnreachable` when the engine doesn't answer.
    """
    files = read_recipe()
    content = hash_recipe(files)
    engine = DockerHost(LOCAL_ENGINE)
    try:
        image = find_image(engine, BROWSER_IMAGE)
        if image is None or image.labels.get(CONTENT_LABEL) != content:
            _build(engine, files, content=content, on_progress=on_progress)
            image = find_image(engine, BROWSER_IMAGE)
        if image is None:
            raise SetupError(f"The browser image {BROWSER_IMAGE} was built, but the engine doesn't have it.")
        return _describe(image, size_bytes=image_bytes(engine, BROWSER_IMAGE))
    finally:
        engine.close()


def read_recipe() -> dict[str, bytes]:
    """Return the files that the image is built from, by their path in the build context."""
    names = (path.relative_to(RECIPE) for path in sorted(RECIPE.rglob("*")) if path.is_file())
    return {
        name.as_posix(): (RECIPE / name).read_bytes()
        for name in names
        if name.name not in _NOT_IN_IMAGE and not any(part.startswith((".", "__pycache__")) for part in name.parts)
    }


def hash_recipe(files: dict[str, bytes]) -> str:
    """Return the recipe's hash: the same for the same names and contents, whatever their dates."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Base:
    """A way to a base image: `provide` makes it available or raises, and returns the image's name."""

    name: str
    provide: Callable[[], str]


def _build(engine: DockerHost, files: dict[str, bytes], *, content: str, on_progress: OnProgress) -> None:
    context = pack_context(files)
    proxies = {name: value for name in _PROXIES if (value := os.environ.get(name))}
    failures: list[str] = []
    for base in _bases(engine, files[_DPKG_SETTINGS], on_progress=on_progress):
        try:
            name = base.provide()
            on_progress(f"Building on {base.name}")
            built = build_image(engine, context, build_args={"BASE": name, **proxies}, report=on_progress)
            versions = read_json(engine, built, path=_VERSIONS)
        except (DockerError, UnknownImage, SetupError) as error:
            # Also NodeUnreachable: a registry behind a wall looks like that. A dead engine fails with every base.
            on_progress(f"Not on {base.name}: {error.message}")
            failures.append(f"{base.name}: {error.explain()}\n{error.detail or ''}".rstrip())
            last: MachineuseError = error
            continue
        labels = {CONTENT_LABEL: content, BASE_LABEL: versions["base"], CHROMIUM_LABEL: versions["chromium"]}
        lines = [f"FROM {built}", *(f'LABEL {name}="{value}"' for name, value in labels.items())]
        build_image(engine, pack_context({"Dockerfile": "\n".join(lines).encode()}), tag=BROWSER_IMAGE)
        return
    raise SetupError(
        "The browser image could not be built on any base.",
        detail="\n\n".join(failures),
        resolution=last.resolution
        or "Give the Docker engine access to an image registry, or run as root on Debian with its packages reachable.",
    ) from last


def _bases(engine: DockerHost, dpkg_settings: bytes, *, on_progress: OnProgress) -> Sequence[_Base]:
    def from_registry(name: str) -> Callable[[], str]:
        def provide() -> str:
            if find_image(engine, name) is None:
                on_progress(f"Asking for {name}")
                check_offered(DockerHost(engine.url, slow_timeout_s=_REGISTRY_TIMEOUT_S), name)
                pull_image(engine, name, report=on_progress)
            return name

        return provide

    def bootstrapped() -> str:
        tag = f"{_BOOTSTRAPPED_BASE}-{hashlib.sha256(dpkg_settings).hexdigest()[:8]}"
        if find_image(engine, tag) is None:
            _bootstrap(engine, dpkg_settings, tag=tag, on_progress=on_progress)
        return tag

    pulled = [_Base(name, from_registry(name)) for name in _REGISTRY_BASES]
    return [*pulled, _Base("Debian 12, bootstrapped from packages", bootstrapped)]


class _Relay(Step):
    """A step within the caller's step: its signs of life are the caller's."""

    def __init__(self, on_progress: OnProgress) -> None:
        super().__init__("Browser image", write=on_progress)
        self._relay = on_progress

    def say(self, text: str) -> None:
        self._relay(text)

    def on_progress(self, text: str) -> None:
        self._relay(text.strip())


def _bootstrap(engine: DockerHost, dpkg_settings: bytes, *, tag: str, on_progress: OnProgress) -> None:
    step = _Relay(on_progress)
    if shutil.which("mmdebstrap") is None:
        install_packages(step, ["mmdebstrap"], reason="mmdebstrap, which makes a base image without a registry,")
    with tempfile.TemporaryDirectory(prefix="machineuse-base-") as directory:
        archive = Path(directory) / "base.tar"
        settings = Path(directory) / _DPKG_SETTINGS
        settings.write_bytes(dpkg_settings)
        command = [
            "mmdebstrap",
            "--variant=minbase",
            '--aptopt=Acquire::Languages "none"',
            f"--dpkgopt={settings}",
            f"--hook-dir={_MERGED_USR}",
            "--include=usr-is-merged",
            _SUITE,
            str(archive),
            *_host_mirrors(),
        ]
        on_progress("Bootstrapping Debian 12 from packages")
        step.run(command, what="mmdebstrap", timeout_s=_BOOTSTRAP_TIMEOUT_S)
        on_progress(f"Importing {tag}")
        import_root(engine, archive, tag=tag)


def _host_mirrors() -> list[str]:
    """Return apt source lines with this host's own Debian mirrors, or nothing, which makes mmdebstrap use its default.

    A host of another Debian release has the same mirrors; a host that isn't Debian has none.
    """
    form = "--format=$(ORIGIN) $(LABEL) $(REPO_URI)"
    try:
        asked = subprocess.run(
            ["apt-get", "indextargets", form], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    mirrors: dict[str, str] = {}
    for words in (line.split() for line in asked.stdout.splitlines()):
        if len(words) == 3 and words[0] == "Debian":
            mirrors.setdefault(words[1], words[2])
    if "Debian" not in mirrors:
        return []
    lines = [f"deb {mirrors['Debian']} {suite} main" for suite in (_SUITE, f"{_SUITE}-updates")]
    if "Debian-Security" in mirrors:
        lines.append(f"deb {mirrors['Debian-Security']} {_SUITE}-security main")
    return lines


def _describe(image: ImageInfo, *, size_bytes: int) -> str:
    chromium = image.labels.get(CHROMIUM_LABEL, "unknown").partition("-")[0]
    base = image.labels.get(BASE_LABEL, "unknown").title()
    return f"{BROWSER_IMAGE}: Chromium {chromium} on {base}, {size_bytes / 1e6:.0f} MB"
