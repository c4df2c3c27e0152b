"""Names of the experts of a mixture in the files of an adapter.

PEFT adapts a parameter that holds the weights of all experts (`target_parameters`) by wrapping its
module, and a second parameter of that module by wrapping the wrapper. So the file does not name
the parameter: the outermost wrapper has the name of the module, the next one in it has
`.base_layer` after it. The innermost parameter is the one that the module declares first
(`ParamWrapper` in peft/tuners/lora/layer.py and `_inject_parameters` in tuners_utils.py of PEFT
0.21). transformers declares what comes in before what goes out.
"""

from collections.abc import Collection, Iterable

DECLARED_ORDER = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
INNER = ".base_layer"  # after the name of a module, for the wrapper inside another one


def file_names(experts: Iterable[str]) -> dict[str, str]:
    """Name in the file of each adapted parameter, such as `model.layers.0.mlp.experts.base_layer`
    for `model.layers.0.mlp.experts.gate_up_proj`."""
    parameters: dict[str, list[str]] = {}
    for name in experts:
        owner, _, parameter = name.rpartition(".")
        parameters.setdefault(owner, []).append(parameter)
    names = {}
    for owner, found in parameters.items():
        for depth, parameter in enumerate(sorted(found, key=_declared, reverse=True)):
            names[f"{owner}.{parameter}"] = owner + depth * INNER
    return names


def parameter_names(modules: Collection[str], target_parameters: Collection[str]) -> dict[str, str]:
    """The inverse: name of the parameter for each module in a file that adapts experts.

    Modules whose parameters do not match in number are left out.

    Args:
        modules: names in the file.
        target_parameters: those of the PEFT config, which name the end of a parameter's name.
    """
    depths: dict[str, int] = {}
    for module in modules:
        owner = module.split(INNER)[0]
        depths[owner] = depths.get(owner, 0) + 1
    names: dict[str, str] = {}
    for owner, count in depths.items():
        found = {parameter for target in target_parameters if (parameter := _parameter_of(owner, target))}
        by_file_name = {file: name for name, file in file_names(f"{owner}.{name}" for name in found).items()}
        if len(found) == count and by_file_name.keys() <= set(modules):
            names |= by_file_name
    return names


def unnamed_parameters(modules: Iterable[str]) -> list[str]:
    """Problems of modules that adapt parameters of which `parameter_names` knows no name."""
    return [
        f"{module} is of a parameter of {module.split(INNER)[0]}, and target_parameters does not "
        "name as many parameters of it as the file adapts"
        for module in modules
        if module.endswith(INNER)
    ]


def _parameter_of(owner: str, target: str) -> str | None:
    """Name of the parameter of a module that a target names, if it does.

    A target without a module, as PEFT makes them for Mixtral, is one of experts.
    """
    module, _, parameter = target.rpartition(".")
    if module:
        return parameter if f".{owner}".endswith(f".{module}") else None
    return parameter if "expert" in owner.rpartition(".")[2] else None


def _declared(parameter: str) -> tuple[int, str]:
    known = parameter in DECLARED_ORDER
    return (DECLARED_ORDER.index(parameter) if known else -1, parameter)
