"""Check whether an adapter can be exported to mlx-lm (mlx-lm 0.32.2)."""

from . import mlx_lm
from .adapter import Adapter
from .base_config import BaseConfig, text_settings
from .compatibility_report import CompatibilityReport, advise_merge, note_unknown_base, replaced_error

# Settings of the base that count the blocks of a model.
_BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def check_mlx(adapter: Adapter, name: str, base_config: BaseConfig | None, report: CompatibilityReport) -> None:
    """Add what mlx-lm has no place for."""
    models = list(mlx_lm.MODELS.values())
    kind = "mlx-lm"
    if base_config is None:
        note_unknown_base(adapter, report)
    elif model := find_model(base_config):
        models, kind = [model], f"mlx-lm's {base_config['model_type']}"
    else:
        report.errors.append(
            f"its base is of type {base_config.get('model_type')}, and adapters are exported to mlx-lm for those of "
            f"{', '.join(mlx_lm.MODELS)}: {advise_merge(name)}, if mlx-lm has such models"
        )
        return
    if adapter.replaced:
        report.errors.append(replaced_error(adapter, "mlx-lm", name))
    unknown = [[module for module in adapter.modules if not model.layers_of(module)] for model in models]
    if all(unknown):
        report.errors.append(f"{kind} has no layer for {min(unknown, key=len)[0]}: {advise_merge(name)}")
    if base_config is not None:
        _check_base(adapter, name, base_config, report)
        report.notes.extend(base_notes(base_config))
    if report.errors:
        return
    bases = f", on a base of {', '.join(mlx_lm.MODELS)}" if base_config is None else ""
    report.notes.append(
        f"mlx-lm loads a folder (`python cli.py export {name} --to mlx --out {name}-mlx`){bases}; untried on a Mac"
    )


def find_model(base_config: BaseConfig) -> mlx_lm.MlxModel | None:
    """The layers of a base in mlx-lm, by its config.json; None if nothing is exported for it."""
    return mlx_lm.MODELS.get(str(base_config.get("model_type")))


def count_blocks(base_config: BaseConfig) -> int:
    """Number of blocks of a model; 0 where its config.json does not tell."""
    settings = text_settings(base_config)
    return next((int(settings[key]) for key in _BLOCK_COUNTS if settings.get(key)), 0)


def _check_base(adapter: Adapter, name: str, base_config: BaseConfig, report: CompatibilityReport) -> None:
    """Add what mlx-lm reads otherwise in the config of the base."""
    settings = text_settings(base_config)
    tied = base_config.get("tie_word_embeddings", settings.get("tie_word_embeddings"))
    if "lm_head" in adapter.targets and tied is not False:
        report.errors.append(
            f"mlx-lm has no lm_head where the embeddings are the output head, which config.json of the base does not "
            f"exclude (tie_word_embeddings): {advise_merge(name)}"
        )
    hidden = settings.get("hidden_size")
    for module in adapter.experts:
        if hidden is not None and hidden != adapter.layer_size(module)[1:][module.endswith("down_proj")]:
            report.errors.append(
                f"A and B of {module} are for weights with sides in the other order, as older versions of PEFT have "
                f"them: {advise_merge(name)}"
            )
            break
    quantization = base_config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "bitsandbytes":
        report.errors.append(
            f"mlx-lm does not load a base whose weights are quantized by bitsandbytes: {advise_merge(name)}"
        )


def base_notes(base_config: BaseConfig) -> list[str]:
    """Sentences about what mlx-lm 0.32 reads otherwise in the files of a base."""
    notes = []
    kind, settings, model = base_config.get("model_type"), text_settings(base_config), find_model(base_config)
    if kind == "gpt2":
        notes.append(
            "mlx-lm loads weights of GPT-2 that are named h.0.attn, as in openai-community/gpt2, not transformer.h.0.attn, "
            "as transformers saves them"
        )
    if kind == "gpt_oss" and not isinstance(base_config.get("quantization_config"), dict):
        notes.append("mlx-lm loads gpt-oss in MXFP4 or as converted for it, not as transformers saves it")
    is_nested = isinstance(settings.get("rope_parameters"), dict) and "rope_theta" not in settings
    if is_nested and model is not None and not model.nested_rope:
        notes.append(
            "mlx-lm reads rope_theta and rope_scaling in the config.json of the base, which has rope_parameters in their "
            "place, as transformers 5 writes them: add these for mlx-lm, or it computes other positions"
        )
    return notes
