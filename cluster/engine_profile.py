"""How long the engines should take: what the router's predictions start from.

What is configured goes first: a built-in profile by its name, or a file of one's own. Else
simulated engines take the times that they are told, and of others the model's and the device's
constants tell (`engine.roofline`). The router corrects all of it by what the engines do.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final, get_args

import yaml

from cluster.config import Config
from cluster.engine_defaults import is_cpu_install
from engine.devices import CPU, GPUS, H100, Device
from engine.profiles import PROFILES
from engine.roofline import ModelSize, roofline
from engine.spec import EngineTimes, PoolTimes, Role, SimulatedTiming
from protos.errors import ConfigError, nearest

_STEP_TOKENS: Final = 8192
"""Both engines' default; vLLM's on large GPUs."""
_BLOCK_TOKENS: Final = 16
_CPU_BLOCK_TOKENS: Final = 128
_FILES: Final = (".yaml", ".yml", ".json")
_LIKE_ANY: Final = "llama-3.1-8b-h100"
"""Where a model's constants say too little."""

logger = logging.getLogger(__name__)


def check(config: Config) -> None:
    """Raises ConfigError for a profile that is none."""
    for role in get_args(Role):
        _configured(config, role)


def times(config: Config, model: Path, accelerators: Collection[str]) -> PoolTimes:
    """As configured, or else by the constants of the model, whose directory this is, and of what
    Ray's machines say that they have. Raises ConfigError for a profile that is none."""
    device: Device | None = None

    def engine(role: Role) -> EngineTimes:
        nonlocal device
        arguments = config.engine_args_of(role)
        step_tokens = int(arguments.get("max_num_batched_tokens") or _STEP_TOKENS)
        timing = _configured(config, role)
        if timing is None:
            device = device or (CPU if is_cpu_install() else _gpu(accelerators))
            timing = _estimated(config, role, model, device)
        return EngineTimes(timing, step_tokens)

    prefill, decode = engine("prefill"), engine("decode")
    # A transfer is as fast as the slower of its ends.
    block_s = max(each.timing.transfer_block_s for each in (prefill, decode))
    return PoolTimes(
        *(
            replace(each, timing=replace(each.timing, transfer_block_s=block_s))
            for each in (prefill, decode)
        )
    )


def _configured(config: Config, role: Role) -> SimulatedTiming | None:
    own = config.pool(role).engine_profile
    name = own or config.router.engine_profile
    if name is not None:
        key = f"{role}.engine_profile" if own else "router.engine_profile"
        profile = PROFILES.get(name)
        return _read(key, name) if profile is None else profile.timing(_block_tokens(config))
    return config.simulated.timing() if config.engine == "simulated" else None


def _estimated(config: Config, role: Role, model: Path, device: Device) -> SimulatedTiming:
    arguments = config.engine_args_of(role)
    # What engines quantise as they load it; a checkpoint's own goes before.
    loaded = {"quantization_config": {"quant_method": arguments.get("quantization")}}
    content = json.loads((model / "config.json").read_text(encoding="utf-8"))
    size = ModelSize.read(loaded | content)
    if size is None:
        return PROFILES[_LIKE_ANY].timing(_block_tokens(config))
    devices = int(arguments.get("tensor_parallel_size") or 1)
    return roofline(size, device, devices, _block_tokens(config))


def _gpu(accelerators: Collection[str]) -> Device:
    """The slowest of those that are known: which engine gets which is not."""
    known = [GPUS[name] for name in accelerators if name in GPUS]
    if known:
        return min(known, key=lambda gpu: gpu.memory_bytes_s)
    logger.warning(
        "How fast %s is, is not known, so placement's first predictions are of an H100; "
        "router.engine_profile can name what was measured.",
        ", ".join(sorted(accelerators)) or "the engines' GPU",
    )
    return H100


def _block_tokens(config: Config) -> int:
    on_cpu = config.engine == "vllm" and is_cpu_install()
    default = _CPU_BLOCK_TOKENS if on_cpu else _BLOCK_TOKENS
    return int(config.engine_args_of("decode").get("block_size") or default)


def _read(setting: str, name: str) -> SimulatedTiming:
    path = Path(name).expanduser()
    if path.suffix not in _FILES and "/" not in name and not path.exists():
        raise ConfigError(
            f"{setting}: there is no profile {name!r}; did you mean "
            f"{nearest(name, PROFILES)!r}? There are {', '.join(PROFILES)}; or name a YAML file."
        )
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{setting}: {path} can't be read: {reason}") from None
    keys = [each.name for each in fields(SimulatedTiming)]
    if not isinstance(values, dict) or sorted(values) != sorted(keys):
        raise ConfigError(f"{setting}: {path} must hold {', '.join(keys)}.")
    return SimulatedTiming(**{key: _seconds(setting, path, key, values[key]) for key in keys})


def _seconds(setting: str, path: Path, key: str, value: object) -> float:
    # YAML takes 2e-05 for a text, as it has no point.
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"{setting}: {key} in {path} must be seconds, 0 or more, not {value!r}.")
    return seconds
