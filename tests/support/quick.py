"""Less work in tests, and in the processes that they start, where it is not what they test."""

import copy
import dataclasses
from importlib.util import find_spec

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore


def make_quick(patch):
    """Apply the functions below to this process, by a `pytest.MonkeyPatch`."""
    compose_choices_once(patch)
    calibrate_by_small_steps(patch)
    draw_coarse_pictures(patch)


def calibrate_by_small_steps(patch):
    """Small steps to calibrate a plan, and few: most tests need some rates, and not those of this machine."""
    from memsave.profiler import seconds
    from memsave.tasks.segmentation import definition

    patch.setattr(seconds, "TIMED_STEPS", 1)
    patch.setattr(definition, "SMALL_CROP", 16)


def draw_coarse_pictures(patch):
    """Pictures of few pixels: to draw those of a tiny run takes half of its time."""
    if find_spec("matplotlib") is None:  # it is an optional dependency
        return
    from matplotlib.figure import Figure

    original = Figure.savefig
    patch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: original(figure, *args, **{**kwargs, "dpi": 50}))


def compose_choices_once(patch):
    """Keep the config of each combination of options and apply other overrides to a copy: Hydra needs 0.2 s for one."""
    create, merge = config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list
    lists, configs = {}, {}

    def create_once(repo, config_name, overrides_list, **options):
        choices = [each for each in overrides_list if _chooses(each, repo)]
        texts = tuple(each.input_line for each in choices)
        key = (config_name, texts, *options.items(), *(each.path for each in repo.get_sources()))
        if key not in lists:
            lists[key] = create(repo, config_name, overrides_list=choices, **options)
        rest = [each for each in overrides_list if each not in choices and not each.is_sweep_override()]
        return dataclasses.replace(lists[key], config_overrides=rest)

    def merge_once(self, defaults, repo):
        if id(defaults) not in configs:  # `lists` keeps the object, and so its id
            configs[id(defaults)] = merge(self, defaults, repo)
        return copy.deepcopy(configs[id(defaults)])

    patch.setattr(ConfigStore, "__deepcopy__", lambda self, memo: self, raising=False)  # it copies what it gives away
    patch.setattr(config_loader_impl, "create_defaults_list", create_once)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", merge_once)


def _chooses(override, repo):
    return (
        not override.is_sweep_override()
        and not isinstance(override.value(), dict)
        and repo.group_exists(override.key_or_group)
    )
