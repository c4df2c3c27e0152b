"""Check whether other tools can load an adapter, and whether it can be exported to them.

Only the adapter's config, the header of its weights and the config.json of its base, where that is
on this machine, are read; the installed version of the tool is not examined. The exports ask the
same checks. For a whole model `convert/model_check.py` adds its tokenizer and chat template.
"""

from collections.abc import Callable

from ..errors import AdapterError
from .adapter import Adapter
from .base_config import BaseConfig
from .base_config import find_base_config as find_base_config
from .compatibility_gguf import check_llama_cpp, check_merged, check_ollama
from .compatibility_mlx import check_mlx
from .compatibility_peft import check_peft
from .compatibility_report import CompatibilityReport as CompatibilityReport
from .compatibility_report import Tool as Tool
from .compatibility_report import replaced_error as replaced_error
from .compatibility_vllm import check_vllm
from .compatibility_vllm import vllm_rank as vllm_rank

_CHECKS: dict[Tool, Callable[[Adapter, str, BaseConfig | None, CompatibilityReport], None]] = {
    "vllm": check_vllm,
    "llama.cpp": check_llama_cpp,
    "gguf": check_llama_cpp,
    "gguf-merged": check_merged,
    "ollama": check_ollama,
    "mlx": check_mlx,
    "peft": check_peft,
}


def check_compatibility(
    adapter: Adapter, tool: Tool, name: str | None = None, base_config: BaseConfig | None = None
) -> CompatibilityReport:
    """Check an adapter against a tool.

    Args:
        adapter: the adapter.
        tool: the tool.
        name: used in the advice in place of the folder's name.
        base_config: config.json of its base; by default that of the base that it names, if it is on
            this machine.
    """
    base_config = base_config or find_base_config(adapter)
    report = CompatibilityReport(tool, [], [], base_config is not None)
    _CHECKS[tool](adapter, name or adapter.name, base_config, report)
    return report


def require_compatible(adapter: Adapter, tool: Tool, base_config: BaseConfig | None = None) -> None:
    """Raise AdapterError, with all reasons, if a tool cannot load an adapter."""
    raise_errors(adapter, check_compatibility(adapter, tool, base_config=base_config))


def raise_errors(adapter: Adapter, report: CompatibilityReport) -> None:
    """Raise AdapterError for the errors of a check, if there are any."""
    if report.errors:
        raise AdapterError(f"{adapter.path}: {'; '.join(report.errors)}.")
