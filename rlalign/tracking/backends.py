"""Where a run shows beside its directory: wandb, TensorBoard, trackio, a Prometheus endpoint. Each has one file of its own."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rlalign.config.sections import BACKENDS
from rlalign.tracking.backend_contract import Backend, Places, Start

if TYPE_CHECKING:
    from rlalign.config import TrackingConfig

ENDPOINT_NEEDS = ("prometheus_client", "prometheus")


def places_of(config: TrackingConfig) -> Places:
    """What the configuration asks for."""
    return Places(
        backends=tuple(config.backends),
        wandb_mode=config.wandb,
        group=config.group,
        job_type=config.job_type,
        tags=tuple(config.tags),
        port=config.prometheus_port,
        host=config.prometheus_host,
    )


def require_installed(places: Places) -> None:
    """Raises ValueError naming the extra for a backend whose package is missing, before anything of the run is touched."""
    used = [name for name in places.backends if not (name == "wandb" and places.wandb_mode == "disabled")]
    wanted = [(f"tracking.backends={name}", *BACKENDS[name]) for name in used]
    if places.port:
        wanted.append((f"tracking.prometheus_port={places.port}", *ENDPOINT_NEEDS))
    for setting, package, extra in wanted:
        if find_spec(package) is None:
            raise ValueError(
                f"{setting} needs the package {package}: pip install 'rlalign[{extra}]', or change the setting"
            )


def endpoint(places: Places, *, name: str, project: str) -> dict[str, Backend]:
    """The Prometheus endpoint, where one is asked for. Raises ValueError for a port that cannot be had."""
    if not places.port:
        return {}
    from rlalign.tracking.prometheus import Endpoint

    about = {"name": name, "project": project, "group": places.group}
    return {"prometheus": Endpoint(host=places.host, port=places.port, run=about)}


def start(backend: str, given: Start) -> tuple[Backend | None, str]:
    """The backend, None where its own settings disable it, and what a reader must know about how it started."""
    if backend == "wandb" and given.places.wandb_mode == "disabled":
        return None, ""  # without the package, which is not asked for then
    return import_module(f"rlalign.tracking.{backend}_run").start(given)
