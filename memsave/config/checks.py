"""Checks of a whole config, beyond those of single fields and groups."""

from memsave.config.errors import ConfigError
from memsave.config.fields import check_fields, sections
from memsave.config.known_keys import listed
from memsave.config.schema import MODES, CanariesAudit, Config, GhostPrivacy


def check(config: Config) -> None:
    """Raise ConfigError for the first fault.

    The order is: the task's data and model classes, the constraint of each field, the `validate()` of each section,
    combinations of groups, `validate()` of the task, and what `vary` needs.
    """
    task = config.task.definition(config)
    task.check_groups()
    check_fields(config)
    for _, section in sections(config):
        getattr(section, "validate", lambda: None)()
    _check_privacy(config)
    _check_audit(config)
    _check_memory(config)
    _check_sharding(config)
    _check_compilation(config)
    task.validate()
    _check_variation(config)


def _check_privacy(config: Config) -> None:
    privacy, trainer = config.privacy, config.trainer
    if not isinstance(privacy, GhostPrivacy):
        return
    if trainer.patience:
        raise ConfigError(
            "trainer.patience would choose the model by private validation scores, which epsilon does not cover; "
            "give trainer.patience=0"
        )
    if trainer.precision == "float16":
        raise ConfigError("trainer.precision=float16 scales losses, which clipping would undo; give bfloat16")
    if privacy.option == "direct" and trainer.micro_batch_size != 1:
        raise ConfigError("privacy.passes=direct processes one example at a time; give trainer.micro_batch_size=1")


def _check_audit(config: Config) -> None:
    if not isinstance(config.audit, CanariesAudit):
        return
    if not isinstance(config.privacy, GhostPrivacy):
        raise ConfigError("audit=canaries audits the noise of a private run; give privacy=ghost, or audit=none")
    if config.trainer.parallel == "fsdp":
        raise ConfigError(
            "audit=canaries adds whole gradients, which trainer.parallel=fsdp does not have; give trainer.parallel=ddp"
        )


def _check_memory(config: Config) -> None:
    memory = config.memory
    if memory.mode == "auto" and memory.levels is None and config.budget is None:
        raise ConfigError("memory=auto needs a budget, as in budget=8GiB or budget=auto")
    if memory.mode == "auto" and config.vary is not None:
        raise ConfigError(f"memory=auto chooses for one size; leave vary={config.vary} out, or give another memory=")
    modes = config.adapter_modes
    for mode in (memory.mode, *config.profiler.compare):
        if mode in MODES and mode not in modes:
            private = "" if mode not in config.adapter.memory_modes else f" and privacy={config.privacy.option}"
            raise ConfigError(
                f"adapter={config.adapter.kind} does not work with memory={mode}{private}; give "
                f"memory={listed(modes)}, and profiler.compare=[{','.join(modes)}]"
            )


def _check_sharding(config: Config) -> None:
    if config.trainer.parallel != "fsdp":
        return
    privacy = config.privacy
    if isinstance(privacy, GhostPrivacy) and privacy.passes in (1, "direct"):
        raise ConfigError(
            f"trainer.parallel=fsdp sums gradients before privacy.passes={privacy.passes} has clipped them; give "
            f"privacy.passes=auto, or trainer.parallel=ddp"
        )
    if config.memory.engine == "fused":
        raise ConfigError(
            "memory.engine=fused reads weights that trainer.parallel=fsdp has not gathered; give memory.engine=auto"
        )
    if config.memory.offload:
        raise ConfigError(
            f"memory.offload=[{','.join(config.memory.offload)}] would copy the whole parameters that "
            f"trainer.parallel=fsdp gathers and frees; give memory.offload=[] or trainer.parallel=ddp"
        )
    if config.trainer.precision == "float16":
        raise ConfigError("trainer.precision=float16 scales gradients that are whole; give bfloat16 with fsdp")


def _check_compilation(config: Config) -> None:
    if not config.trainer.compile:
        return
    if config.privacy.option != "none":
        raise ConfigError(
            f"trainer.compile=true compiles each block as a whole, and privacy={config.privacy.option} needs the "
            f"layers inside it; give trainer.compile=false"
        )
    if config.memory.engine == "fused":
        raise ConfigError(
            "memory.engine=fused recomputes blocks by its own code, which is not compiled; give memory.engine=hooks"
        )
    if config.trainer.parallel == "fsdp":
        raise ConfigError("trainer.compile=true was not tried with trainer.parallel=fsdp; give trainer.parallel=ddp")


def _check_variation(config: Config) -> None:
    if config.vary is not None and config.budget is None:
        raise ConfigError(f"vary={config.vary} needs a budget, as in budget=16GiB or budget=auto")
    if config.vary == "batch" and config.privacy.option == "direct":
        raise ConfigError(
            "vary=batch tries several examples at once, but privacy=direct processes one; give another privacy="
        )
